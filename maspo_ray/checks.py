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

from maspo_ray.config import EvalConfig, ParityStatistic, RolloutConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, Outcome, Prompt
from maspo_ray.fleet import Fleet, named
from maspo_ray.rollout_pool import RolloutPool

_SEED_STRIDE = 1_000_003
_PARITY_TOKENS = 64
"""A check samples completions of at most so many tokens; it is to cost little beside a step."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """`accuracy` is the mean over scored samples, NaN where none was."""

    accuracy: float
    num_prompts: int
    samples: int
    unscored: int


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest and the mean |Δ log-prob| over tokens."""

    max: float
    mean: float


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
    """Scores the same completions on the learner and on every engine.

    The completions are sampled anew for each check, by the weights that are checked. Tokens that a policy would not sample have
    log-probs that rounding alone moves far: in bfloat16 a difference of 0.8 was seen on a prompt's token between two right sides.
    For the same reason the bound is on the mean over the tokens there, and in float32 on the largest.

    Args:
        prompts: to sample completions for.
        statistic: of |Δ log-prob|, what `bound` bounds.
    """

    def __init__(
        self, fleet: Fleet, prompts: Sequence[Prompt], rollout: RolloutConfig, statistic: ParityStatistic, bound: float
    ) -> None:
        self._fleet = fleet
        self._prompts = prompts
        self._temperature = rollout.temperature
        self._max_new_tokens = min(rollout.max_new_tokens, _PARITY_TOKENS)
        self._statistic = statistic
        self._bound = bound

    async def _sequences(self) -> list[NDArray[np.int32]]:
        """Returns each prompt with a completion that the first engine samples for it."""
        engine = self._fleet.of_role("rollout")[0]

        async def sequence(prompt: Prompt) -> NDArray[np.int32]:
            stream = engine.generate.options(num_returns="streaming").remote(
                prompt, temperature=self._temperature, max_new_tokens=self._max_new_tokens, seeds=[0]
            )
            async for ended in stream:
                completions: list[Completion] = await named("rollout/0 failed to generate", ended)
                return np.concatenate([prompt.token_ids, completions[0].token_ids])
            raise RunError("rollout/0 generated nothing")

        return list(await asyncio.gather(*(sequence(prompt) for prompt in self._prompts)))

    async def check(self, version: int) -> Parity:
        """Returns how far the sides are apart, the worst engine counting.

        Raises:
            RunError: it is beyond the bound, or not a number.
        """
        sequences = await self._sequences()
        engines = self._fleet.of_role("rollout")
        learner, *scored = await asyncio.gather(
            self._fleet.learners("token_logprobs", sequences),
            *(self._score(i, engine, sequences) for i, engine in enumerate(engines)),
        )
        parities = [self._compare(learner, theirs) for theirs in scored]
        for i, parity in enumerate(parities):
            distance = getattr(parity, self._statistic)
            if not distance <= self._bound:
                raise RunError(
                    f"parity is {distance:.3g} between the learner and rollout/{i} at version {version}; the {self._statistic} "
                    f"|Δ log-prob| of the same tokens may be at most {self._bound:g}. The engine does not hold the learner's "
                    "weights, or computes them otherwise: check model.dtype and rollout.engine, or raise "
                    "pipeline.parity_bound."
                )
        return Parity(max(parity.max for parity in parities), max(parity.mean for parity in parities))

    async def _score(self, i: int, engine: Any, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        calls = [engine.token_logprobs.remote(sequence) for sequence in sequences]
        return list(await asyncio.gather(*(named(f"rollout/{i} failed to score", call) for call in calls)))

    def _compare(self, learner: Sequence[NDArray[np.float32]], engine: Sequence[NDArray[np.float32]]) -> Parity:
        """Compares the log-probs of the completions' tokens; those of the prompts come before them."""
        return compare_logprobs(learner, engine, [len(prompt.token_ids) - 1 for prompt in self._prompts])


def compare_logprobs(
    a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]], starts: Sequence[int]
) -> Parity:
    """Returns the differences of log-probs, each sequence's from its start on."""
    deltas = np.concatenate([np.abs(x - y)[start:] for x, y, start in zip(a, b, starts, strict=True)])
    return Parity(float(deltas.max()), float(deltas.mean()))
