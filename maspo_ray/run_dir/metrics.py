"""The numbers of a step, and how each is reduced.

Promise: a metric has one reduction for as long as it is added to; what is undefined stays NaN, never a 0. Does not decide what is
measured.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

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
