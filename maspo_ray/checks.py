"""What a run checks of itself as it goes: held-out accuracy, and that learner and engines agree.

Promise: an evaluation is of one weight version; parity compares the log-probs of the same tokens under both, and a difference
beyond the bound ends the run.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, Outcome, Prompt
from maspo_ray.fleet import Fleet, named
from maspo_ray.rollout_pool import RolloutPool

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
                    )
                )
                for i, (prompt, tokens) in enumerate(self._prompts)
            ]
        verdicts = [rollout.verdict for task in tasks for rollout in task.result()]
        scored = [verdict.correct for verdict in verdicts if verdict.outcome is Outcome.SCORED]
        accuracy = sum(scored) / len(scored) if scored else float("nan")
        return EvalResult(accuracy, len(self._prompts), samples, len(verdicts) - len(scored))


class ParityCheck:
    """Scores the same sequences on the learner and on every engine."""

    def __init__(self, fleet: Fleet, bound: float) -> None:
        self._fleet = fleet
        self._bound = bound
        self._sequences: list[NDArray[np.int32]] = []

    async def choose(self, prompts: Sequence[Prompt], temperature: float, max_new_tokens: int) -> None:
        """Fixes the sequences: each prompt with a completion that the first engine samples for it."""
        engine = self._fleet.of_role("rollout")[0]

        async def sequence(prompt: Prompt) -> NDArray[np.int32]:
            stream = engine.generate.options(num_returns="streaming").remote(
                prompt, temperature=temperature, max_new_tokens=max_new_tokens, seeds=[0]
            )
            async for ended in stream:
                completions: list[Completion] = await named("rollout/0 failed to generate", ended)
                return np.concatenate([prompt.token_ids, completions[0].token_ids])
            raise RunError("rollout/0 generated nothing")

        self._sequences = list(await asyncio.gather(*(sequence(prompt) for prompt in prompts)))

    async def check(self, version: int) -> float:
        """Returns the largest |Δ log-prob| over sequences and engines.

        Raises:
            RunError: it is above the bound, or not a number.
        """
        engines = self._fleet.of_role("rollout")
        learner, *scored = await asyncio.gather(
            self._fleet.learners("token_logprobs", self._sequences),
            *(self._score(i, engine) for i, engine in enumerate(engines)),
        )
        worst = [max(_distance(a, b) for a, b in zip(learner, theirs, strict=True)) for theirs in scored]
        for i, distance in enumerate(worst):
            if not distance <= self._bound:
                raise RunError(
                    f"parity is {distance:.3g} between the learner and rollout/{i} at version {version}; log-probs of the "
                    f"same tokens may differ by at most {self._bound:g}. The engine does not hold the learner's weights, "
                    "or computes them otherwise: check model.dtype and rollout.engine, or raise pipeline.parity_bound."
                )
        return max(worst)

    async def _score(self, i: int, engine: Any) -> list[NDArray[np.float32]]:
        calls = [engine.token_logprobs.remote(sequence) for sequence in self._sequences]
        return list(await asyncio.gather(*(named(f"rollout/{i} failed to score", call) for call in calls)))


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.max(np.abs(a - b)))
