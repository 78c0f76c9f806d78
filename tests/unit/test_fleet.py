"""Deadlines of calls to actors, and whom they name."""

import asyncio
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.simulated import simulated_config
from maspo_ray.errors import RunError
from maspo_ray.fleet.calls import LateError, all_within, within
from maspo_ray.fleet.fleet import Fleet


async def _answer(after_s: float) -> int:
    await asyncio.sleep(after_s)
    return 7


def test_within_call_in_time_returns_its_answer() -> None:
    assert asyncio.run(within(5.0, "the step did not end within step_timeout_s", _answer(0.0))) == 7


def test_within_call_that_is_late_ends_by_the_deadline_and_names_it() -> None:
    with pytest.raises(RunError, match=r"^the step did not end within step_timeout_s \(0.05 s\)\."):
        asyncio.run(within(0.05, "the step did not end within step_timeout_s", _answer(60.0)))


def test_all_within_returns_in_the_order_of_the_calls() -> None:
    async def later(value: int) -> int:
        await asyncio.sleep(0.01 * (3 - value))
        return value

    assert asyncio.run(all_within(5.0, "", {f"learner/{i}": later(i) for i in range(3)})) == [0, 1, 2]


def test_all_within_names_those_that_are_late_alone() -> None:
    calls = {"learner/0": _answer(60.0), "learner/1": _answer(0.0), "learner/2": _answer(60.0)}
    with pytest.raises(LateError, match=r"^learner/0, learner/2 did not answer within 0\.05 s in train_step"):
        asyncio.run(all_within(0.05, "in train_step", calls))


def test_all_within_ends_with_the_first_failure_and_cancels_the_others() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append("cancelled")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise RunError("learner/1 failed in train_step: no memory")

    with pytest.raises(RunError, match="no memory"):
        asyncio.run(all_within(5.0, "", {"learner/0": wait(), "learner/1": fail()}))
    assert ended == ["cancelled"]


class _Fleet(Fleet):
    """One whose handles are given, not started."""

    def _create(self, slot: Any, reservation: Any) -> Any:
        return slot


def _fleet(tmp_path: Path, learner_s: float, engines: list[Callable[[], Coroutine[Any, Any, None]]]) -> Fleet:
    """Returns a fleet of a learner that publishes in so many seconds, and of engines that give such signs of life."""
    handles: dict[str, list[Any]] = {
        "learner": [SimpleNamespace(publish=SimpleNamespace(remote=lambda version: _answer(learner_s)))],
        "rollout": [SimpleNamespace(check=SimpleNamespace(remote=check)) for check in engines],
    }
    config = simulated_config(tmp_path, weight_sync_timeout_s=0.02)
    plan: Any = SimpleNamespace(of_role=lambda role: handles.get(role, []))
    nothing: Any = None
    return _Fleet(config, {}, plan, nothing)


async def _alive() -> None:
    pass


async def _silent() -> None:
    await asyncio.sleep(math.inf)


def test_publish_that_is_late_names_the_engine_that_gives_no_sign_of_life(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, 60.0, [_alive, _silent])
    named = r"^learner/0 did not answer within 0\.12 s in publish.* rollout/1 did not answer within 0\.02 s in a weight transfer"
    with pytest.raises(RunError, match=named):
        asyncio.run(fleet.learners("publish", 3))


def test_publish_that_is_late_while_all_engines_answer_names_the_learner(tmp_path: Path) -> None:
    fleet = _fleet(tmp_path, 60.0, [_alive, _alive])
    with pytest.raises(RunError, match=r"^learner/0 did not answer within 0\.12 s in publish; [^/]*$"):
        asyncio.run(fleet.learners("publish", 3))


def test_publish_in_time_asks_no_engine(tmp_path: Path) -> None:
    assert asyncio.run(_fleet(tmp_path, 0.0, [_silent]).learners("publish", 3)) == 7
