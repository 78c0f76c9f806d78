"""The numbers of a step, and how each is reduced.

Promise: a metric has one reduction for as long as it is added to; what is undefined stays NaN, never a 0; a column that is declared is
in every row, whether or not anything happened. Does not decide what is measured.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["mean", "sum", "max", "last"]

STEP_COLUMNS: Mapping[str, Reduction] = {
    "reward/mean": "mean",
    "reward/accuracy": "mean",
    "reward/overlong_penalty": "mean",
    "completion/tokens_mean": "mean",
    "completion/cut_off_share": "mean",
    "completion/left_out_share": "mean",
    "groups/cancelled": "sum",
    "staleness/mean": "mean",
    "staleness/max": "max",
    "staleness/over_bound_share": "mean",
}
"""What the groups of a step add to its row. A step in which a thing did not happen has the column nevertheless: a sum of nothing
is 0, any other reduction of nothing is NaN."""


def source_columns(sources: Iterable[str]) -> dict[str, Reduction]:
    """Returns what the groups of each source of a mix add to a step's row: how many were scored, and their means."""
    columns: dict[str, Reduction] = {}
    for source in sources:
        columns |= {
            f"source/{source}/groups": "sum",
            f"source/{source}/reward": "mean",
            f"source/{source}/accuracy": "mean",
        }
    return columns


@dataclass(slots=True)
class _Accumulator:
    reduction: Reduction
    value: float
    weight: float

    def result(self) -> float:
        if self.reduction == "sum":
            return self.value
        if not self.weight:
            return math.nan
        return self.value / self.weight if self.reduction == "mean" else self.value


class StepMetrics:
    """Gathers values over one step; a new step takes a new one.

    Args:
        columns: are there whatever is added, and come first.
    """

    def __init__(self, columns: Mapping[str, Reduction] | None = None) -> None:
        self._accumulators: dict[str, _Accumulator] = {}
        for name, reduction in (columns or {}).items():
            self.add(name, math.nan, 0.0, reduction)

    def add(self, name: str, value: float, weight: float = 1.0, reduction: Reduction = "mean") -> None:
        """Adds a value to a metric. A NaN makes the metric NaN, unless its weight is 0.

        Args:
            weight: how much the value counts in a mean, e.g. the tokens that it is itself a mean over. At 0 it does not count in any
                reduction, and the column is there.
            reduction: the same at every call with this name.
        """
        assert weight >= 0, f"{name} was added with weight {weight}; it must not be negative."
        assert weight in (0, 1) or reduction == "mean", (
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
        """Returns each metric's value, in the order of first addition; of nothing a sum is 0, all else NaN."""
        return {name: held.result() for name, held in self._accumulators.items()}


_OVER_UPDATES: Mapping[str, Reduction] = {
    "objective/ratio_max": "max",
    "tokens/trained": "sum",
    "learner/skipped": "sum",
    "learner/lr": "last",
    "time/train_s": "sum",
}
"""How a step's value is made of its updates'; the rest are means."""

_OF_AN_UPDATE = frozenset({"learner/grad_norm", "learner/clipped_share", "learner/update_to_weight"})
"""In a mean over updates each of these counts once; the rest are means over tokens, and count by how many there were."""


def combine_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of a step from those of its updates.

    An update that was left out counts in sums and for the learning rate alone: its means and its maximum are undefined. So they are
    NaN for a step that has no other update.
    """
    step = StepMetrics()
    for metrics in updates:
        applied = 1.0 - metrics.get("learner/skipped", 0.0)
        for name, value in metrics.items():
            reduction = _OVER_UPDATES.get(name, "mean")
            weight = 1.0
            if reduction == "max" or name in _OF_AN_UPDATE:
                weight = applied
            elif reduction == "mean":
                weight = metrics["tokens/trained"]
            step.add(name, value, weight, reduction)
    return step.reduce()


def without_lags_above(max_lag: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics without those of lags that no token of the run can have, `…/lag_3` for the third."""
    return {name: value for name, value in metrics.items() if _lag_of(name) <= max_lag}


def _lag_of(name: str) -> int:
    _, found, lag = name.partition("/lag_")
    return int(lag) if found else 0


def _fold(reduction: Reduction, held: float, value: float, weight: float) -> float:
    if reduction == "last":
        return value
    if reduction == "max":
        # max() keeps whichever comes first when one side is NaN, which would hide it or not by the order of addition.
        return math.nan if math.isnan(held) or math.isnan(value) else max(held, value)
    return held + value * weight
