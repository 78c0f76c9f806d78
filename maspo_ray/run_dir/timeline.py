"""A run's timeline: the calls to each actor, as events of the Chrome trace format, and the total time of each kind of call.

Promise: a span is a call as the controller sees it, from asking to the answer. Each is written when it ends, so that an interrupted run
has a timeline too, and so is each time that an actor was idle between two spans. Spans of one actor that overlap lie in lanes beneath
each other. Spans under 10 ms, and those after the first 200,000 events, which would choke a viewer, are in the totals but not drawn.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from time import monotonic

from maspo_ray.run_dir.sinks import WholeWriter

MIN_DRAWN_S = 0.01
MAX_EVENTS = 200_000
_OWN_LANE = 10_000
"""Lane of the events that an actor reports of itself; viewers show it below the lanes of calls."""


class Timeline:
    """Collects the spans of all actors.

    Args:
        write: receives each event of the Chrome trace format, as JSON.
        clock: returns seconds, by any clock that never goes back.

    Attributes:
        now: `clock`, for the times that `add` takes.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._write = write
        self.now = clock
        self._started = clock()
        self._tracks: dict[str, Track] = {}
        self._totals: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._num_drawn_actors = 0
        self._num_events = 0

    def track(self, actor: str) -> "Track":
        """Returns an actor's track, the same at every call.

        Args:
            actor: its name, such as `rollout/0`: the role, then the replica.
        """
        track = self._tracks.get(actor)
        if track is None:
            track = self._tracks[actor] = Track(self, actor, self._totals[actor.partition("/")[0]])
        return track

    def span(self, actor: str, name: str, **details: int) -> "Span":
        """Returns `Track.span` of the actor's track."""
        return self.track(actor).span(name, **details)

    def add(self, actor: str, name: str, started: float, ended: float) -> None:
        """Draws an event that an actor reported of itself, such as a pause, in times of this timeline's clock. It is in no total, since it
        lies within a call that is."""
        self.draw(self.track(actor), name, _OWN_LANE, started, ended, {})

    def draw(self, track: "Track", name: str, lane: int, started: float, ended: float, details: dict[str, int]) -> None:
        """Writes an event, unless it is too short or there are too many."""
        if ended - started < MIN_DRAWN_S or self._num_events >= MAX_EVENTS:
            return
        self._num_events += 1
        if track.number is None:
            track.number = self._num_drawn_actors
            self._num_drawn_actors += 1
            self._write(
                json.dumps({"ph": "M", "name": "process_name", "pid": track.number, "args": {"name": track.actor}})
            )
        # Formatted by hand, which is faster than `json.dumps`: a controller draws very many, and no name here needs escaping.
        args = ",".join([f'"{key}":{value}' for key, value in details.items()]) if details else ""
        self._write(
            f'{{"ph":"X","name":"{name}","pid":{track.number},"tid":{lane},"ts":{round(1e6 * (started - self._started))},'
            f'"dur":{round(1e6 * (ended - started))},"args":{{{args}}}}}'
        )

    def totals(self) -> dict[str, dict[str, float]]:
        """Returns role → name → seconds, summed over all spans that have ended; spans that overlap count in full each."""
        return {role: dict(names) for role, names in self._totals.items() if names}


class Track:
    """One actor's part of the timeline.

    Attributes:
        totals: name → seconds, shared by all actors of the role.
        number: the actor's process id in the file; None until its first event is drawn.
        num_lanes: the most spans that were ever open at once.
        free_lanes: heap of the lanes without an open span.
        idle_since: end of the actor's last span; None while a span is open, and before the first.
        past_lanes: end of the last span in each lane of those that are told of once they have ended.
    """

    __slots__ = ("timeline", "actor", "totals", "number", "num_lanes", "free_lanes", "idle_since", "past_lanes")

    def __init__(self, timeline: Timeline, actor: str, totals: defaultdict[str, float]) -> None:
        self.timeline = timeline
        self.actor = actor
        self.totals = totals
        self.number: int | None = None
        self.num_lanes = 0
        self.free_lanes: list[int] = []
        self.idle_since: float | None = None
        self.past_lanes: list[float] = []

    def add_past(self, name: str, started: float, ended: float) -> None:
        """Takes down what another process saw, by this timeline's clock, once it has ended."""
        lane = next((i for i, free_at in enumerate(self.past_lanes) if free_at <= started), len(self.past_lanes))
        self.past_lanes[lane : lane + 1] = [ended]
        self.totals[name] += ended - started
        self.timeline.draw(self, name, lane, started, ended, {})

    def span(self, name: str, **details: int) -> "Span":
        """Returns a span, to be entered as a context manager, or begun and ended by `begin` and `end`. It is recorded also where the call
        fails.

        Args:
            name: of letters, digits and dashes, so that it needs no escaping.
            details: shown by the viewer.
        """
        return Span(self, name, details)


class Span:
    """One call to an actor, drawn in the lowest lane that is free when it begins."""

    __slots__ = ("_track", "_name", "_details", "_lane", "_started")

    def __init__(self, track: Track, name: str, details: dict[str, int]) -> None:
        self._track = track
        self._name = name
        self._details = details

    def begin(self) -> None:
        track = self._track
        self._started = started = track.timeline.now()
        if track.free_lanes:
            self._lane = heappop(track.free_lanes)
        else:
            self._lane = track.num_lanes
            track.num_lanes += 1
        if track.idle_since is not None:
            track.timeline.draw(track, "idle", self._lane, track.idle_since, started, {})
            track.idle_since = None

    def end(self, *_: object) -> None:
        track = self._track
        ended = track.timeline.now()
        heappush(track.free_lanes, self._lane)
        if len(track.free_lanes) == track.num_lanes:
            track.idle_since = ended
        track.totals[self._name] += ended - self._started
        track.timeline.draw(track, self._name, self._lane, self._started, ended, self._details)

    __enter__, __exit__ = begin, end


class TraceWriter:
    """Writes events as one JSON array; a file that was not closed lacks its last bracket, which trace viewers accept."""

    def __init__(self, path: Path) -> None:
        self._file = WholeWriter(path, "wb")
        self._separator = "[\n"

    def write(self, event: str) -> None:
        self._file.write((self._separator + event).encode())
        self._separator = ",\n"

    def close(self) -> None:
        try:
            self._file.write((("[" if self._separator == "[\n" else "\n") + "]\n").encode())
        finally:
            self._file.close()
