"""Held-out accuracy, while training goes on.

Promise: the same prompts and the same sampling seeds each time, ahead of training's groups at each free place of an engine; a result says
which weight versions sampled it.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.experience import Outcome, Prompt
from maspo_ray.hosts.messages import Priority
from maspo_ray.rollouts.pool import RolloutPool, Sampled
from maspo_ray.sampling import evaluation_sampling

_SEED_STRIDE = 1_000_003
"""Evaluations of runs whose seeds differ share no sampling seed, unless one has more completions than this."""
_PROMPTS_AT_ONCE = 2048
"""Prompts that are with the engines at once. Ray lets an actor run only so many calls (`fleet.fleet`), and those of a weight update must
find room among them."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        accuracy: mean over scored samples, NaN where none was.
        min_version: the oldest weights that sampled a token of it; max_version, the newest.
    """

    accuracy: float
    num_prompts: int
    samples: int
    unscored: int
    min_version: int
    max_version: int


class Evaluator:
    """Measures held-out accuracy.

    Args:
        prompts: at least one.
    """

    def __init__(
        self, pool: RolloutPool, prompts: Sequence[Prompt], config: EvalConfig, rollout: RolloutConfig, seed: int
    ) -> None:
        self._pool = pool
        self._prompts = prompts
        self._samples = config.samples
        self._sampling = evaluation_sampling(config, rollout)
        self._first_seed = seed * _SEED_STRIDE
        self._places = asyncio.Semaphore(_PROMPTS_AT_ONCE)

    async def evaluate(self) -> EvalResult:
        """Returns the accuracy under the weights that the engines hold meanwhile."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._sample(i, prompt)) for i, prompt in enumerate(self._prompts)]
        sampled = [task.result() for task in tasks]
        verdicts = [verdict for one in sampled for verdict in one.ended.verdicts]
        facts = [fact for one in sampled for fact in one.ended.facts]
        scored = [verdict.correct for verdict in verdicts if verdict.outcome is Outcome.SCORED]
        return EvalResult(
            accuracy=sum(scored) / len(scored) if scored else float("nan"),
            num_prompts=len(self._prompts),
            samples=self._samples,
            unscored=len(verdicts) - len(scored),
            min_version=min(fact.min_version for fact in facts),
            max_version=max(fact.max_version for fact in facts),
        )

    async def _sample(self, number: int, prompt: Prompt) -> Sampled:
        first = self._first_seed + number * self._samples
        seeds = range(first, first + self._samples)
        async with self._places:
            sampled = await self._pool.sample(prompt, self._sampling, seeds, Priority.PROBE)
        assert sampled is not None, "an evaluation's samples were ended for their age"
        return sampled
