"""What a person sees while a run goes on: a live display on a terminal, plain lines elsewhere, or nothing.

Promise: the first and the last step are always shown, and the terminal is given back whatever ends the run. Measures nothing
but the time that is left.
"""

import math
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from maspo_ray.run_dir.summary import duration_text, percent_text
from maspo_ray.terminal import PatientStream

PLAIN_INTERVAL_S = 2.0

ProgressMode = Literal["auto", "plain", "off"]
Clock = Callable[[], float]


class _Display(Protocol):
    def open(self) -> None: ...

    def note(self, text: str) -> None: ...

    def show(self, step: int, facts: list[str]) -> None: ...

    def close(self) -> None: ...


class Progress:
    """Shows how a run goes; a context manager.

    Args:
        mode: "auto" is live where `stream` is a terminal that can redraw and plain elsewhere; "off" shows nothing.
        clock: seconds that never go back.
    """

    def __init__(self, total_steps: int, mode: ProgressMode, stream: TextIO, clock: Clock = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._display = _make_display(total_steps, mode, cast(TextIO, PatientStream(stream)), clock)
        self._accuracy: float | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._display.close()

    def note(self, text: str) -> None:
        """Shows a line that stays, such as `starting rollout actor 1/2`."""
        self._display.note(text)

    def evaluated(self, step: int, accuracy: float, versions: tuple[int, int]) -> None:
        """Shows a held-out accuracy, and keeps it beside the steps that follow.

        Args:
            versions: the oldest and the newest weights that it is of.
        """
        self._accuracy = accuracy
        over = f" (versions {versions[0]} to {versions[1]})" if versions[0] < versions[1] else ""
        self._display.note(f"held-out accuracy after step {step}{over}: {percent_text(accuracy)}")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step that is done; of `metrics`, the columns of metrics.jsonl, what is there and not NaN."""
        facts = _facts(metrics, self._accuracy)
        left_s = self._seconds_left(step)
        self._display.show(step, facts if left_s is None else [*facts, f"{duration_text(left_s)} left"])

    def _seconds_left(self, step: int) -> float | None:
        """Returns the time that the steps to come take if they take what those since the first update took."""
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if not first_step < step < self._total_steps:
            return None
        return (now - first_time) / (step - first_step) * (self._total_steps - step)


def _make_display(total_steps: int, mode: ProgressMode, stream: TextIO, clock: Clock) -> _Display:
    if mode == "off":
        return _NoDisplay()
    # A terminal of another encoding lacks the characters of a bar.
    can_draw = (stream.encoding or "utf-8").lower().replace("-", "") == "utf8" and os.environ.get("TERM") != "dumb"
    if mode == "auto" and stream.isatty() and can_draw:
        return _LiveDisplay(total_steps, stream, clock)
    return _PlainDisplay(total_steps, stream, clock)


def _facts(metrics: Mapping[str, float], accuracy: float | None) -> list[str]:
    step_s = metrics.get("time/step_s", math.nan)
    tokens_per_s = metrics.get("tokens/generated", math.nan) / step_s if step_s > 0 else math.nan
    named = [
        (metrics.get("reward/mean", math.nan), "reward {:.3f}"),
        (math.nan if accuracy is None else 100 * accuracy, "held-out {:.1f} %"),
        (metrics.get("staleness/mean", math.nan), "staleness {:.2f}"),
        (tokens_per_s, "{:,.0f} tokens/s"),
    ]
    return [text.format(value) for value, text in named if not math.isnan(value)]


class _NoDisplay:
    def open(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def show(self, step: int, facts: list[str]) -> None:
        pass

    def close(self) -> None:
        pass


class _PlainDisplay:
    """One line a step, at most one in `PLAIN_INTERVAL_S`; a line held back is written if nothing follows it."""

    def __init__(self, total_steps: int, stream: TextIO, clock: Clock) -> None:
        self._total_steps = total_steps
        self._stream = stream
        self._clock = clock
        self._written_at = -math.inf
        self._held_back: str | None = None

    def open(self) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def show(self, step: int, facts: list[str]) -> None:
        self._held_back = "  ".join([f"step {step}/{self._total_steps}", *facts])
        if step == self._total_steps or self._clock() - self._written_at >= PLAIN_INTERVAL_S:
            self._write_held_back()

    def close(self) -> None:
        self._write_held_back()

    def _write_held_back(self) -> None:
        if self._held_back is not None:
            self.note(self._held_back)
            self._held_back = None
            self._written_at = self._clock()


class _LiveDisplay:
    """A bar and a line of facts that stay at the bottom of the terminal; notes scroll above them."""

    def __init__(self, total_steps: int, stream: TextIO, clock: Clock) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._opened_at = clock()
        self._step = 0
        self._facts: list[str] = []
        self._spinner = Spinner("dots")
        self._console = Console(file=stream, force_terminal=True)
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)

    def open(self) -> None:
        self._live.start(refresh=True)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def show(self, step: int, facts: list[str]) -> None:
        self._step, self._facts = step, facts

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 1))
        row.add_row(
            self._spinner if self._step < self._total_steps else Text("✓"),
            Text(f"step {self._step}/{self._total_steps}"),
            ProgressBar(total=self._total_steps, completed=self._step, width=30),
            Text(duration_text(self._clock() - self._opened_at)),
        )
        return Group(row, Text("  " + "  ".join(self._facts), style="cyan"))
