"""Calls to actors: their deadlines, and whom a failure names."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from maspo_ray.errors import ActorFailed, ActorGone, ActorLate, ConfigError, RunError
from maspo_ray.fleet.calls import await_all, await_named, await_within, failures_named


async def _answer(after_s: float) -> int:
    await asyncio.sleep(after_s)
    return 7


async def _fail(error: Exception, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    raise error


def test_await_within_call_in_time_returns_its_answer() -> None:
    assert asyncio.run(await_within(5.0, "the step did not end within step_timeout_s", _answer(0.0))) == 7


def test_await_within_call_that_is_late_ends_by_the_deadline_and_names_it() -> None:
    with pytest.raises(RunError, match=r"^the step did not end within step_timeout_s \(0.05 s\)\."):
        asyncio.run(await_within(0.05, "the step did not end within step_timeout_s", _answer(60.0)))


def test_await_named_returns_the_answer_and_names_the_actor_of_a_failure() -> None:
    assert asyncio.run(await_named("rollout/3", "generating", _answer(0.0))) == 7
    with pytest.raises(ActorGone, match=r"^rollout/3 was lost while generating: out of memory$") as raised:
        asyncio.run(await_named("rollout/3", "generating", _fail(OutOfMemoryError("out of memory"))))
    assert (raised.value.role, raised.value.replica) == ("rollout", 3)


def test_failures_named_of_an_actors_own_code_keep_their_traceback_and_others_have_none() -> None:
    with pytest.raises(ActorFailed) as raised, failures_named("reward/0", "scoring"):
        raise RayTaskError("score", "", ValueError("no answer"), "ray::score", 1, "10.0.0.1")
    assert isinstance(raised.value.__cause__, RayTaskError)
    with pytest.raises(ActorGone) as lost, failures_named("reward/0", "scoring"):
        raise ActorDiedError()
    assert lost.value.__cause__ is None and lost.value.__suppress_context__


def test_failures_named_of_an_input_that_an_actor_found_to_be_wrong_is_the_inputs() -> None:
    wrong = RayTaskError("setup", "", ConfigError("model.path is x; it is y. Mend it."), "ray::setup", 1, "10.0.0.1")
    nested = RayTaskError("setup", "", wrong, "ray::setup", 1, "10.0.0.1")
    for error in (wrong, nested, wrong.as_instanceof_cause()):
        with pytest.raises(ConfigError) as raised, failures_named("learner/0", "setting up"):
            raise error
        assert str(raised.value) == "model.path is x; it is y. Mend it."
        assert not isinstance(raised.value, RayTaskError)


def test_failures_named_leaves_other_errors_alone() -> None:
    with pytest.raises(KeyError), failures_named("reward/0", "scoring"):
        raise KeyError("a bug of our own")


def test_await_all_returns_in_the_order_of_the_calls() -> None:
    async def later(value: int) -> int:
        await asyncio.sleep(0.01 * (3 - value))
        return value

    assert asyncio.run(await_all(5.0, "", {f"learner/{i}": later(i) for i in range(3)})) == [0, 1, 2]


def test_await_all_of_nothing_returns_nothing() -> None:
    assert asyncio.run(await_all(5.0, "", {})) == []


def test_await_all_names_those_that_are_late_alone() -> None:
    calls = {"learner/0": _answer(0.0), "learner/1": _answer(60.0), "learner/2": _answer(60.0)}
    with pytest.raises(
        ActorLate, match=r"^learner/1, learner/2 did not answer within 0\.05 s while training"
    ) as raised:
        asyncio.run(await_all(0.05, "while training", calls))
    assert (raised.value.role, raised.value.replica) == ("learner", 1)


def test_await_all_ends_with_the_first_failure_and_cancels_the_others() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append("cancelled")

    async def run() -> None:
        with pytest.raises(RunError, match="no memory"):
            await await_all(5.0, "", {"learner/0": wait(), "learner/1": _fail(RunError("no memory"))})
        # Before the loop's own end would cancel it.
        await asyncio.sleep(0)
        assert ended == ["cancelled"]

    asyncio.run(run())


@pytest.mark.parametrize(("gone_after_s", "named"), [(0.0, "learner/0"), (0.2, "learner/0"), (60.0, "learner/1")])
def test_await_all_names_the_actor_that_is_gone_before_those_that_failed_of_it(
    monkeypatch: pytest.MonkeyPatch, gone_after_s: float, named: str
) -> None:
    monkeypatch.setattr("maspo_ray.fleet.calls.CULPRIT_S", 1.0)
    closed, gone = ActorFailed.of("learner/1", "connection closed by peer"), ActorGone.of("learner/0", "it died")
    calls: dict[str, Any] = {"learner/1": _fail(closed), "learner/0": _fail(gone, gone_after_s)}
    with pytest.raises(RunError) as raised:
        asyncio.run(await_all(100.0, "", calls))
    assert isinstance(raised.value, ActorGone | ActorFailed) and raised.value.actor == named
