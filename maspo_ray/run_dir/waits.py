"""What a run waits for, and which waits have lasted long enough to be said.

Promise: a wait that is longer than a few typical steps is said once, and again each time it has doubled. A pure state machine: the time
comes as an argument, in seconds of any one clock that never goes back.
"""

from collections import deque
from collections.abc import Callable
from statistics import median

_TYPICAL_STEPS = 3
_SHORTEST_S = 30.0
_STEPS = 20


class Waits:
    """Keeps the waits that are open."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Callable[[], str], float]] = {}
        self._say_after: dict[int, float] = {}
        self._num_begun = 0
        self._step_s: deque[float] = deque(maxlen=_STEPS)

    def begin(self, what: Callable[[], str], now: float) -> int:
        """Opens a wait; returns its number.

        Args:
            what: says what is waited for, as it stands when it is asked.
        """
        self._num_begun += 1
        self._open[self._num_begun] = (what, now)
        return self._num_begun

    def end(self, number: int) -> None:
        del self._open[number]
        self._say_after.pop(number, None)

    def step(self, seconds: float) -> None:
        """A step took so long."""
        self._step_s.append(seconds)

    @property
    def patience_s(self) -> float:
        """How long a wait may last without being said."""
        return max(_SHORTEST_S, _TYPICAL_STEPS * median(self._step_s) if self._step_s else 0.0)

    def to_say(self, now: float) -> list[str]:
        """Returns a line for each wait that is to be said now."""
        lines = []
        for number, (what, since) in self._open.items():
            waited_s = now - since
            if waited_s >= self._say_after.get(number, self.patience_s):
                self._say_after[number] = 2 * waited_s
                lines.append(f"waiting for {waited_s:.0f} s for {what()}")
        return lines
