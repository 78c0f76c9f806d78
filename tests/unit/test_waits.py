"""Which waits are said, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.run_dir.waits import Waits


def _waits(*step_s: float) -> Waits:
    waits = Waits()
    for seconds in step_s:
        waits.step(seconds)
    return waits


@pytest.mark.parametrize(
    ("step_s", "patience_s"),
    # At least 30 s; three times the median of the last 20 steps.
    [
        ([], 30.0),
        ([1.0, 2.0], 30.0),
        ([20.0], 60.0),
        ([20.0, 1000.0, 30.0], 90.0),
        ([1000.0] * 21 + [20.0] * 20, 60.0),
    ],
)
def test_wait_is_said_after_three_typical_steps_and_30_seconds_at_least(step_s: list[float], patience_s: float) -> None:
    waits = _waits(*step_s)
    waits.begin(lambda: "a batch", now=100.0)
    assert waits.to_say(100.0 + patience_s - 0.1) == []
    assert waits.to_say(100.0 + patience_s) == [f"waiting for {patience_s:.0f} s for a batch"]


def test_wait_is_said_again_each_time_it_has_doubled() -> None:
    waits = _waits()
    waits.begin(lambda: "a batch", now=0.0)
    said = [now for now in range(0, 300, 5) if waits.to_say(float(now))]
    assert said == [30, 60, 120, 240]


def test_wait_that_is_looked_at_late_doubles_from_there() -> None:
    waits = _waits()
    waits.begin(lambda: "a batch", now=0.0)
    assert waits.to_say(50.0) == ["waiting for 50 s for a batch"]
    assert waits.to_say(99.0) == []
    assert waits.to_say(100.0) == ["waiting for 100 s for a batch"]


def test_wait_says_what_it_waits_for_as_it_stands_when_it_is_said() -> None:
    waits, left = _waits(), [3]
    waits.begin(lambda: f"{left[0]} groups", now=0.0)
    assert waits.to_say(30.0) == ["waiting for 30 s for 3 groups"]
    left[0] = 1
    assert waits.to_say(60.0) == ["waiting for 60 s for 1 groups"]


def test_wait_that_has_ended_is_not_said_and_another_begins_anew() -> None:
    waits = _waits()
    first, second = waits.begin(lambda: "the first", now=0.0), waits.begin(lambda: "the second", now=20.0)
    assert waits.to_say(40.0) == ["waiting for 40 s for the first"]
    waits.end(first)
    assert waits.to_say(100.0) == ["waiting for 80 s for the second"]
    waits.end(second)
    assert waits.to_say(1000.0) == []
    waits.begin(lambda: "the third", now=1000.0)
    assert waits.to_say(1029.0) == []
    assert waits.to_say(1030.0) == ["waiting for 30 s for the third"]


def test_wait_ended_twice_is_refused() -> None:
    waits = _waits()
    number = waits.begin(lambda: "a batch", now=0.0)
    waits.end(number)
    with pytest.raises(KeyError):
        waits.end(number)


@given(
    begins=st.lists(st.integers(0, 100), min_size=1, max_size=5),
    looks=st.lists(st.integers(0, 4000), min_size=1, max_size=40),
)
def test_waits_each_is_said_at_most_once_a_doubling(begins: list[int], looks: list[int]) -> None:
    waits = _waits()
    for i, began in enumerate(begins):
        waits.begin(lambda i=i: f"<{i}>", now=float(began))  # type: ignore[misc]
    said: dict[int, list[int]] = {i: [] for i in range(len(begins))}
    for now in sorted(look + 100 for look in looks):
        lines = waits.to_say(float(now))
        for i, began in enumerate(begins):
            waited = now - began
            due = waited >= (2 * said[i][-1] if said[i] else 30)
            assert any(f"<{i}>" in line for line in lines) == due
            if due:
                said[i].append(waited)
