"""The reward's host: whatever a user's reward does, each completion gets one verdict, and a failure is never a reward."""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from maspo_ray.experience import Completion, Outcome, Prompt, Verdict
from maspo_ray.hosts.reward_host import RewardHost
from maspo_ray.testing import make_completion, make_prompt

PROMPT = make_prompt("q", "a")
COMPLETIONS = [make_completion("good"), make_completion("bad")]
Score = Callable[[Prompt, Sequence[Completion]], Any]


class SyncReward:
    """Scores by the function that it is given."""

    def __init__(self, function: Score) -> None:
        self._function = function

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Any:
        return self._function(prompt, completions)


class AsyncReward(SyncReward):
    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Any:
        await asyncio.sleep(0)
        return self._function(prompt, completions)


class AwaitableReward(SyncReward):
    """A plain `score` that returns what is still to be awaited, as one that hands the call on does."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Any:
        async def later() -> Any:
            await asyncio.sleep(0)
            return self._function(prompt, completions)

        return later()


KINDS = [SyncReward, AsyncReward, AwaitableReward]


def _scored(reward: type, function: Score, timeout_s: float = 5.0) -> list[Verdict]:
    return asyncio.run(RewardHost(reward, {"function": function}, timeout_s).score(PROMPT, COMPLETIONS))


def _raises(error: BaseException) -> Score:
    def function(prompt: Prompt, completions: Sequence[Completion]) -> Any:
        raise error

    return function


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a hanging reward waits for; a thread that never ends would hold this process back."""
    event = threading.Event()
    yield event
    event.set()


# What the reward gives.


@pytest.mark.parametrize("reward", KINDS)
def test_score_floats_become_verdicts_in_order(reward: type) -> None:
    verdicts = _scored(reward, lambda prompt, completions: [float(c.text == "good") for c in completions])
    assert verdicts == [Verdict(1.0, True), Verdict(0.0, False)]


@pytest.mark.parametrize("reward", KINDS)
def test_score_verdicts_come_out_as_they_are(reward: type) -> None:
    given = (Verdict(0.2, True), Verdict.unscored(Outcome.ERROR, "sandbox is away"))
    first, second = _scored(reward, lambda prompt, completions: given)
    assert (first, second.outcome, second.cause) == (given[0], Outcome.ERROR, "sandbox is away")


def test_score_is_given_the_prompt_and_the_completions() -> None:
    seen = []
    _scored(SyncReward, lambda prompt, completions: seen.append((prompt, completions)) or [0.0, 0.0])
    assert seen == [(PROMPT, COMPLETIONS)]


def test_score_just_above_a_half_is_correct() -> None:
    verdicts = _scored(SyncReward, lambda prompt, completions: [0.51, 0.5])
    assert [verdict.correct for verdict in verdicts] == [True, False]


# Faults cost completions, never the run, and are never a reward.


@pytest.mark.parametrize("reward", KINDS)
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("no\n  such answer"), "ValueError: no such answer"),
        # What math-verify's own deadline raises, and a parser of command lines, is no Exception.
        (BaseException("time is up"), "BaseException: time is up"),
    ],
)
def test_score_that_raises_is_an_error_with_its_cause_in_one_line(
    reward: type, error: BaseException, cause: str
) -> None:
    for verdict in _scored(reward, _raises(error)):
        assert (verdict.outcome, verdict.cause, verdict.correct) == (Outcome.ERROR, cause, False)
        assert math.isnan(verdict.reward)


def test_score_that_exits_the_process_is_an_error() -> None:
    assert [verdict.outcome for verdict in _scored(SyncReward, _raises(SystemExit(2)))] == [Outcome.ERROR] * 2


