"""The loop of a run: two coroutines, `produce` and `train`, that share one gate.

Promise: every admitted group comes out exactly once, trained, filtered, stale or failed, and the counts add up; nothing older than
`max_staleness` versions is trained on; a failure in any coroutine ends the run with its cause. Decisions are the gate's, the
ledger's and the buffer's; the coroutines only move things between them.
"""

import asyncio
from time import monotonic
from typing import Any

from maspo_ray.advantages import group_advantages
from maspo_ray.buffer import ReadyBuffer
from maspo_ray.checks import Evaluator, Parity, ParityCheck
from maspo_ray.config import RunConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Experience, Group, Outcome, PublishReport, UpdateReport
from maspo_ray.fleet import Fleet
from maspo_ray.ledger import GroupLedger, GroupOutcome
from maspo_ray.metrics import StepMetrics, combine_updates
from maspo_ray.overlong import is_cut_off, overlong_penalty, trained_advantages, why_not_trained
from maspo_ray.packing import pack
from maspo_ray.progress import Progress
from maspo_ray.prompts import Draw, PromptStream
from maspo_ray.rollout_pool import RolloutPool
from maspo_ray.run_folder import RunFolder
from maspo_ray.run_record import RunRecord
from maspo_ray.seeds import sampling_seeds
from maspo_ray.staleness import StalenessGate
from maspo_ray.timeline import Timeline
from maspo_ray.update_watch import UpdateWatch


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
        record: RunRecord,
        timeline: Timeline,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._pool = pool
        self._prompts = prompts
        self._evaluator = evaluator
        self._parity = parity
        self._folder = folder
        self._progress = progress
        self._record = record
        self._timeline = timeline
        pipeline = config.pipeline
        self._gate = StalenessGate(
            pipeline.groups_per_step, pipeline.max_staleness, pipeline.steps * pipeline.groups_per_step
        )
        self._ledger = GroupLedger(folder.write_ledger)
        self._buffer = ReadyBuffer()
        self._admission = asyncio.Event()
        self._arrival = asyncio.Event()
        self._metrics = StepMetrics()
        self._num_groups = 0
        self._dropped_in_a_row = 0
        self._updates = UpdateWatch(config.learner.max_skipped_updates)

    @property
    def group_counts(self) -> dict[str, int]:
        return self._ledger.counts

    async def run(self) -> None:
        """Runs all steps. However it ends, every group has ended in the ledger."""
        try:
            await self._publish(0)
            await self._check_parity(0)
            await self._evaluate(0)
            async with asyncio.TaskGroup() as tasks:
                producer = tasks.create_task(self._produce(tasks))
                await self._train()
                producer.cancel()
        finally:
            for group_id in self._ledger.open_ids:
                self._ledger.end(group_id, GroupOutcome.FAILED, cause="the run ended")
            self._ledger.check_balanced()

    # Produce: prompts to ready experiences.

    async def _produce(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            while self._gate.capacity() > 0:
                draw = self._prompts.next()
                prompt_id = draw.prompt.prompt_id
                group_id, self._num_groups = self._num_groups, self._num_groups + 1
                version = self._gate.admit()
                self._ledger.submit(group_id, prompt_id, version)
                group_size = self._config.rollout.group_size
                seeds = sampling_seeds(self._config.seed, prompt_id, draw.times_drawn, group_size)
                tasks.create_task(self._run_group(group_id, draw, version, seeds))
            self._admission.clear()
            await self._admission.wait()

    async def _run_group(self, group_id: int, draw: Draw, version: int, seeds: list[int]) -> None:
        rollout, prompt = self._config.rollout, draw.prompt
        reference = self._fleet.put(prompt)
        rollouts = await self._pool.sample(
            reference,
            len(prompt.token_ids),
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seeds=seeds,
        )
        if rollouts is None:
            self._ledger.end(group_id, GroupOutcome.STALE, cause="cancelled: it could no longer be trained on in time")
            self._gate.give_back_running()
            self._admission.set()
            return
        group = Group(group_id, prompt.prompt_id, reference, len(prompt.token_ids), version, rollouts)
        if group.pass_rate is not None:
            self._prompts.observe(draw.index, group.pass_rate)
        overlong, pipeline = self._config.reward.overlong, self._config.pipeline
        penalties = [overlong_penalty(sampled.facts, rollout.max_new_tokens, overlong) for sampled in rollouts]
        rewards = [reward - penalty for reward, penalty in zip(group.rewards, penalties, strict=True)]
        advantages = group_advantages(rewards, self._config.advantage)
        trained = trained_advantages(rollouts, advantages.values, pipeline.filter_overlong)
        self._measure(group, penalties, trained)
        if advantages.num_scored < 2:
            self._drop(group, GroupOutcome.FAILED, "fewer than two completions could be scored")
        elif cause := why_not_trained(trained, advantages, pipeline.filter_zero_variance):
            self._drop(group, GroupOutcome.FILTERED, cause)
        else:
            self._dropped_in_a_row = 0
            self._buffer.put(Experience(group, trained, self._reference_logprobs(group)))
            self._gate.accept()
            self._arrival.set()

    def _reference_logprobs(self, group: Group) -> Any:
        """Returns a reference to what a reference actor is computing; Ray holds the learner back until it is there."""
        actors = self._fleet.of_role("reference")
        if not actors:
            return None
        return actors[group.group_id % len(actors)].completion_logprobs.remote(group.prompt, *group.payloads)

    def _drop(self, group: Group, outcome: GroupOutcome, cause: str) -> None:
        """Ends a running group without training on it; another may start in its place."""
        self._end(group, outcome, cause=cause)
        self._dropped_in_a_row += 1
        limit = self._config.pipeline.max_dropped_in_a_row
        if self._dropped_in_a_row >= limit:
            raise RunError(
                f"the last {limit} groups could not be trained on (the latest: {cause}), and waiting would not end. Take a "
                "task that the model solves sometimes, raise rollout.group_size, or raise pipeline.max_dropped_in_a_row."
            )
        self._gate.give_back_running()
        self._admission.set()

    def _end(self, group: Group, outcome: GroupOutcome, step: int | None = None, cause: str | None = None) -> None:
        self._ledger.end(
            group.group_id,
            outcome,
            min_version=group.min_version,
            max_version=group.max_version,
            step=step,
            cause=cause,
        )

    def _measure(self, group: Group, penalties: list[float], trained: tuple[float | None, ...]) -> None:
        for rollout, penalty, advantage in zip(group.rollouts, penalties, trained, strict=True):
            if rollout.verdict.outcome is Outcome.SCORED:
                self._metrics.add("reward/mean", rollout.verdict.reward)
                self._metrics.add("reward/accuracy", float(rollout.verdict.correct))
                if self._config.reward.overlong is not None:
                    self._metrics.add("reward/overlong_penalty", penalty)
            self._metrics.add("completion/tokens_mean", rollout.facts.num_tokens)
            self._metrics.add("completion/cut_off_share", float(is_cut_off(rollout.facts)))
            self._metrics.add("completion/left_out_share", float(advantage is None))

    # Train: ready experiences to weights.

    async def _train(self) -> None:
        for step in range(1, self._config.pipeline.steps + 1):
            started, tokens_before = monotonic(), self._pool.tokens_generated
            with self._timeline.span("learner", "wait", step=step):
                batch = await self._next_batch()
            waited_s = monotonic() - started
            self._metrics, metrics = StepMetrics(), self._metrics
            learned = await self._learn(batch, step, metrics)
            step_s = monotonic() - started
            row = {
                "version": float(step),
                **metrics.reduce(),
                **learned,
                "time/step_s": step_s,
                "time/learner_wait_share": waited_s / step_s,
                "time/rollout_idle_share": self._pool.idle.take_idle_share(started + step_s),
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
        """Returns the next step's experiences, oldest first; what has gone past the bound leaves here, counted."""
        while True:
            for stale in self._buffer.pop_stale(self._gate.oldest_allowed_version):
                self._end(stale.group, GroupOutcome.STALE)
                self._gate.give_back_accepted()
                self._admission.set()
            batch = self._buffer.take(self._config.pipeline.groups_per_step)
            if batch is not None:
                return batch
            self._arrival.clear()
            await self._arrival.wait()

    async def _learn(self, batch: list[Experience], step: int, metrics: StepMetrics) -> dict[str, float]:
        """Trains on a batch and publishes the new weights as version `step`; returns the learner's metrics."""
        for experience in batch:
            assert self._gate.is_fresh(experience.group.min_version), (
                f"group {experience.group.group_id} is older than max_staleness allows"
            )
            staleness = self._gate.version - experience.group.min_version
            metrics.add("staleness/mean", staleness)
            metrics.add("staleness/max", staleness, reduction="max")
        learner = self._config.learner
        ranks = len(self._fleet.of_role("learner"))
        updates = learner.updates_per_batch
        plans = pack(batch, ranks, learner.max_tokens_per_micro_batch, self._fleet.shares_prompts, updates)
        with self._timeline.span("learner", "train", step=step):
            reports: list[UpdateReport] = await self._fleet.learners_each(
                "train_step", [(step - 1, own, *payloads) for own, payloads in plans]
            )
        learned = combine_updates([report.metrics for report in reports]) | await self._publish(step)
        self._gate.publish(step)
        self._admission.set()
        for i, experience in enumerate(batch):
            if reports[i * updates // len(batch)].applied:
                self._end(experience.group, GroupOutcome.TRAINED, step=step)
            else:
                self._end(experience.group, GroupOutcome.FAILED, cause="its update was left out")
        for report in reports:
            self._updates.watch(step, report)
        every = self._config.pipeline.parity_every
        if every and step % every == 0:
            parity = await self._check_parity(step)
            learned |= {"parity/max": parity.max, "parity/mean": parity.mean}
        return learned

    async def _publish(self, version: int) -> dict[str, float]:
        with self._timeline.span("learner", "publish", version=version):
            started = monotonic()
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
                await self._fleet.learners("save", str(self._folder.checkpoint(step).resolve()))
