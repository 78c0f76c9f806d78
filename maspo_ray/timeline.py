"""A run's timeline: what each actor was asked for and when, in the Chrome trace form, and where the time went.

Promise: one event for each span, written when it ends, so that a run that was interrupted has its timeline too, and one wherever an
actor is idle between two spans. Spans are as the controller sees them, from its call to the answer; what one actor does at once lies
in lanes. What takes less than 10 ms, or comes after so many events that a viewer would choke, is counted and not drawn.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from time import monotonic

MIN_DRAWN_S = 0.01
MAX_EVENTS = 200_000
_OWN_LANE = 10_000
"""Below the lanes of what an actor is asked for."""


class Timeline:
    """Gathers spans.

    Args:
        write: takes an event of the Chrome trace form, in JSON.
        clock: seconds, of any clock that never goes back.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._write = write
        self._clock = clock
        self._started = clock()
        self._tracks: dict[str, _Track] = {}
        self._totals: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._num_drawn_actors = 0
        self._num_events = 0

    def now(self) -> float:
        """Returns the time by this timeline's clock, for `add`."""
        return self._clock()

    def span(self, actor: str, name: str, **details: int) -> "Span":
        """Takes down what runs within, also where it fails; or what passes from its `begin` to its `end`.

        Args:
            actor: such as `rollout/0`; what stands before the slash is its role.
            name: of letters, digits and dashes.
            details: shown by the viewer.
        """
        return Span(self, self._track(actor), name, details)

    def add(self, actor: str, name: str, started: float, ended: float) -> None:
        """Draws what an actor said that it did, by this timeline's clock; it is in no total, being part of what it was asked for."""
        self._draw(self._track(actor), name, _OWN_LANE, started, ended, {})

    def _track(self, actor: str) -> "_Track":
        track = self._tracks.get(actor)
        if track is None:
            track = self._tracks[actor] = _Track(actor, self._totals[actor.partition("/")[0]])
        return track

    def _draw(
        self, track: "_Track", name: str, lane: int, started: float, ended: float, details: dict[str, int]
    ) -> None:
        if ended - started < MIN_DRAWN_S or self._num_events >= MAX_EVENTS:
            return
        self._num_events += 1
        if track.number is None:
            track.number = self._num_drawn_actors
            self._num_drawn_actors += 1
            self._write(
                json.dumps({"ph": "M", "name": "process_name", "pid": track.number, "args": {"name": track.actor}})
            )
        # By hand: all is numbers and names of this project, and a controller draws very many.
        text = (
            f'{{"ph":"X","name":"{name}","pid":{track.number},"tid":{lane},'
            f'"ts":{round(1e6 * (started - self._started))},"dur":{round(1e6 * (ended - started))}'
        )
        args = ",".join([f'"{key}":{value}' for key, value in details.items()])
        self._write(f'{text},"args":{{{args}}}}}')

    def totals(self) -> dict[str, dict[str, float]]:
        """Returns role → name → seconds, over all spans that have ended; those that ran at once count each."""
        return {role: dict(names) for role, names in self._totals.items() if names}


class _Track:
    """One actor's part of the timeline.

    Attributes:
        totals: name → seconds, of all actors of its role.
        number: in the file; None until something of it is drawn.
        idle_since: when its last span ended, while it has none open; None otherwise, and before its first.
    """

    __slots__ = ("actor", "totals", "number", "idle_since", "_num_lanes", "_free_lanes")

    def __init__(self, actor: str, totals: defaultdict[str, float]) -> None:
        self.actor = actor
        self.totals = totals
        self.number: int | None = None
        self.idle_since: float | None = None
        self._num_lanes = 0
        self._free_lanes: list[int] = []

    def take_lane(self) -> int:
        """Returns the lowest lane that is free, which then is not."""
        if self._free_lanes:
            return heappop(self._free_lanes)
        self._num_lanes += 1
        return self._num_lanes - 1

    def give_back_lane(self, lane: int, now: float) -> None:
        heappush(self._free_lanes, lane)
        if len(self._free_lanes) == self._num_lanes:
            self.idle_since = now


class Span:
    """A call that is under way."""

    __slots__ = ("_timeline", "_track", "_name", "_details", "_lane", "_started")

    def __init__(self, timeline: Timeline, track: _Track, name: str, details: dict[str, int]) -> None:
        self._timeline = timeline
        self._track = track
        self._name = name
        self._details = details

    def begin(self) -> None:
        self._lane = self._track.take_lane()
        self._started = self._timeline._clock()
        if self._track.idle_since is not None:
            self._timeline._draw(self._track, "idle", self._lane, self._track.idle_since, self._started, {})
            self._track.idle_since = None

    def end(self, *_: object) -> None:
        ended = self._timeline._clock()
        self._track.give_back_lane(self._lane, ended)
        self._track.totals[self._name] += ended - self._started
        self._timeline._draw(self._track, self._name, self._lane, self._started, ended, self._details)

    __enter__, __exit__ = begin, end


class TraceWriter:
    """Writes events as one JSON array; a file that was not closed lacks its last bracket, which trace viewers accept."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._separator = "[\n"

    def write(self, event: str) -> None:
        self._file.write(self._separator + event)
        self._separator = ",\n"

    def close(self) -> None:
        self._file.write(("[" if self._separator == "[\n" else "\n") + "]\n")
        self._file.close()
