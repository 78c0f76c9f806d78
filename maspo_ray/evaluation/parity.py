"""Whether learner and engines compute the same log-probs.

Promise: parity compares the log-probs of the same tokens under both, of each engine by itself, and a difference beyond the bound ends the
run with the engine's name. Tokens of a batch that the learner's present weights sampled cost nothing to compare, since the learner scores
them anyhow; an engine that has had none in a batch for a while samples a few.

The engine's side is the behaviour log-prob, the very number that training takes the ratio to. Only sampled tokens are compared: rounding
alone moves the log-probs of tokens that a policy would not sample far; in bfloat16 a difference of 0.8 was seen on a prompt's token between
two right sides. For the same reason the bound in bfloat16 is on the mean over the tokens, and in float32 on the largest.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import Dtype, RolloutConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, Parity, Prompt, SampledGroup
from maspo_ray.fleet.calls import await_named
from maspo_ray.hosts.messages import Priority
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.sampling import training_sampling

ParityStatistic = Literal["max", "mean"]

_PROBE_TOKENS = 64
"""A probe samples completions of at most so many tokens; it is to cost little beside a step."""
_FEWEST_TOKENS = 256
"""A mean over fewer tokens says little: they are kept, and those of the next batches added to them."""
_FLOAT32_MAX, _BFLOAT16_MEAN = 1e-3, 0.1
_OVER_FIRST, _BFLOAT16_ROUNDING = 3.0, 2**-7
"""In bfloat16 the mean may be so many times the run's first: 0.1 alone would hide an update that never arrived. It may always be what
rounding moves a log-prob between 1 and 2 by: the first can be 0, where a policy is sure of nearly every token."""


class ParityBounds:
    """Holds each engine's differences against the bound. A pure state machine.

    Args:
        bound: on |Δ log-prob| of `statistic_of(dtype)`, as the config gives it; None for the default.
    """

    def __init__(self, dtype: Dtype, bound: float | None) -> None:
        self._statistic = statistic_of(dtype)
        self._bound = bound
        self._first: float | None = None
        # Of each replica, tokens that are still too few for their mean to say something.
        self._few: dict[int, Parity] = {}

    def check(self, version: int, found: Mapping[int, Parity]) -> None:
        """Takes up what was found, by replica, in tokens of the weights of a version.

        Raises:
            RunError: an engine is beyond the bound, or its difference is not a number.
        """
        for replica, parity in found.items():
            if self._statistic == "max":
                self._judge(version, replica, parity.max, _FLOAT32_MAX)
                continue
            gathered = join_parities([parity, *filter(None, [self._few.pop(replica, None)])])
            self._judge(version, replica, gathered.mean, _BFLOAT16_MEAN)
            if gathered.tokens < _FEWEST_TOKENS:
                self._few[replica] = gathered
            elif self._first is None:
                self._first = gathered.mean
            else:
                self._judge(version, replica, gathered.mean, max(_OVER_FIRST * self._first, _BFLOAT16_ROUNDING))

    def _judge(self, version: int, replica: int, distance: float, default: float) -> None:
        bound = default if self._bound is None else self._bound
        if not distance <= bound:
            raise RunError(
                f"parity is {distance:.3g} between the learner and rollout/{replica} at version {version}; the {self._statistic} "
                f"|Δ log-prob| of the same tokens may be at most {bound:.3g}. The engine does not hold the learner's "
                "weights, or computes them otherwise: check model.dtype and rollout.engine, or raise pipeline.parity_bound."
            )


def statistic_of(dtype: Dtype) -> ParityStatistic:
    """Returns what of |Δ log-prob| is bounded: bfloat16's rounding has outliers."""
    return "max" if dtype == "float32" else "mean"


def join_parities(parities: Sequence[Parity]) -> Parity:
    """Returns the difference over the tokens of all, at least one of which has some."""
    tokens = sum(parity.tokens for parity in parities)
    # max() would keep a NaN or not by its place.
    largest = float(np.max([parity.max for parity in parities]))
    return Parity(largest, sum(parity.mean * parity.tokens for parity in parities) / tokens, tokens)


class Scores(Protocol):
    """What scores tokens under the learner's weights."""

    async def logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]: ...


class ParityProbe:
    """Lets engines sample a few completions, and the learner score the same tokens.

    Args:
        prompts: to sample completions for, at least one.
    """

    def __init__(self, pool: RolloutPool, learner: Scores, prompts: Sequence[Prompt], rollout: RolloutConfig) -> None:
        self._pool = pool
        self._learner = learner
        self._prompts = prompts
        sampling = training_sampling(rollout)
        self._sampling = replace(
            sampling,
            max_new_tokens=min(sampling.max_new_tokens, _PROBE_TOKENS),
            min_new_tokens=min(sampling.min_new_tokens, _PROBE_TOKENS),
        )

    async def compare(self, replicas: Iterable[int]) -> dict[int, Parity]:
        """Returns how far the learner is from each of the engines, which hold its weights."""
        asked = [(replica, prompt) for replica in replicas for prompt in self._prompts]
        # Where one fails, the others end with it.
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._complete(replica, prompt)) for replica, prompt in asked]
        sampled = [task.result() for task in tasks]
        pairs = [
            (prompt.token_ids, completion.token_ids) for (_, prompt), completion in zip(asked, sampled, strict=True)
        ]
        learner = await self._learner.logprobs(pairs)
        found: dict[int, list[Parity]] = {}
        for (replica, _), completion, logprobs in zip(asked, sampled, learner, strict=True):
            found.setdefault(replica, []).append(difference(logprobs, completion.logprobs))
        return {replica: join_parities(parities) for replica, parities in found.items()}

    async def _complete(self, replica: int, prompt: Prompt) -> Completion:
        """Returns a completion that an engine samples."""
        sampled = await self._pool.sample(prompt, self._sampling, [0], Priority.PROBE, scored=False, replica=replica)
        assert sampled is not None, "a probe was ended for its age"
        group: SampledGroup = await await_named(f"rollout/{replica}", "handing on a completion", sampled.payload)
        return group.completions[0]


def difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> Parity:
    """Returns how far two sides' log-probs of the same tokens, [tokens] float32 each, are apart."""
    deltas = np.abs(a - b)
    return Parity(float(deltas.max()), float(deltas.mean()), len(deltas))
