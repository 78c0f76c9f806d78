"""A run's folder → `curves.png`, the run at a glance.

Promise: reads only the run's own files; a panel whose columns were never written says "no data". Needs no display.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from maspo_ray.run_dir.sinks import whole_file

_SMOOTH_FROM_STEPS = 20
"""Runs of at least so many steps are drawn with a running mean, since single steps are too noisy to read."""

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class _Panel:
    """One plot: columns of metrics.jsonl and the label of each; without columns, the accuracies of eval.jsonl."""

    title: str
    y_label: str
    columns: Mapping[str, str]
    percent: bool = False


_PANELS = (
    _Panel("Reward", "mean reward", {"reward/mean": "reward"}),
    _Panel("Held-out accuracy", "accuracy", {}, percent=True),
    _Panel("Policy entropy", "nats per token", {"objective/entropy": "entropy"}),
    _Panel("Staleness", "versions behind", {"staleness/max": "max", "staleness/mean": "mean"}),
    _Panel("Objective's gate", "mean gate per token", {"objective/gate_mean": "gate"}),
    _Panel(
        "Waiting",
        "share of wall time",
        {"time/learner_wait_share": "learner waits", "time/rollout_idle_share": "rollout engines idle"},
        percent=True,
    ),
)


def draw_curves(run_dir: Path) -> Path:
    """Draws metrics.jsonl and eval.jsonl of a run; returns the path of its curves.png."""
    path = run_dir / "curves.png"
    with whole_file(path) as partial:
        curves_figure(run_dir).savefig(partial, format="png")
    return path


def curves_figure(run_dir: Path) -> Figure:
    """Returns the figure that `draw_curves` writes."""
    steps = _read_rows(run_dir / "metrics.jsonl")
    evaluations = _read_rows(run_dir / "eval.jsonl")
    window = max(5, len(steps) // 20) if len(steps) >= _SMOOTH_FROM_STEPS else 1
    figure = Figure(figsize=(14, 7.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    reading = f"  (thin: each step; bold: mean of the last {window})" if window > 1 else ""
    figure.suptitle(f"{run_dir.resolve().name}{reading}", fontsize=13)
    for panel, axes in zip(_PANELS, figure.subplots(2, 3).flat, strict=True):
        _label_axes(axes, panel)
        if panel.columns:
            for column, label in panel.columns.items():
                # A maximum is drawn step by step: a running mean would hide the one step that it is there to show.
                _draw_curve(axes, label, _points(steps, column), 1 if column.endswith("/max") else window)
        else:
            for name in dict.fromkeys(str(row["set"]) for row in evaluations):
                _draw_curve(axes, name, _points([row for row in evaluations if row["set"] == name], "accuracy"), 1)
        _finish_axes(axes, panel)
    return figure


def _read_rows(path: Path) -> list[dict[str, object]]:
    """Returns the rows of a JSONL file; none where there is no file. A last line without its end, as a killed run leaves, is skipped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def _points(rows: Sequence[Mapping[str, object]], column: str) -> Points:
    """Returns the steps and values where the column holds a number."""
    pairs = [(row["step"], row.get(column)) for row in rows]
    numbers = [(float(x), float(y)) for x, y in pairs if isinstance(x, (int, float)) and isinstance(y, (int, float))]
    return [x for x, _ in numbers], [y for _, y in numbers]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Returns, for each value, the mean of it and of those before it, `window` in all; at the start of as many as there are."""
    sums = [0.0, *accumulate(values)]
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in range(1, len(sums))]


def _label_axes(axes: Axes, panel: _Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.y_label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: Axes, label: str, points: Points, window: int) -> None:
    steps, values = points
    if not steps:
        return
    marker = "o" if len(steps) < _SMOOTH_FROM_STEPS else None
    if window == 1:
        axes.plot(steps, values, marker=marker, markersize=4, linewidth=1.4, label=label)
        return
    (thin,) = axes.plot(steps, values, alpha=0.3, linewidth=0.9)
    axes.plot(steps, running_mean(values, window), color=thin.get_color(), linewidth=2.0, label=label)


def _finish_axes(axes: Axes, panel: _Panel) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="0.5", fontsize=13)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(_percent_label))
    if len(panel.columns) != 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.0)


def _percent_label(value: float, _position: int | None) -> str:
    return f"{100 * value:.3g} %"
