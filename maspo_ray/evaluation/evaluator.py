"""Held-out accuracy, as a run goes on.

Promise: an evaluation is of one weight version, over the same prompts and sampling seeds each time.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.experience import Outcome, Prompt
from maspo_ray.rollouts.pool import RolloutPool

_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`accuracy` is the mean over scored samples, NaN where none was."""

    accuracy: float
    num_prompts: int
    samples: int
    unscored: int


class Evaluator:
    """Measures held-out accuracy: the same prompts and the same sampling seeds each time."""

    def __init__(
        self, pool: RolloutPool, prompts: Sequence[Prompt], config: EvalConfig, rollout: RolloutConfig, seed: int
    ) -> None:
        self._pool = pool
        self._config = config
        self._max_new_tokens = rollout.max_new_tokens
        self._seed = seed
        self._prompts = [(ray.put(prompt), len(prompt.token_ids)) for prompt in prompts]

    async def evaluate(self) -> EvalResult:
        """Returns the accuracy under the weights that the engines hold now."""
        samples = self._config.samples
        first = self._seed * _SEED_STRIDE
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    self._pool.sample(
                        prompt,
                        tokens,
                        temperature=self._config.temperature,
                        max_new_tokens=self._max_new_tokens,
                        seeds=range(first + i * samples, first + (i + 1) * samples),
                        purpose="evaluation",
                    )
                )
                for i, (prompt, tokens) in enumerate(self._prompts)
            ]
        sampled = [rollouts for task in tasks if (rollouts := task.result()) is not None]
        assert len(sampled) == len(tasks), "an evaluation's samples were ended for their age, though no weights changed"
        verdicts = [rollout.verdict for rollouts in sampled for rollout in rollouts]
        scored = [verdict.correct for verdict in verdicts if verdict.outcome is Outcome.SCORED]
        accuracy = sum(scored) / len(scored) if scored else float("nan")
        return EvalResult(accuracy, len(self._prompts), samples, len(verdicts) - len(scored))
