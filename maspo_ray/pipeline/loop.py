"""The loop of a run: two coroutines, the producer's and `_train`, that share one intake.

Promise: every admitted group comes out exactly once, trained, filtered, stale or failed, and the counts add up; a failure in any
coroutine ends the run with its cause. Decisions are the intake's; the coroutines only move things.
"""

import asyncio
from time import monotonic

from maspo_ray.config import RunConfig
from maspo_ray.data.prompts import PromptStream
from maspo_ray.evaluation.evaluator import Evaluator
from maspo_ray.evaluation.parity import Parity, ParityCheck
from maspo_ray.experience import Experience, PublishReport, UpdateReport
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.groups.intake import Intake
from maspo_ray.packing import pack
from maspo_ray.pipeline.garbage import collecting_rarely
from maspo_ray.pipeline.producer import Producer
from maspo_ray.pipeline.step_recorder import StepRecorder
from maspo_ray.pipeline.update_watch import UpdateWatch
from maspo_ray.protocols import DoorPolicy
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.checkpoint import STATE, begin_checkpoint, end_checkpoint
from maspo_ray.run_dir.folder import RunFolder
from maspo_ray.run_dir.history import RunHistory
from maspo_ray.run_dir.metrics import StepMetrics, combine_updates
from maspo_ray.run_dir.progress import Progress
from maspo_ray.run_dir.timeline import Timeline


