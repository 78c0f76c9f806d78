"""Whether learner and engines agree, as a run goes on.

Promise: the log-probs of the same tokens are compared under both, and a difference beyond the bound ends the run.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import ParityStatistic, RolloutConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, Prompt
from maspo_ray.fleet.calls import await_named
from maspo_ray.fleet.fleet import Fleet

_PARITY_TOKENS = 64
"""A check samples completions of at most so many tokens; it is to cost little beside a step."""


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest and the mean |Δ log-prob| over tokens."""

    max: float
    mean: float


class ParityCheck:
    """Lets every engine sample completions and the learner score the same tokens.

    What an engine says of a token is its behaviour log-prob, so that the check is of the very numbers that training takes the
    ratio to. Only sampled tokens are compared: those that a policy would not sample have log-probs that rounding alone moves far; in
    bfloat16 a difference of 0.8 was seen on a prompt's token between two right sides. For the same reason the bound is on the
    mean over the tokens there, and in float32 on the largest.

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

    async def check(self, version: int) -> Parity:
        """Returns how far the sides are apart, the worst engine counting.

        Raises:
            RunError: it is beyond the bound, or not a number.
        """
        engines = self._fleet.of_role("rollout")
        sampled = await asyncio.gather(
            *(
                self._complete(f"rollout/{i}", engine, prompt)
                for i, engine in enumerate(engines)
                for prompt in self._prompts
            )
        )
        pairs = [(prompt.token_ids, completion.token_ids) for prompt, completion in sampled]
        learner = await self._fleet.learner.logprobs(pairs)
        behaviour = [completion.logprobs for _, completion in sampled]
        size = len(self._prompts)
        parities = [
            compare_logprobs(learner[start : start + size], behaviour[start : start + size])
            for start in range(0, len(sampled), size)
        ]
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

    async def _complete(self, name: str, engine: Any, prompt: Prompt) -> tuple[Prompt, Completion]:
        """Returns the prompt with a completion that the engine samples for it."""
        stream = engine.generate.options(num_returns="streaming").remote(
            prompt, temperature=self._temperature, max_new_tokens=self._max_new_tokens, seeds=[0]
        )
        async for ended in stream:
            completions: list[Completion] = await await_named(name, "generating", ended)
            return prompt, completions[0]
        raise RunError(f"{name} generated nothing")


def compare_logprobs(a: Sequence[NDArray[np.float32]], b: Sequence[NDArray[np.float32]]) -> Parity:
    """Returns the differences of the log-probs of the same sequences."""
    deltas = np.abs(np.concatenate(a) - np.concatenate(b))
    return Parity(float(deltas.max()), float(deltas.mean()))
