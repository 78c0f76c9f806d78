"""Prompts → ready experiences: the half of a run that never waits for the learner longer than the bound makes it.

Promise: every group that it admits it hands on, drops, or gives back, once; a failure of any of them ends the run with its cause.
What may start is the intake's to say.
"""

import asyncio

from maspo_ray.advantages import group_advantages
from maspo_ray.config import MixSource, RunConfig
from maspo_ray.data.stream import Draw, PromptStream
from maspo_ray.errors import RunError
from maspo_ray.experience import Experience, Group, Outcome
from maspo_ray.groups.intake import Intake
from maspo_ray.groups.ledger import GroupOutcome
from maspo_ray.groups.overlong import is_cut_off, overlong_penalty, trained_advantages, why_not_trained
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.rollouts.references import ReferencePool
from maspo_ray.rollouts.seeds import sampling_seeds
from maspo_ray.run_dir.metrics import STEP_COLUMNS, StepMetrics, source_columns
from maspo_ray.sampling import training_sampling


class Producer:
    """Starts groups as the intake allows, and sees each to the learner.

    Attributes:
        arrived: set whenever a group has become ready.
    """

    def __init__(
        self, config: RunConfig, pool: RolloutPool, references: ReferencePool, prompts: PromptStream, intake: Intake
    ) -> None:
        self._config = config
        self._pool = pool
        self._references = references
        self._prompts = prompts
        self._intake = intake
        self._sampling = training_sampling(config.rollout)
        self._admission = asyncio.Event()
        train = config.data.train
        self._columns = {**STEP_COLUMNS, **source_columns(train.sources if isinstance(train, MixSource) else ())}
        self._metrics = StepMetrics(self._columns)
        self._dropped_in_a_row = 0
        self.arrived = asyncio.Event()

    def take_metrics(self) -> StepMetrics:
        """Returns what was measured of the groups that ended since this was last asked."""
        taken, self._metrics = self._metrics, StepMetrics(self._columns)
        return taken

    def wake(self) -> None:
        """There may be room for another group."""
        self._admission.set()

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Starts groups in `tasks`, without end."""
        while True:
            while self._intake.capacity() > 0:
                draw = self._prompts.next()
                group_id, version = self._intake.admit(draw.prompt.prompt_id)
                tasks.create_task(self._run_group(group_id, draw, version))
            self._admission.clear()
            await self._admission.wait()

    async def _run_group(self, group_id: int, draw: Draw, version: int) -> None:
        prompt = draw.prompt
        seeds = sampling_seeds(self._config.seed, prompt.prompt_id, draw.times_drawn, self._config.rollout.group_size)
        sampled = await self._pool.sample(prompt, self._sampling, seeds)
        if sampled is None:
            self._metrics.add("groups/cancelled", 1, reduction="sum")
            self._intake.expired(group_id)
            self.wake()
            return
        group = Group(
            group_id,
            prompt.prompt_id,
            sampled.payload,
            len(prompt.token_ids),
            version,
            sampled.replica,
            sampled.rollouts,
            tuple(seeds),
        )
        if group.pass_rate is not None:
            self._prompts.observe(draw.index, group.pass_rate)
        await self._judge(group, prompt.source)

    async def _judge(self, group: Group, source: str) -> None:
        """Hands a group on to the learner, or drops it."""
        config, rollouts = self._config, group.rollouts
        overlong, limit = config.reward.overlong, config.rollout.max_new_tokens
        penalties = [overlong_penalty(rollout.facts, limit, overlong) for rollout in rollouts]
        rewards = [reward - penalty for reward, penalty in zip(group.rewards, penalties, strict=True)]
        advantages = group_advantages(rewards, config.advantage)
        trained = trained_advantages(rollouts, advantages.values, config.pipeline.filter_overlong)
        self._measure(group, source, penalties, trained)
        if advantages.num_scored < 2:
            self._drop(group, GroupOutcome.FAILED, "fewer than two completions could be scored")
        elif cause := why_not_trained(trained, advantages, config.pipeline.filter_zero_variance):
            self._drop(group, GroupOutcome.FILTERED, cause)
        else:
            self._dropped_in_a_row = 0
            self._intake.accept(Experience(group, trained, await self._references.logprobs(group)))
            self.arrived.set()

    def _drop(self, group: Group, outcome: GroupOutcome, cause: str) -> None:
        """Ends a running group without training on it; another may start in its place."""
        self._intake.drop(group, outcome, cause)
        self._dropped_in_a_row += 1
        limit = self._config.pipeline.max_dropped_in_a_row
        if self._dropped_in_a_row >= limit:
            raise RunError(
                f"the last {limit} groups could not be trained on (the latest: {cause}), and waiting would not end. Take a "
                "task that the model solves sometimes, raise rollout.group_size, or raise pipeline.max_dropped_in_a_row."
            )
        self.wake()

    def _measure(self, group: Group, source: str, penalties: list[float], trained: tuple[float | None, ...]) -> None:
        facts = [rollout.facts for rollout in group.rollouts]
        scored = [i for i, rollout in enumerate(group.rollouts) if rollout.verdict.outcome is Outcome.SCORED]
        rewards = [group.rollouts[i].verdict.reward for i in scored]
        correct = [group.rollouts[i].verdict.correct for i in scored]
        self._metrics.add_all("reward/mean", rewards)
        self._metrics.add_all("reward/accuracy", correct)
        if source:
            self._metrics.add(f"source/{source}/groups", 1, reduction="sum")
            self._metrics.add_all(f"source/{source}/reward", rewards)
            self._metrics.add_all(f"source/{source}/accuracy", correct)
        if self._config.reward.overlong is not None:
            self._metrics.add_all("reward/overlong_penalty", [penalties[i] for i in scored])
        self._metrics.add_all("completion/tokens_mean", [fact.num_tokens for fact in facts])
        self._metrics.add_all("completion/cut_off_share", [is_cut_off(fact) for fact in facts])
        self._metrics.add_all("completion/left_out_share", [advantage is None for advantage in trained])
