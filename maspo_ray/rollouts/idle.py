"""How much of the time the engines had nothing to do.

Promise: an engine is idle exactly while it has no request outstanding. Pure: the time comes as an argument, in seconds of any
one clock that never goes back.
"""

import math


class IdleMeter:
    """Measures the idle share of `num_engines` engines, numbered from 0, all idle at `now`."""

    def __init__(self, num_engines: int, now: float) -> None:
        assert num_engines >= 1, f"num_engines is {num_engines}; a share needs at least one engine."
        self._outstanding = [0] * num_engines
        self._idle_since = [now] * num_engines
        self._idle_s = [0.0] * num_engines
        self._taken_at = now

    def started(self, engine: int, now: float) -> None:
        """A request was given to the engine."""
        if self._outstanding[engine] == 0:
            self._idle_s[engine] += now - self._idle_since[engine]
        self._outstanding[engine] += 1

    def finished(self, engine: int, now: float) -> None:
        """A request of the engine ended, in whatever way."""
        assert self._outstanding[engine] > 0, f"engine {engine} finished a request; it has none."
        self._outstanding[engine] -= 1
        if self._outstanding[engine] == 0:
            self._idle_since[engine] = now

    def take_idle_share(self, now: float) -> float:
        """Returns the idle share of the time since the last take, mean over engines, and starts anew.

        NaN where no time has passed.
        """
        for engine, outstanding in enumerate(self._outstanding):
            if outstanding == 0:
                self._idle_s[engine] += now - self._idle_since[engine]
                self._idle_since[engine] = now
        wall_s = (now - self._taken_at) * len(self._outstanding)
        idle_s = sum(self._idle_s)
        self._idle_s = [0.0] * len(self._idle_s)
        self._taken_at = now
        return idle_s / wall_s if wall_s > 0 else math.nan
