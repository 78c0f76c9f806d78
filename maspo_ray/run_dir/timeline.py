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

    Attributes:
        now: the clock, for `add`.
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
        """Returns an actor's part of the timeline, the same at every call.

        Args:
            actor: such as `rollout/0`; what stands before the slash is its role.
        """
        track = self._tracks.get(actor)
        if track is None:
            track = self._tracks[actor] = Track(self, actor, self._totals[actor.partition("/")[0]])
        return track

    def span(self, actor: str, name: str, **details: int) -> "Span":
        """Is `Track.span` of an actor's track."""
        return self.track(actor).span(name, **details)

    def add(self, actor: str, name: str, started: float, ended: float) -> None:
        """Draws what an actor said that it did, by this timeline's clock; it is in no total, being part of what it was asked for."""
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
        # By hand: all is numbers and names of this project, and a controller draws very many.
        args = ",".join([f'"{key}":{value}' for key, value in details.items()]) if details else ""
        self._write(
            f'{{"ph":"X","name":"{name}","pid":{track.number},"tid":{lane},"ts":{round(1e6 * (started - self._started))},'
            f'"dur":{round(1e6 * (ended - started))},"args":{{{args}}}}}'
        )

    def totals(self) -> dict[str, dict[str, float]]:
        """Returns role → name → seconds, over all spans that have ended; those that ran at once count each."""
        return {role: dict(names) for role, names in self._totals.items() if names}


class Track:
    """One actor's part of the timeline.

    Attributes:
        totals: name → seconds, of all actors of its role.
        number: in the file; None until something of it is drawn.
        num_lanes: that were ever needed; free_lanes, those of them that no span has now, as a heap.
        idle_since: when its last span ended, while it has none open; None otherwise, and before its first.
        past_lanes: of spans that are told of once they have ended, when the last span of each ended.
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
        """Takes down what runs within, also where it fails; or what passes from its `begin` to its `end`.

        Args:
            name: of letters, digits and dashes.
            details: shown by the viewer.
        """
        return Span(self, name, details)


class Span:
    """A call that is under way, in the lowest lane of its track that was free."""

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
        self._file = path.open("w", encoding="utf-8")
        self._separator = "[\n"

    def write(self, event: str) -> None:
        self._file.write(self._separator + event)
        self._separator = ",\n"

    def close(self) -> None:
        self._file.write(("[" if self._separator == "[\n" else "\n") + "]\n")
        self._file.close()
