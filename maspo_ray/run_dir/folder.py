"""RUN_DIR: what a run writes down.

Promise: a line is on its way to the disk when it is written; the folder's columns are those of the design. Decides nothing.
"""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec
import yaml

from maspo_ray.config import RunConfig
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.run_dir.paths import RunPaths
from maspo_ray.run_dir.sinks import (
    JsonlSink,
    JsonlWriter,
    MetricSink,
    TensorBoardSink,
    json_bytes,
    unwritable,
    whole_file,
)
from maspo_ray.run_dir.summary import RunSummary
from maspo_ray.run_dir.timeline import TraceWriter

_ROOM_BYTES = 256 * 2**10
"""Kept free for the summary and the curves of a run that a full disk ends."""


class RunFiles(RunPaths):
    """The open files of one run.

    Raises:
        ConfigError: one of them cannot be opened.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.run_dir)
        self._room = self.path / ".room"
        try:
            self._open(config)
        except OSError as error:
            raise ConfigError(
                f"run_dir is {self.path}; it cannot be written to ({error}). Give one that can."
            ) from error

    def _open(self, config: RunConfig) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._trace = TraceWriter(self.path / "timeline.json") if config.logging.timeline else None
        self._ledger = JsonlWriter(self.path / "ledger.jsonl")
        self._eval = JsonlWriter(self.path / "eval.jsonl")
        self._notes = JsonlWriter(self.path / "notes.jsonl")
        self._metrics: list[MetricSink] = []
        if config.logging.tensorboard:
            self._metrics.append(TensorBoardSink(self.path / "tensorboard"))
        # Last: by these two a folder is known to hold a run.
        self._metrics.append(JsonlSink(self.metrics))
        self.config.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        # Not zeros, which some file systems would keep nowhere.
        self._room.write_bytes(os.urandom(_ROOM_BYTES))

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._metrics:
            try:
                sink.write(step, metrics)
            except OSError as error:
                raise unwritable(self.path, error) from None

    def write_ledger(self, row: Mapping[str, object]) -> None:
        self._ledger.write(row)

    def write_note(self, text: str) -> None:
        self._notes.write({"time": time.time(), "note": text})

    def write_left_out(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Writes the rows of the data that became no prompt, one a line; no file where there are none."""
        if rows:
            with whole_file(self.path / "left_out.jsonl") as partial:
                partial.write_bytes(b"".join(json_bytes(row) + b"\n" for row in rows))

    def write_trace(self, event: str) -> None:
        if self._trace is not None:
            self._trace.write(event)

    def write_eval(self, row: Mapping[str, object]) -> None:
        self._eval.write(row)

    def saved(self) -> tuple[str, ...]:
        """Returns what the folder holds that a user would look for, relative to it."""
        names = [
            "metrics.jsonl",
            "ledger.jsonl",
            "eval.jsonl",
            "left_out.jsonl",
            "timeline.json",
            "curves.png",
            "final",
        ]
        checkpoints = sorted(self.path.glob("checkpoints/step_*"))[-1:]
        found = [self.path / name for name in names if (self.path / name).exists()]
        return tuple(str(path.relative_to(self.path)) for path in found + checkpoints)

    def write_summary(self, summary: RunSummary) -> None:
        with whole_file(self.path / "summary.json") as partial:
            partial.write_bytes(msgspec.json.format(json_bytes(summary), indent=2) + b"\n")

    def close(self) -> None:
        """Closes them, also on a full disk: all but the timeline's last bracket and what TensorBoard has yet to write is there."""
        for file in (*self._metrics, self._ledger, self._eval, self._notes, self._trace):
            if file is not None:
                with suppress(OSError, RunError):
                    file.close()
        self._room.unlink(missing_ok=True)
