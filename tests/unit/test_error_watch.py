"""The watch over completions that could not be scored."""

import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from maspo_ray.errors import RunError
from maspo_ray.experience import Outcome, Verdict
from maspo_ray.rollouts.error_watch import ErrorWatch

GOOD = Verdict(1.0, True)


def _failed(cause: str = "ValueError: no", outcome: Outcome = Outcome.ERROR) -> Verdict:
    return Verdict.unscored(outcome, cause)


def _add(watch: ErrorWatch, verdict: Verdict, times: int) -> None:
    for _ in range(times):
        watch.add(verdict, "training")


def test_watch_counts_errors_and_timeouts_alike() -> None:
    watch = ErrorWatch(1.0)
    for verdict in (GOOD, _failed(), _failed(outcome=Outcome.TIMEOUT), GOOD):
        watch.add(verdict, "training")
    assert watch.errors == 2


def test_watch_too_large_a_share_stops_the_run_with_the_most_frequent_cause() -> None:
    watch = ErrorWatch(0.1)
    _add(watch, GOOD, 36)
    watch.add(_failed("KeyError: 'first'"), "training")
    _add(watch, _failed("ValueError: later"), 3)  # 4 of 40 is exactly 0.1, which is allowed
    with pytest.raises(RunError) as caught:
        watch.add(_failed("ValueError: later"), "training")
    assert str(caught.value) == (
        "5 of the last 41 completions could not be scored, more than reward.max_error_rate (0.1) allows; the most frequent "
        "cause, 4 of 5, was: ValueError: later. Mend the reward, or raise reward.max_error_rate."
    )


def test_watch_cause_that_has_left_the_window_is_not_named() -> None:
    watch = ErrorWatch(0.1)
    _add(watch, GOOD, 400)
    _add(watch, _failed("OSError: long ago"), 20)
    _add(watch, GOOD, 256)
    _add(watch, _failed("ValueError: now"), 25)  # 25 of 256 is below 0.1
    with pytest.raises(RunError, match="the most frequent cause, 26 of 26, was: ValueError: now"):
        watch.add(_failed("ValueError: now"), "training")


def test_watch_evaluations_faults_are_counted_apart_and_end_no_run() -> None:
    watch = ErrorWatch(0.0)
    for _ in range(300):
        watch.add(_failed("KeyError: 'held-out'"), "evaluation")
    assert (watch.errors, watch.evaluation_errors) == (0, 300)
    # An evaluation's good ones do not thin out training's: 1 of 32 is judged at the 32nd of training.
    watch.add(GOOD, "evaluation")
    _add(watch, GOOD, 31)
    with pytest.raises(RunError, match="^1 of the last 32 .* 1 of 1, was: ValueError: no"):
        watch.add(_failed(), "training")
    assert (watch.errors, watch.evaluation_errors) == (1, 300)


def test_watch_judges_from_the_32nd_completion() -> None:
    watch = ErrorWatch(0.0)
    _add(watch, _failed(), 31)
    with pytest.raises(RunError, match="^32 of the last 32 "):
        watch.add(_failed(), "training")


def test_watch_judges_the_last_256_only() -> None:
    watch = ErrorWatch(0.5)
    _add(watch, GOOD, 128)
    _add(watch, _failed(), 128)  # 128 of 256 is exactly 0.5
    _add(watch, GOOD, 256)  # and gone
    _add(watch, _failed(), 128)
    with pytest.raises(RunError, match="^129 of the last 256 "):
        watch.add(_failed(), "training")
    assert watch.errors == 128 + 128 + 1


def test_watch_rate_of_one_never_stops() -> None:
    watch = ErrorWatch(1.0)
    _add(watch, _failed(), 600)
    assert watch.errors == 600


@example(failures=[True] + [False] * 40, rate=0.0)
@example(failures=[True] * 31 + [False] + [True], rate=0.9)
@given(failures=st.lists(st.booleans(), max_size=600), rate=st.sampled_from([0.0, 0.05, 0.5, 0.9]))
def test_watch_stops_at_the_first_failure_that_makes_the_share_too_large(failures: list[bool], rate: float) -> None:
    def too_many(end: int) -> bool:
        recent = failures[max(0, end - 256) : end]
        return failures[end - 1] and len(recent) >= 32 and sum(recent) / len(recent) > rate

    expected = next((end for end in range(1, len(failures) + 1) if too_many(end)), None)
    watch, stopped = ErrorWatch(rate), None
    for end, failed in enumerate(failures, start=1):
        try:
            watch.add(_failed() if failed else GOOD, "training")
        except RunError:
            stopped = end
            break
    assert stopped == expected


def test_watch_logs_causes_ever_more_rarely_by_purpose(caplog: pytest.LogCaptureFixture) -> None:
    watch = ErrorWatch(1.0)
    with caplog.at_level(logging.WARNING):
        for i in range(1, 10):
            watch.add(_failed(f"cause {i}"), "training")
            watch.add(GOOD, "training")
        for i in range(1, 4):
            watch.add(_failed(f"held-out {i}"), "evaluation")
    assert [record.getMessage() for record in caplog.records] == [
        *(f"completions that could not be scored: {i}; the latest: cause {i}" for i in (1, 2, 4, 8)),
        *(f"completions of evaluations that could not be scored: {i}; the latest: held-out {i}" for i in (1, 2)),
    ]
