"""Where a run's rows are written: JSON lines and TensorBoard.

Promise: what is undefined is written as null, or left out, never as a 0. Does not decide what is measured.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np

from maspo_ray.errors import RunError


def json_bytes(value: object) -> bytes:
    """Returns the value as JSON: what is not a finite number becomes null, numpy's numbers are numbers, tuples and dataclasses fine."""
    return _ENCODER.encode(value)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


def unwritable(path: Path, error: OSError) -> RunError:
    """Returns how a run ends that cannot write a file of its folder, such as on a full disk."""
    return RunError(
        f"{path} cannot be written ({error.strerror or error}). Make room there, or give a run_dir that has it."
    )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a hidden file to write, which gets its name when all is written: what has the name is whole.

    Raises:
        RunError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise unwritable(path, error) from None


class WholeWriter:
    """Appends pieces to a file: each is in it whole or, where the disk is full, not at all, and on its way to the disk when `write`
    returns."""

    def __init__(self, path: Path, mode: Literal["ab", "wb"]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open(mode, buffering=0)

    def write(self, piece: bytes) -> None:
        """Raises:
        RunError: it cannot be written.
        """
        before = os.fstat(self._file.fileno()).st_size
        left = memoryview(piece)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), before)
            raise unwritable(self._path, error) from None

    def close(self) -> None:
        self._file.close()


class JsonlWriter:
    """Appends one JSON object a line to a file."""

    def __init__(self, path: Path) -> None:
        self._file = WholeWriter(path, "ab")

    def write(self, row: Mapping[str, object]) -> None:
        self._file.write(json_bytes(row) + b"\n")

    def close(self) -> None:
        self._file.close()


class MetricSink(Protocol):
    """Where the metrics of each step go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Writes one line a step: `step`, then the metrics."""

    def __init__(self, path: Path) -> None:
        self._writer = JsonlWriter(path)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert "step" not in metrics, f"metrics of step {step} hold a column `step`; it is the sink's own."
        self._writer.write({"step": step, **metrics})

    def close(self) -> None:
        self._writer.close()


class TensorBoardSink:
    """Writes scalars for TensorBoard; an undefined one is left out of its step."""

    def __init__(self, folder: Path) -> None:
        # Imported here, so that a run without TensorBoard does not wait for it.
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if not math.isnan(value)
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
