"""Streams that end too early: the run ends with what the engine said, or goes on with what came."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.errors import RunError
from maspo_ray.evaluation.evaluator import EvalResult, Evaluator
from maspo_ray.experience import Completion, CompletionFacts, Outcome, Rollout, Verdict, VersionSpan
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.timeline import Timeline

ONE = Completion(np.zeros(3, np.int32), np.zeros(3, np.float32), (VersionSpan(2, 0, 3),), "stop", "")


async def _object(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def _pool(
    stream: Callable[[], AsyncIterator[Awaitable[Any]]],
    score: Callable[[], Awaitable[Any]],
    errors: ErrorWatch | None = None,
) -> RolloutPool:
    """Returns a pool of one engine, which streams so, and of one reward, which answers so."""
    generate = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_, **__: stream()))
    scoring = SimpleNamespace(remote=lambda *_: SimpleNamespace(future=lambda: asyncio.ensure_future(score())))
    return RolloutPool(
        [SimpleNamespace(generate=generate)],
        [SimpleNamespace(score=scoring)],
        errors or ErrorWatch(0.1),
        Timeline(lambda _: None),
    )


def _sample(objects: list[Any], seeds: list[int]) -> tuple[Rollout, ...] | None:
    """Returns what a pool makes of an engine whose stream has these objects."""

    async def stream() -> AsyncIterator[Awaitable[Any]]:
        for value in objects:
            yield asyncio.ensure_future(_object(value))

    pool = _pool(stream, lambda: _object([Verdict.from_reward(1.0)]))
    try:
        return asyncio.run(pool.sample(None, 4, temperature=1.0, max_new_tokens=8, seeds=seeds))
    finally:
        assert pool._outstanding_tokens == [0]


def test_sample_of_an_engine_that_fails_raises_its_error() -> None:
    # As Ray ends the stream of a generator that raised: the error stands where its next object would.
    with pytest.raises(RuntimeError, match=r"^the engine is out of blocks$"):
        _sample([RuntimeError("the engine is out of blocks")], [1, 2])


def test_sample_whose_last_facts_are_missing_takes_them_from_the_completions() -> None:
    rollouts = _sample([[ONE]], [1])
    assert rollouts is not None
    [rollout] = rollouts
    assert (rollout.facts.num_tokens, rollout.facts.min_version, rollout.verdict.reward) == (3, 2, 1.0)


def test_sample_whose_completions_are_missing_ends_the_run() -> None:
    with pytest.raises(RunError, match="rollout/0 failed to generate: 1 of 2 completions came"):
        _sample([[ONE]], [1, 2])


async def _endless(started: asyncio.Event) -> AsyncIterator[Awaitable[Any]]:
    """A stream of two completions, and of one more that never ends."""
    for sample in range(2):
        yield asyncio.ensure_future(_object([ONE]))
        yield asyncio.ensure_future(_object([CompletionFacts(3, 2, 2, "stop", sample)]))
        await asyncio.sleep(0.01)
    started.set()
    await asyncio.Event().wait()


def test_sample_whose_reward_fails_ends_before_the_stream_does() -> None:
    async def run() -> None:
        pool = _pool(lambda: _endless(asyncio.Event()), lambda: _object(RunError("the reward failed: no disk")))
        await asyncio.wait_for(pool.sample(None, 4, temperature=1.0, max_new_tokens=8, seeds=[1, 2, 3]), 5.0)

    with pytest.raises(RunError, match="no disk"):
        asyncio.run(run())


def test_sample_that_is_cancelled_cancels_what_is_being_scored_and_leaves_the_engine() -> None:
    cancelled = []

    async def score() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("a call")
            raise

    async def run() -> None:
        started = asyncio.Event()
        pool = _pool(lambda: _endless(started), score)
        sampling = asyncio.ensure_future(pool.sample(None, 4, temperature=1.0, max_new_tokens=8, seeds=[1, 2, 3]))
        await started.wait()
        sampling.cancel()
        await asyncio.wait([sampling])
        await asyncio.sleep(0)
        assert cancelled == ["a call"] * 2
        assert pool._outstanding_tokens == [0] and pool.idle._outstanding == [0]
        tracks = [track for _, track in (*pool._rollout, next(pool._reward))]
        assert set(tracks[1].totals) == {"score"}
        assert [track.num_lanes - len(track.free_lanes) for track in tracks] == [0, 0]

    asyncio.run(run())


def test_sample_counts_a_reward_that_fails_under_what_the_sample_is_for() -> None:
    async def stream() -> AsyncIterator[Awaitable[Any]]:
        for value in ([ONE], [CompletionFacts.of(ONE)]):
            yield asyncio.ensure_future(_object(value))

    errors = ErrorWatch(0.1)
    pool = _pool(stream, lambda: _object([Verdict.unscored(Outcome.TIMEOUT, "no answer")]), errors)

    evaluator = Evaluator(pool, [], EvalConfig(samples=1), RolloutConfig(), seed=0)
    evaluator._prompts = [(None, 4)] * 2

    async def run() -> EvalResult:
        await pool.sample(None, 4, temperature=1.0, max_new_tokens=8, seeds=[1])
        return await evaluator.evaluate()

    assert asyncio.run(run()).unscored == 2
    assert (errors.errors, errors.evaluation_errors) == (1, 2)
