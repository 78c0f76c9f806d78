"""The loop of a run: two coroutines, the producer's and `_train`, that share one intake.

Promise: every admitted group comes out exactly once, trained, filtered, stale or failed, and the counts add up; a failure in any
coroutine ends the run with its cause. Decisions are the intake's; the coroutines only move things.
"""

import asyncio
import math

from maspo_ray.config import RunConfig
from maspo_ray.data.stream import PromptStream
from maspo_ray.evaluation.evaluator import Evaluator
from maspo_ray.evaluation.parity import ParityBounds, ParityProbe, join_parities
from maspo_ray.evaluation.schedule import EvaluationSchedule
from maspo_ray.experience import Experience, Parity, UpdateReport
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.groups.intake import Intake
from maspo_ray.packing import pack
from maspo_ray.pipeline.garbage import collecting_rarely
from maspo_ray.pipeline.producer import Producer
from maspo_ray.pipeline.record_queue import RecordQueue
from maspo_ray.pipeline.update_watch import UpdateWatch
from maspo_ray.pipeline.wait_watch import watch_waits
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.rollouts.publishing import WeightUpdates, must_show
from maspo_ray.rollouts.references import ReferencePool
from maspo_ray.run_dir.checkpoint import STATE, begin_checkpoint, end_checkpoint, whole_folder
from maspo_ray.run_dir.journal import Journal
from maspo_ray.run_dir.metrics import combine_updates, without_lags_above

_COUNTED = ("filtered", "stale", "failed")


