"""The timeline: spans with lanes and totals, by a clock in the test's hand; the file as a viewer reads it."""

import asyncio
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.run_dir import timeline
from maspo_ray.run_dir.timeline import Timeline, TraceWriter


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _timeline() -> tuple[Timeline, _Clock, list[dict[str, Any]]]:
    clock, events = _Clock(), []
    return Timeline(lambda event: events.append(json.loads(event)), clock), clock, events


def test_span_is_an_event_from_the_start_of_the_run_in_microseconds() -> None:
    line, clock, events = _timeline()
    clock.now = 100.5
    with line.span("learner/0", "train", step=3):
        clock.now = 102.0
    assert events == [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "learner/0"}},
        {"ph": "X", "name": "train", "pid": 0, "tid": 0, "ts": 500_000, "dur": 1_500_000, "args": {"step": 3}},
    ]


def test_spans_of_an_actor_at_once_lie_in_lanes_that_are_used_again() -> None:
    line, clock, events = _timeline()

    async def work(seconds: float, turns: int) -> None:
        with line.span("rollout/0", "generate"):
            for _ in range(turns):
                await asyncio.sleep(0)
            clock.now += seconds

    async def run() -> None:
        await asyncio.gather(work(1.0, 3), work(1.0, 1))
        await work(1.0, 1)

    asyncio.run(run())
    drawn = [(event["tid"], event["ts"]) for event in events if event["ph"] == "X"]
    # The second ends first, in lane 1; the first in lane 0; the third comes when both are free.
    assert drawn == [(1, 0), (0, 0), (0, 2_000_000)]
    assert line.totals() == {"rollout": {"generate": 1.0 + 2.0 + 1.0}}


def test_an_actor_is_idle_between_its_spans_and_that_is_in_no_total() -> None:
    line, clock, events = _timeline()

    async def work(starts: float, ends: float) -> None:
        while clock.now < starts:
            await asyncio.sleep(0)
        with line.span("rollout/0", "generate"):
            while clock.now < ends:
                await asyncio.sleep(0)

    async def run() -> None:
        async with asyncio.TaskGroup() as tasks:
            for starts, ends in ((101.0, 103.0), (102.0, 105.0), (109.0, 110.0)):
                tasks.create_task(work(starts, ends))
            for second in range(100, 111):
                clock.now = float(second)
                for _ in range(3):
                    await asyncio.sleep(0)

    asyncio.run(run())
    # Not before the first, nor while one of two goes on.
    idle = [(event["ts"], event["dur"], event["tid"]) for event in events if event.get("name") == "idle"]
    assert idle == [(5_000_000, 4_000_000, 0)]
    assert set(line.totals()["rollout"]) == {"generate"}


def test_span_that_fails_is_drawn_and_frees_its_lane() -> None:
    line, clock, events = _timeline()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"), line.span("reward/1", "score"):
            clock.now += 1
            raise ValueError("no")
    assert [event["tid"] for event in events if event["ph"] == "X"] == [0, 0]


def test_short_spans_and_those_beyond_the_limit_are_counted_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_EVENTS", 2)
    line, clock, events = _timeline()
    for seconds in (0.001, 1.0, 1.0, 1.0):
        with line.span("reward/0", "score"):
            clock.now += seconds
    assert sum(event["ph"] == "X" for event in events) == 2
    assert line.totals()["reward"]["score"] == pytest.approx(3.001)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_trace_file_is_one_json_array(tmp_path: Path, count: int) -> None:
    writer = TraceWriter(tmp_path / "timeline.json")
    for i in range(count):
        writer.write(f'{{"ts":{i}}}')
    writer.close()
    assert json.loads((tmp_path / "timeline.json").read_text()) == [{"ts": i} for i in range(count)]


def test_add_is_drawn_in_a_lane_of_its_own_and_in_no_total() -> None:
    line, clock, events = _timeline()
    clock.now = 103.0
    with line.span("rollout/0", "generate"):
        line.add("rollout/0", "paused", 101.0, 102.5)
    drawn = [event for event in events if event.get("name") == "paused"]
    assert [(event["ts"], event["dur"], event["tid"] > 100) for event in drawn] == [(1_000_000, 1_500_000, True)]
    assert line.totals() == {"rollout": {"generate": 0.0}}


@given(st.lists(st.integers(0, 30), max_size=60))
def test_span_takes_the_lowest_lane_that_is_free(choices: list[int]) -> None:
    line, clock, events = _timeline()
    running: list[tuple[AbstractContextManager[None], int]] = []
    expected = []
    for choice in choices:
        clock.now += 1.0
        if choice < len(running):
            span, lane = running.pop(choice)
            span.__exit__(None, None, None)
            expected.append(lane)
        else:
            busy = {lane for _, lane in running}
            running.append((line.span("rollout/0", "generate"), min(set(range(len(busy) + 1)) - busy)))
            running[-1][0].__enter__()
    assert [event["tid"] for event in events if event.get("name") == "generate"] == expected


def test_add_past_is_drawn_by_the_runs_clock_and_counts_in_the_total() -> None:
    line, clock, events = _timeline()
    clock.now = 110.0
    line.track("reward/2").add_past("score", 101.0, 103.5)
    assert events[0]["args"] == {"name": "reward/2"}
    assert events[1:] == [
        {"ph": "X", "name": "score", "pid": 0, "tid": 0, "ts": 1_000_000, "dur": 2_500_000, "args": {}}
    ]
    # Too short to be drawn, it counts all the same.
    line.track("reward/0").add_past("score", 104.0, 104.001)
    assert len(events) == 2
    assert line.totals() == {"reward": {"score": pytest.approx(2.501)}}


def test_add_past_uses_a_lane_again_once_it_is_free() -> None:
    line, _, events = _timeline()
    track = line.track("reward/0")
    for started, ended in ((100.0, 103.0), (101.0, 102.0), (102.0, 105.0), (103.0, 104.0), (103.5, 106.0)):
        track.add_past("score", started, ended)
    drawn = [event["tid"] for event in events if event["ph"] == "X"]
    # The second's lane is free at 102, the first's at 103; at 103.5 both are taken.
    assert drawn == [0, 1, 1, 0, 2]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), max_size=40))
def test_add_past_of_spans_told_of_in_any_order_lets_none_of_a_lane_overlap(spans: list[tuple[int, int]]) -> None:
    line, _, events = _timeline()
    track = line.track("reward/0")
    for started, seconds in spans:
        track.add_past("score", 100.0 + started, 100.0 + started + seconds)
    drawn = [(event["tid"], event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    assert len(drawn) == len(spans)
    by_lane: dict[int, list[tuple[int, int]]] = {}
    for lane, started, ended in drawn:
        by_lane.setdefault(lane, []).append((started, ended))
    for own in by_lane.values():
        own.sort()
        assert all(before[1] <= after[0] for before, after in zip(own, own[1:], strict=False))
    assert sum(line.totals().get("reward", {}).values()) == sum(seconds for _, seconds in spans)