@pytest.mark.parametrize("reward", KINDS)
def test_score_that_raises_for_one_completion_costs_only_that_one(reward: type) -> None:
    def function(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [1.0 if completion.text == "good" else 1 / 0 for completion in completions]

    good, bad = _scored(reward, function)
    assert good == Verdict(1.0, True)
    assert (bad.outcome, bad.cause) == (Outcome.ERROR, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("reward", KINDS)
@pytest.mark.parametrize(("given", "count"), [([], 0), ([1.0], 1), ([1.0, 0.0, 1.0], 3)])
def test_score_of_a_wrong_count_is_an_error(reward: type, given: list[float], count: int) -> None:
    for verdict in _scored(reward, lambda prompt, completions: given):
        assert verdict.outcome is Outcome.ERROR
        assert verdict.cause == f"ValueError: score returned {count} verdicts for 2 completions"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrap", [float, lambda value: Verdict(value, True)])
def test_score_that_is_no_finite_number_is_an_error_of_that_completion(
    value: float, wrap: Callable[[float], Any]
) -> None:
    if math.isnan(value) and wrap is not float:
        # A verdict of NaN cannot be made at all.
        with pytest.raises(ValueError, match="reward is nan; a scored completion has a number"):
            wrap(value)
        return
    bad, good = _scored(SyncReward, lambda prompt, completions: [wrap(value), 1.0])
    assert (bad.outcome, bad.cause) == (
        Outcome.ERROR,
        f"score returned {value}; raise where a completion cannot be scored",
    )
    assert good == Verdict(1.0, True)


@pytest.mark.parametrize("given", [None, 1.0, ["1", "0"], [None, None]])
def test_score_of_a_wrong_type_is_an_error(given: Any) -> None:
    for verdict in _scored(SyncReward, lambda prompt, completions: given):
        assert verdict.outcome is Outcome.ERROR and verdict.cause is not None
        assert verdict.cause.startswith("TypeError: ")


# The deadline.


def _assert_timed_out(verdicts: list[Verdict], timeout_s: float) -> None:
    assert len(verdicts) == len(COMPLETIONS)
    for verdict in verdicts:
        assert (verdict.outcome, verdict.cause) == (
            Outcome.TIMEOUT,
            f"no verdict within reward.timeout_s ({timeout_s:g} s)",
        )
        assert math.isnan(verdict.reward)


def test_sync_score_that_hangs_is_a_timeout_and_the_next_call_is_scored(released: threading.Event) -> None:
    def function(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        if prompt.text == "q":
            released.wait(30)
        return [1.0 for _ in completions]

    async def calls() -> tuple[list[Verdict], list[Verdict]]:
        host = RewardHost(SyncReward, {"function": function}, 0.2)
        return await host.score(PROMPT, COMPLETIONS), await host.score(make_prompt("r", "a"), COMPLETIONS)

    started = time.monotonic()
    hung, next_ = asyncio.run(_released_after(calls(), released))
    assert time.monotonic() - started < 5
    _assert_timed_out(hung, 0.2)
    assert next_ == [Verdict(1.0, True)] * 2


async def _released_after(calls: Any, released: threading.Event) -> Any:
    try:
        return await calls
    finally:
        released.set()


def test_async_score_that_hangs_is_cancelled_and_the_next_call_is_scored() -> None:
    cancelled = []

    class HangsOnce:
        calls = 0

        async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
            self.calls += 1
            if self.calls == 1:
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    cancelled.append(True)
                    raise
            return [1.0 for _ in completions]

    async def calls() -> tuple[list[Verdict], list[Verdict]]:
        host = RewardHost(HangsOnce, {}, 0.1)
        return await host.score(PROMPT, COMPLETIONS), await host.score(PROMPT, COMPLETIONS)

    hung, next_ = asyncio.run(calls())
    _assert_timed_out(hung, 0.1)
    assert cancelled == [True]
    assert next_ == [Verdict(1.0, True)] * 2


def test_awaitable_of_a_sync_score_has_a_deadline_too() -> None:
    class Hangs:
        def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Any:
            return asyncio.sleep(30)

    _assert_timed_out(asyncio.run(RewardHost(Hangs, {}, 0.1).score(PROMPT, COMPLETIONS)), 0.1)


def test_async_scores_run_together_and_sync_ones_one_after_the_other_beside_the_loop() -> None:
    running, most = 0, 0

    def enter(change: int) -> None:
        nonlocal running, most
        running += change
        most = max(most, running)

    class Async:
        async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
            enter(1)
            await asyncio.sleep(0.05)
            enter(-1)
            return [0.0 for _ in completions]

    def sync(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        assert threading.current_thread() is not threading.main_thread()
        enter(1)
        time.sleep(0.02)
        enter(-1)
        return [0.0 for _ in completions]

    async def four(host: RewardHost) -> list[list[Verdict]]:
        return await asyncio.gather(*(host.score(PROMPT, COMPLETIONS) for _ in range(4)))

    asyncio.run(four(RewardHost(Async, {}, 5.0)))
    assert most == 4
    most = 0
    verdicts = asyncio.run(four(RewardHost(SyncReward, {"function": sync}, 5.0)))
    assert most == 1
    assert {verdict.outcome for scored in verdicts for verdict in scored} == {Outcome.SCORED}


def test_sync_scores_deadline_begins_when_its_turn_does() -> None:
    def function(prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        time.sleep(0.2)
        return [1.0 for _ in completions]

    async def six(host: RewardHost) -> list[list[Verdict]]:
        return await asyncio.gather(*(host.score(PROMPT, COMPLETIONS) for _ in range(6)))

    # The sixth has waited for 1 s when it begins.
    assert asyncio.run(six(RewardHost(SyncReward, {"function": function}, 0.8))) == [[Verdict(1.0, True)] * 2] * 6


# Setting up.


class _SyncSetup:
    def __init__(self, level: float = 0.0) -> None:
        self.level = level

    def setup(self) -> None:
        self.level += 0.25

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [self.level for _ in completions]


class _AsyncSetup(_SyncSetup):
    async def setup(self) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        self.level += 0.25


@pytest.mark.parametrize("reward", [_SyncSetup, _AsyncSetup])
def test_setup_of_either_kind_runs_before_scores_and_args_reach_the_constructor(reward: type) -> None:
    async def call() -> list[Verdict]:
        host = RewardHost(reward, {"level": 0.5}, 5.0)
        await host.setup()
        return await host.score(PROMPT, COMPLETIONS)

    assert [verdict.reward for verdict in asyncio.run(call())] == [0.75, 0.75]


def test_setup_is_optional() -> None:
    asyncio.run(RewardHost(SyncReward, {"function": lambda prompt, completions: []}, 5.0).setup())
