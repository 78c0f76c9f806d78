"""A run's timeline: what each actor was asked for and when, in the Chrome trace form, and where the time went.

Promise: one event for each span, written when it ends, so that a run that was interrupted has its timeline too. Spans are as the
controller sees them, from its call to the answer; what one actor does at once lies in lanes. What takes less than 10 ms, or
comes after so many events that a viewer would choke, is counted and not drawn.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from time import monotonic
from typing import Any

MIN_DRAWN_S = 0.01
MAX_EVENTS = 200_000
_OWN_LANE = 10_000
"""Below the lanes of what an actor is asked for."""
Event = dict[str, Any]

_encode = json.JSONEncoder(separators=(",", ":")).encode


class _Lanes:
    """The lanes of one actor; the lowest that is free is taken first."""

    __slots__ = ("_num_lanes", "_free")

    def __init__(self) -> None:
        self._num_lanes = 0
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return heappop(self._free)
        self._num_lanes += 1
        return self._num_lanes - 1

    def give_back(self, lane: int) -> None:
        heappush(self._free, lane)


class Timeline:
    """Gathers spans.

    Args:
        write: takes an event of the Chrome trace form.
        clock: seconds, of any clock that never goes back.
    """

    def __init__(self, write: Callable[[Event], None], clock: Callable[[], float] = monotonic) -> None:
        self._write = write
        self._clock = clock
        self._started = clock()
        self._actors: dict[str, int] = {}
        self._lanes: defaultdict[str, _Lanes] = defaultdict(_Lanes)
        self._totals: dict[str, dict[str, float]] = {}
        self._num_events = 0

    def span(self, actor: str, name: str, **details: int) -> "_Span":
        """Takes down what runs within, also where it fails.

        Args:
            actor: such as `rollout/0`; what stands before the slash is its role.
            details: shown by the viewer.
        """
        return _Span(self, actor, name, details)

    def add(self, actor: str, name: str, started: float, ended: float) -> None:
        """Draws what an actor said that it did, by this timeline's clock; it is in no total, being part of what it was asked for."""
        self._draw(actor, name, _OWN_LANE, started, ended, {})

    def _begin(self, actor: str) -> tuple[int, float]:
        return self._lanes[actor].take(), self._clock()

    def _end(self, actor: str, name: str, lane: int, started: float, details: dict[str, int]) -> None:
        self._lanes[actor].give_back(lane)
        ended = self._clock()
        totals = self._totals.setdefault(actor.partition("/")[0], {})
        totals[name] = totals.get(name, 0.0) + ended - started
        self._draw(actor, name, lane, started, ended, details)

    def _draw(self, actor: str, name: str, lane: int, started: float, ended: float, details: dict[str, int]) -> None:
        if ended - started < MIN_DRAWN_S or self._num_events >= MAX_EVENTS:
            return
        self._num_events += 1
        if actor not in self._actors:
            self._actors[actor] = len(self._actors)
            self._write({"ph": "M", "name": "process_name", "pid": self._actors[actor], "args": {"name": actor}})
        event = {"ph": "X", "name": name, "pid": self._actors[actor], "tid": lane}
        microseconds = {
            "ts": round(1e6 * (started - self._started)),
            "dur": round(1e6 * (ended - started)),
        }
        self._write(event | microseconds | ({"args": details} if details else {}))

    def totals(self) -> dict[str, dict[str, float]]:
        """Returns role → name → seconds, over all spans that have ended; those that ran at once count each."""
        return {role: dict(names) for role, names in self._totals.items()}


class _Span:
    __slots__ = ("_timeline", "_actor", "_name", "_details", "_lane", "_started")

    def __init__(self, timeline: Timeline, actor: str, name: str, details: dict[str, int]) -> None:
        self._timeline = timeline
        self._actor = actor
        self._name = name
        self._details = details

    def __enter__(self) -> None:
        self._lane, self._started = self._timeline._begin(self._actor)

    def __exit__(self, *_: object) -> None:
        self._timeline._end(self._actor, self._name, self._lane, self._started, self._details)


class TraceWriter:
    """Writes events as one JSON array; a file that was not closed lacks its last bracket, which trace viewers accept."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._separator = "[\n"

    def write(self, event: Event) -> None:
        self._file.write(self._separator + _encode(event))
        self._separator = ",\n"

    def close(self) -> None:
        self._file.write(("[" if self._separator == "[\n" else "\n") + "]\n")
        self._file.close()
