"""One observer of a run: what happens is told to it, and it passes it on to files, trackers and the terminal.

Promise: a row is written when it is told; nothing that it is told changes the run. Measures nothing but how long the run waits.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from maspo_ray.config import RunConfig
from maspo_ray.experience import Parity
from maspo_ray.run_dir.curves import draw_curves
from maspo_ray.run_dir.folder import RunFiles
from maspo_ray.run_dir.history import RunHistory
from maspo_ray.run_dir.progress import Progress
from maspo_ray.run_dir.summary import RunSummary
from maspo_ray.run_dir.timeline import Timeline
from maspo_ray.run_dir.waits import Waits


class Journal:
    """A context manager, within which the terminal shows how the run goes.

    Args:
        clock: seconds that never go back.

    Attributes:
        timeline: takes spans.

    Raises:
        ConfigError: the run's folder cannot be written to.
    """

    def __init__(self, config: RunConfig, stream: TextIO | None = None, clock: Callable[[], float] = monotonic) -> None:
        self._draws_curves = config.logging.curves
        self.files = RunFiles(config)
        self.timeline = Timeline(self.files.write_trace, clock)
        self._history = RunHistory(config)
        self._progress = Progress(config.pipeline.steps, config.logging.progress, stream or sys.stdout)
        self._waits = Waits()
        self._clock = clock

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def note(self, text: str) -> None:
        """Shows a line that stays, and keeps it."""
        self._progress.note(text)
        self.files.write_note(text)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        """A step is done; `row` has its columns of metrics.jsonl."""
        self._history.step(row)
        self._waits.step(row["time/step_s"])
        self.files.write_metrics(step, row)
        self._progress.update(step, row)

    def ledger(self, row: Mapping[str, object]) -> None:
        """A group's life has ended."""
        self.files.write_ledger(row)

    def evaluation(self, step: int, accuracy: float, versions: tuple[int, int], row: Mapping[str, object]) -> None:
        """The evaluation after a step is done; `row` has its columns of eval.jsonl.

        Args:
            versions: the oldest and the newest weights that it is of.
        """
        self.files.write_eval(row)
        self._history.accuracy(accuracy)
        self._progress.evaluated(step, accuracy, versions)

    def parity(self, parity: Parity) -> None:
        """Learner and engines were compared."""
        self._history.parity(parity.max)

    @contextmanager
    def waiting(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Within, the run waits for something; `say_long_waits` says so where it takes long.

        Args:
            what: follows "waiting for … s for"; where it is called, it says what is waited for as it then stands.
        """
        number = self._waits.begin((lambda: what) if isinstance(what, str) else what, self._clock())
        try:
            yield
        finally:
            self._waits.end(number)

    def say_long_waits(self) -> None:
        """Notes what the run has waited for longer than a few typical steps."""
        for line in self._waits.to_say(self._clock()):
            self.note(line)

    def close(self) -> None:
        """Closes the files; `draw` and `summarise` can follow."""
        self.files.close()

    def draw(self) -> None:
        """Draws the curves, unless the config says not to."""
        if self._draws_curves:
            draw_curves(self.files.path)

    def summarise(
        self, *, groups: dict[str, int], errors: int, evaluation_errors: int, interrupted: bool, failure: str | None
    ) -> RunSummary:
        """Returns what the run has come to; to be written by `files.write_summary`.

        Args:
            errors: completions of training that could not be scored; evaluation_errors, of evaluations.
            failure: why it could not go on, None where it could.
        """
        return self._history.summary(
            groups=groups,
            seconds=self.timeline.totals(),
            errors=errors,
            evaluation_errors=evaluation_errors,
            interrupted=interrupted,
            saved=self.files.saved(),
            failure=failure,
        )
