"""Streams that end too early: the run ends with what the engine said, or goes on with what came."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, Rollout, Verdict, VersionSpan
from maspo_ray.rollout_pool import ErrorWatch, RolloutPool
from maspo_ray.timeline import Timeline

ONE = Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), (VersionSpan(2, 0, 3),), "stop", "")


async def _object(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def _sample(objects: list[Any], seeds: list[int]) -> tuple[Rollout, ...]:
    """Returns what a pool makes of an engine whose stream has these objects."""

    async def stream() -> AsyncIterator[Awaitable[Any]]:
        for value in objects:
            yield asyncio.ensure_future(_object(value))

    generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_, **__: stream()))
    verdicts = SimpleNamespace(future=lambda: asyncio.ensure_future(_object([Verdict.from_reward(1.0)])))
    score = SimpleNamespace(remote=lambda *_: verdicts)
    pool = RolloutPool(
        [SimpleNamespace(generate=generate)],
        [SimpleNamespace(score=score)],
        ErrorWatch(0.1),
        Timeline(lambda _: None),
    )
    try:
        return asyncio.run(pool.sample(None, 4, temperature=1.0, max_new_tokens=8, seeds=seeds))
    finally:
        assert pool._outstanding_tokens == [0]


def test_sample_of_an_engine_that_fails_raises_its_error() -> None:
    # As Ray ends the stream of a generator that raised: the error stands where its next object would.
    with pytest.raises(RuntimeError, match=r"^the engine is out of blocks$"):
        _sample([RuntimeError("the engine is out of blocks")], [1, 2])


def test_sample_whose_last_facts_are_missing_takes_them_from_the_completions() -> None:
    [rollout] = _sample([[ONE]], [1])
    assert (rollout.facts.num_tokens, rollout.facts.min_version, rollout.verdict.reward) == (3, 2, 1.0)


def test_sample_whose_completions_are_missing_ends_the_run() -> None:
    with pytest.raises(RunError, match="rollout/0 failed to generate: 1 of 2 completions came"):
        _sample([[ONE]], [1, 2])
