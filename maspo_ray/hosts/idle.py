"""How much of the time an engine had nothing to do.

Promise: it is idle exactly while it has no completion outstanding. Pure: the time comes as an argument, in seconds of any one clock that
never goes back.
"""


class IdleMeter:
    """Measures the idle time of one engine, which has nothing to do at `now`."""

    def __init__(self, now: float) -> None:
        self._outstanding = 0
        self._idle_since = now
        self._idle_s = 0.0
        self._taken_at = now

    def started(self, now: float, completions: int) -> None:
        """So many completions were asked for."""
        if self._outstanding == 0:
            self._idle_s += now - self._idle_since
            self._idle_since = now
        self._outstanding += completions

    def finished(self, now: float, completions: int) -> None:
        """So many completions ended, sampled or cancelled."""
        assert completions <= self._outstanding, (
            f"{completions} completions ended; {self._outstanding} were outstanding."
        )
        self._outstanding -= completions
        if self._outstanding == 0 and completions:
            self._idle_since = now

    def take(self, now: float) -> tuple[float, float]:
        """Returns the idle seconds since the last take, and all seconds since then; starts anew."""
        if self._outstanding == 0:
            self._idle_s += now - self._idle_since
            self._idle_since = now
        idle_s, of_s = self._idle_s, now - self._taken_at
        self._idle_s, self._taken_at = 0.0, now
        return idle_s, of_s