class Pipeline:
    """Moves groups from prompts to the learner, and weights back."""

    def __init__(
        self,
        config: RunConfig,
        fleet: Fleet,
        pool: RolloutPool,
        prompts: PromptStream,
        evaluator: Evaluator | None,
        parity: ParityCheck,
        folder: RunFolder,
        progress: Progress,
        record: RunHistory,
        timeline: Timeline,
        door: DoorPolicy,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._pool = pool
        self._evaluator = evaluator
        self._parity = parity
        self._folder = folder
        self._progress = progress
        self._record = record
        self._timeline = timeline
        pipeline = config.pipeline
        self._intake = Intake(
            pipeline.groups_per_step, pipeline.max_staleness, pipeline.steps, door, folder.write_ledger
        )
        self._producer = Producer(config, fleet, pool, prompts, self._intake, timeline)
        self._updates = UpdateWatch(config.learner.max_skipped_updates)
        self._recorder = StepRecorder(fleet, folder, pipeline.step_timeout_s) if config.logging.steps else None

    @property
    def group_counts(self) -> dict[str, int]:
        return self._intake.counts

    async def run(self) -> None:
        """Runs all steps. However it ends, every group has ended in the ledger."""
        try:
            await self._publish(0)
            await self._check_parity(0)
            await self._evaluate(0)
            with collecting_rarely():
                async with asyncio.TaskGroup() as tasks:
                    producer = tasks.create_task(self._producer.run(tasks))
                    await self._train(tasks)
                    producer.cancel()
            if self._recorder is not None:
                await self._recorder.finish()
        finally:
            self._intake.close()

    async def _train(self, tasks: asyncio.TaskGroup) -> None:
        for step in range(1, self._config.pipeline.steps + 1):
            started, tokens_before = monotonic(), self._pool.tokens_generated
            stale_before = self._intake.counts["stale"]
            with self._timeline.span("learner", "wait", step=step):
                batch = await self._next_batch()
            waited_s = monotonic() - started
            object_store_bytes = await self._fleet.object_store_used_bytes()
            metrics = self._producer.take_metrics()
            learned = await self._learn(batch, step, metrics)
            self._expire(tasks)
            step_s = monotonic() - started
            row = {
                "version": float(step),
                **metrics.reduce(),
                **learned,
                "time/step_s": step_s,
                "time/learner_wait_share": waited_s / step_s,
                "time/rollout_idle_share": self._pool.idle.take_idle_share(started + step_s),
                "groups/stale": float(self._intake.counts["stale"] - stale_before),
                "groups/running": float(self._intake.running),
                "groups/ready": float(self._intake.ready),
                "object_store/used_mib": object_store_bytes / 2**20,
                "tokens/generated": float(self._pool.tokens_generated - tokens_before),
            }
            self._record.step(row)
            self._folder.write_metrics(step, row)
            self._progress.update(step, row)
            await self._evaluate(step)
            await self._save_checkpoint(step)
            # A step's shares are of the step: what passed since it ended is in neither of them.
            self._pool.idle.take_idle_share(monotonic())

    async def _next_batch(self) -> list[Experience]:
        """Returns the next step's experiences, oldest first."""
        while True:
            batch = self._intake.take()
            # What was refused at the door has left its place.
            self._producer.wake()
            if batch is not None:
                return batch
            self._producer.arrived.clear()
            await self._producer.arrived.wait()

    def _expire(self, tasks: asyncio.TaskGroup) -> None:
        """Lets the engines cancel what can no longer be trained on, while the learner goes on."""
        oldest = self._intake.oldest_trainable_version
        if self._intake.running and oldest > 0:
            tasks.create_task(self._pool.expire(oldest))

    async def _learn(self, batch: list[Experience], step: int, metrics: StepMetrics) -> dict[str, float]:
        """Trains on a batch and publishes the new weights as version `step`; returns the learner's metrics."""
        for lag in self._intake.lags(batch):
            metrics.add("staleness/mean", lag)
            metrics.add("staleness/max", lag, reduction="max")
            metrics.add("staleness/over_bound_share", float(lag > self._config.pipeline.max_staleness))
        learner = self._config.learner
        ranks = len(self._fleet.of_role("learner"))
        updates = learner.updates_per_batch
        plans = pack(batch, ranks, learner.max_tokens_per_micro_batch, self._fleet.shares_prompts, updates)
        if self._recorder is not None:
            await self._recorder.submit(step, step - 1, batch, plans)
        with self._timeline.span("learner", "train", step=step):
            reports: list[UpdateReport] = await self._fleet.learners_each(
                "train_step", [(step - 1, own, *payloads) for own, payloads in plans]
            )
        learned = combine_updates([report.metrics for report in reports]) | await self._publish(step)
        self._intake.publish(step)
        self._producer.wake()
        for i, experience in enumerate(batch):
            self._intake.trained(experience, step, reports[i * updates // len(batch)].applied)
        for report in reports:
            self._updates.watch(step, report)
        every = self._config.pipeline.parity_every
        if every and step % every == 0:
            parity = await self._check_parity(step)
            learned |= {"parity/max": parity.max, "parity/mean": parity.mean}
        return learned

    async def _publish(self, version: int) -> dict[str, float]:
        with self._timeline.span("learner", "publish", version=version):
            started = self._timeline.now()
            report: PublishReport = await self._fleet.learners("publish", version)
        for replica, (stopped, went_on) in enumerate(report.pauses):
            self._timeline.add(f"rollout/{replica}", "paused", started + stopped, started + went_on)
        stalls = [went_on - stopped for stopped, went_on in report.pauses]
        return {"time/publish_s": report.seconds, "time/rollout_paused_s": sum(stalls) / len(stalls)}

    async def _check_parity(self, version: int) -> Parity:
        with self._timeline.span("learner", "parity", version=version):
            parity = await self._parity.check(version)
        self._record.parity(parity.max)
        return parity

    async def _evaluate(self, step: int) -> None:
        every, last = self._config.eval.every, self._config.pipeline.steps
        if self._evaluator is None or not (step in (0, last) or (every and step % every == 0)):
            return
        with self._timeline.span("learner", "evaluate", step=step):
            result = await self._evaluator.evaluate()
        self._folder.write_eval(
            {
                "step": step,
                "version": step,
                "set": self._config.eval.name,
                "accuracy": result.accuracy,
                "k": result.samples,
                "num_prompts": result.num_prompts,
                "unscored": result.unscored,
            }
        )
        self._record.accuracy(result.accuracy)
        self._progress.evaluated(step, result.accuracy)

    async def _save_checkpoint(self, step: int) -> None:
        every = self._config.checkpoint.every
        if every and step % every == 0:
            with self._timeline.span("learner", "save", step=step):
                partial = begin_checkpoint(self._folder.checkpoint(step))
                await self._fleet.learners("save", str(partial))
                await self._fleet.learners("save_state", str(partial / STATE))
                end_checkpoint(partial, self._folder.checkpoint(step))