class Pipeline:
    """Moves groups from prompts to the learner, and weights back."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        pool: RolloutPool,
        prompts: PromptStream,
        intake: Intake,
        evaluator: Evaluator | None,
        journal: Journal,
    ) -> None:
        pipeline = config.pipeline
        self._config = config
        self._fleet = fleet
        self._pool = pool
        self._intake = intake
        self._journal = journal
        self._timeline = timeline = journal.timeline
        self._references = ReferencePool(fleet, timeline, config.reference.timeout_s)
        self._producer = Producer(config, pool, self._references, prompts, intake)
        self._weights = WeightUpdates(
            fleet.learner, fleet, pool.table, fleet.transfer_sets, timeline, pipeline.weight_sync_timeout_s
        )
        self._bounds = ParityBounds(config.model.dtype, pipeline.parity_bound)
        self._probe = ParityProbe(pool, fleet.learner, prompts.first(pipeline.parity_prompts), config.rollout)
        # Of each engine, the step in which it was last compared with the learner.
        self._compared_in = [0] * len(pool.table)
        self._evaluations = EvaluationSchedule(evaluator, config.eval, pipeline.steps, journal)
        self._updates = UpdateWatch(config.learner.max_skipped_updates)
        self._recorder = RecordQueue(fleet, journal.files, pipeline.step_timeout_s) if config.logging.steps else None

    @property
    def group_counts(self) -> dict[str, int]:
        return self._intake.counts

    async def run(self) -> None:
        """Runs all steps. However it ends, every group has ended in the ledger."""
        try:
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(
                    watch_waits(self._journal, self._references.check_silence, self._pool.check_silence)
                )
                with self._journal.waiting("the first weights to reach the engines"):
                    await self._weights.publish(0, changed=False)
                await self._compare(0, range(len(self._pool.table)))
                self._evaluations.begin(0, tasks)
                with collecting_rarely():
                    producer = tasks.create_task(self._producer.run(tasks))
                    await self._train(tasks)
                producer.cancel()
                await self._finish()
                watch.cancel()
        finally:
            self._intake.close()

    async def _finish(self) -> None:
        """Saves what a run that came to its last step leaves behind."""
        if self._recorder is not None:
            with self._journal.waiting("the record of the last step"):
                await self._recorder.finish()
        if self._config.checkpoint.save_final:
            with (
                self._timeline.span("learner", "save"),
                self._journal.waiting("the final model"),
                # What a learner is writing is half a model until it returns.
                whole_folder(self._journal.files.final) as partial,
            ):
                await self._fleet.learner.save(partial)

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        counted = dict(self._intake.counts)
        for step in range(1, self._config.pipeline.steps + 1):
            row = await self._step(step, tasks)
            for outcome in _COUNTED:
                row[f"groups/{outcome}"] = float(self._intake.counts[outcome] - counted[outcome])
            counted = dict(self._intake.counts)
            self._journal.step(step, row)

    async def _step(self, step: int, tasks: asyncio.TaskGroup) -> dict[str, float]:
        """Makes a step; returns its row of metrics.jsonl. What it trains on is let go of with it."""
        started = self._timeline.now()
        with self._timeline.span("learner", "wait", step=step), self._journal.waiting(self._what_comes(step)):
            batch = await self._next_batch()
        waited_s = self._timeline.now() - started
        with self._journal.waiting("Ray to say how full its object store is"):
            object_store_bytes = await self._fleet.object_store_used_bytes()
        metrics = self._producer.take_metrics()
        for lag in self._intake.lags(batch):
            metrics.add("staleness/mean", lag)
            metrics.add("staleness/max", lag, reduction="max")
            metrics.add("staleness/over_bound_share", float(lag > self._config.pipeline.max_staleness))
        learned = await self._learn(batch, step, tasks)
        if step == self._config.pipeline.steps:
            # The last evaluation's tokens belong into the last row.
            await self._evaluations.finish()
        with self._journal.waiting("the engines to say how they fare"):
            beats = await self._pool.beat(self._intake.oldest_trainable_version)
        await self._save_checkpoint(step)
        step_s = self._timeline.now() - started
        return {
            "version": float(step),
            **metrics.reduce(),
            **learned,
            "time/step_s": step_s,
            "time/learner_wait_share": waited_s / step_s,
            "time/rollout_idle_share": beats.idle_share,
            "groups/running": float(self._intake.running),
            "groups/ready": float(self._intake.ready),
            "object_store/used_mib": object_store_bytes / 2**20,
            "tokens/generated": float(beats.tokens),
        }

    def _what_comes(self, step: int) -> "WaitForBatch":
        return WaitForBatch(step, self._config.pipeline.groups_per_step, self._intake, self._pool)

    async def _next_batch(self) -> list[Experience]:
        """Returns the next step's experiences, oldest first."""
        while True:
            batch = self._intake.take()
            # What came too late has left its place.
            self._producer.wake()
            if batch is not None:
                return batch
            self._producer.arrived.clear()
            await self._producer.arrived.wait()

    async def _learn(self, batch: list[Experience], step: int, tasks: asyncio.TaskGroup) -> dict[str, float]:
        """Trains on a batch and publishes the new weights as version `step`; returns the learner's metrics."""
        learner, group = self._config.learner, self._fleet.learner
        updates = learner.updates_per_batch
        shares = pack(batch, group.data_ranks, learner.max_tokens_per_micro_batch, group.shares_prompts, updates)
        if self._recorder is not None:
            with self._journal.waiting(f"the record of step {step - 1}"):
                await self._recorder.submit(step, step - 1, batch, shares)
        with (
            self._timeline.span("learner", "train", step=step),
            self._journal.waiting(f"the learner to make step {step}"),
        ):
            reports = await group.train(step - 1, shares)
        found = self._take_up(step, reports)
        if step == 1:
            # The evaluation before training is to be of version 0 alone.
            await self._evaluations.finish()
        with self._journal.waiting(f"version {step} to reach the engines"):
            published = await self._weights.publish(step, must_show(reports, self._config.model.dtype))
        self._evaluations.begin(step, tasks)
        if self._config.pipeline.max_staleness == 0:
            await self._evaluations.finish()
        self._intake.publish(step)
        self._producer.wake()
        for i, experience in enumerate(batch):
            self._intake.trained(experience, step, reports[i * updates // len(batch)].applied)
        for report in reports:
            self._updates.watch(step, report)
        found += await self._compare_unheard(step)
        learned = without_lags_above(self._intake.max_lag, combine_updates([report.metrics for report in reports]))
        return learned | published | _parity_columns(found)

    def _take_up(self, step: int, reports: list[UpdateReport]) -> list[Parity]:
        """Holds the parity that the learner found while it trained against the bound; returns it."""
        found = {replica: parity for report in reports for replica, parity in report.parity.items()}
        return self._judge(step, step - 1, found)

    async def _compare_unheard(self, step: int) -> list[Parity]:
        """Probes the engines that were not compared with the learner for `pipeline.parity_every` steps; returns their parity."""
        every = self._config.pipeline.parity_every
        unheard = [i for i, compared_in in enumerate(self._compared_in) if every and step - compared_in >= every]
        return await self._compare(step, unheard) if unheard else []

    async def _compare(self, step: int, replicas: range | list[int]) -> list[Parity]:
        """Probes engines, which hold the version of a step; returns their parity."""
        names = ", ".join(f"rollout/{replica}" for replica in replicas)
        with (
            self._timeline.span("learner", "parity", version=step),
            self._journal.waiting(f"a check that the learner agrees with {names}"),
        ):
            return self._judge(step, step, await self._probe.compare(replicas))

    def _judge(self, step: int, version: int, found: dict[int, Parity]) -> list[Parity]:
        for replica, parity in found.items():
            self._compared_in[replica] = step
            self._journal.parity(parity)
        self._bounds.check(version, found)
        return list(found.values())

    async def _save_checkpoint(self, step: int) -> None:
        every = self._config.checkpoint.every
        if every and step % every == 0:
            learner, folder = self._fleet.learner, self._journal.files.checkpoint(step)
            with (
                self._timeline.span("learner", "save", step=step),
                self._journal.waiting(f"the checkpoint of step {step}"),
            ):
                partial = begin_checkpoint(folder)
                await learner.save(partial)
                await learner.save_state(partial / STATE)
                end_checkpoint(partial, folder)


class WaitForBatch:
    """Says what the learner waits for, as it stands when it is called."""

    def __init__(self, step: int, groups_per_step: int, intake: Intake, pool: RolloutPool) -> None:
        self._step = step
        self._groups_per_step = groups_per_step
        self._intake = intake
        self._pool = pool

    def __call__(self) -> str:
        ready, running = self._intake.ready, self._intake.running
        return (
            f"the groups of step {self._step}: {ready} of {self._groups_per_step} ready, {running} on the way "
            f"({self._pool.describe()})"
        )


def _parity_columns(found: list[Parity]) -> dict[str, float]:
    """Returns the worst engine's parity; NaN where none was compared."""
    worst = join_parities(found).max if found else math.nan
    return {"parity/max": worst, "parity/mean": max((parity.mean for parity in found), default=math.nan)}
