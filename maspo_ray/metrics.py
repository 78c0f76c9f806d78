"""The numbers of a step: how each is reduced, and where they are written.

Promise: a metric has one reduction for as long as it is added to; what is undefined stays NaN and is written as null, never as
a 0. Does not decide what is measured.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np

Reduction = Literal["mean", "sum", "max", "last"]


@dataclass(slots=True)
class _Accumulator:
    reduction: Reduction
    value: float
    weight: float


class StepMetrics:
    """Gathers values over one step; a new step takes a new one."""

    def __init__(self) -> None:
        self._accumulators: dict[str, _Accumulator] = {}

    def add(self, name: str, value: float, weight: float = 1.0, reduction: Reduction = "mean") -> None:
        """Adds a value to a metric. A NaN makes the metric NaN, unless its weight is 0.

        Args:
            weight: how much the value counts in a mean, e.g. the tokens that it is itself a mean over.
            reduction: the same at every call with this name.
        """
        assert weight >= 0, f"{name} was added with weight {weight}; it must not be negative."
        assert weight == 1 or reduction == "mean", (
            f"{name} was added with weight {weight}; a {reduction} has no weights."
        )
        held = self._accumulators.get(name)
        if held is None:
            start = -math.inf if reduction == "max" else 0.0
            held = self._accumulators[name] = _Accumulator(reduction, start, 0.0)
        assert held.reduction == reduction, f"{name} was added as a {reduction}; it is a {held.reduction}."
        if weight > 0:
            held.value = _fold(reduction, held.value, float(value), weight)
            held.weight += weight

    def add_all(self, name: str, values: Sequence[float]) -> None:
        """Adds each of the values to a mean; nothing where there are none."""
        if values:
            self.add(name, sum(values) / len(values), weight=len(values))

    def reduce(self) -> dict[str, float]:
        """Returns each metric's value, in the order of first addition; a mean over no weight is NaN."""
        return {
            name: (held.value / held.weight if held.weight else math.nan) if held.reduction == "mean" else held.value
            for name, held in self._accumulators.items()
        }


_OVER_UPDATES: Mapping[str, Reduction] = {
    "objective/ratio_max": "max",
    "tokens/trained": "sum",
    "learner/skipped": "sum",
    "learner/lr": "last",
    "time/train_s": "sum",
}


def combine_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of a step from those of its updates: means by their tokens, but for a few that say otherwise."""
    step = StepMetrics()
    for metrics in updates:
        for name, value in metrics.items():
            reduction = _OVER_UPDATES.get(name, "mean")
            step.add(name, value, metrics["tokens/trained"] if reduction == "mean" else 1.0, reduction)
    return step.reduce()


def _fold(reduction: Reduction, held: float, value: float, weight: float) -> float:
    if reduction == "last":
        return value
    if reduction == "max":
        # max() keeps whichever comes first when one side is NaN, which would hide it or not by the order of addition.
        return math.nan if math.isnan(held) or math.isnan(value) else max(held, value)
    return held + value * weight


def json_bytes(value: object) -> bytes:
    """Returns the value as JSON: what is not a finite number becomes null, numpy's numbers are numbers, tuples and dataclasses fine."""
    return _ENCODER.encode(value)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


class JsonlWriter:
    """Appends one JSON object a line to a file; each line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, row: Mapping[str, object]) -> None:
        self._file.write(json_bytes(row) + b"\n")
        self._file.flush()

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
