"""Deadlines of calls to actors."""

import asyncio

import pytest

from maspo_ray.errors import RunError
from maspo_ray.fleet import within


async def _answer(after_s: float) -> int:
    await asyncio.sleep(after_s)
    return 7


def test_within_call_in_time_returns_its_answer() -> None:
    assert asyncio.run(within(5.0, "the step did not end within step_timeout_s", _answer(0.0))) == 7


def test_within_call_that_is_late_ends_by_the_deadline_and_names_it() -> None:
    with pytest.raises(RunError, match=r"^the step did not end within step_timeout_s \(0.05 s\)\."):
        asyncio.run(within(0.05, "the step did not end within step_timeout_s", _answer(60.0)))
