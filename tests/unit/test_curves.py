"""The picture of a run, by its axes and its file; and the text that a run ends with."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from maspo_ray.run_dir.curves import curves_figure, draw_curves, running_mean
from maspo_ray.run_dir.sinks import json_bytes
from maspo_ray.run_dir.summary import RunSummary, duration_text, percent_text, summary_text

SUMMARY = RunSummary(
    run_dir="runs/quickstart",
    steps=100,
    accuracy_before=0.12,
    accuracy_after=0.412,
    eval_set="heldout",
    reward_first=0.1,
    reward_last=0.4567,
    staleness_mean=0.8,
    staleness_max=1.0,
    max_staleness=1,
    learner_wait_share=0.031,
    rollout_idle_share=0.012,
    groups={"submitted": 1650, "trained": 1600, "filtered": 40, "stale": 6, "failed": 4},
    seconds={"learner": {"wait": 75.0, "train": 600.0}, "rollout": {"generate": 1500.0}, "reward": {"score": 75.0}},
    tokens_generated=1_500_000,
    tokens_trained=1_200_000,
    parity_max=0.00012,
    wall_s=750.0,
    errors=0,
    evaluation_errors=0,
    interrupted=False,
    saved=("final", "curves.png"),
)


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _panels(run_dir: Path) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in curves_figure(run_dir).axes}


def _lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {str(line.get_label()): [(x, y) for x, y in np.asarray(line.get_xydata()).tolist()] for line in axes.lines}


def _says_no_data(axes: Axes) -> bool:
    return [text.get_text() for text in axes.texts] == ["no data"]


def test_curves_columns_are_drawn_in_their_panels(tmp_path: Path) -> None:
    columns = {
        "reward/mean": 0.1,
        "objective/entropy": 0.2,
        "staleness/mean": 0.3,
        "staleness/max": 0.4,
        "objective/gate_mean": 0.5,
        "time/learner_wait_share": 0.6,
        "time/rollout_idle_share": 0.7,
    }
    _write(tmp_path / "metrics.jsonl", [{"step": 1, **columns}, {"step": 2, **columns}])
    _write(
        tmp_path / "eval.jsonl", [{"step": 0, "set": "a", "accuracy": 0.8}, {"step": 0, "set": "b", "accuracy": 0.9}]
    )
    drawn = {
        title: {label: points[-1][1] for label, points in _lines(axes).items()}
        for title, axes in _panels(tmp_path).items()
    }
    assert drawn == {
        "Reward": {"reward": 0.1},
        "Held-out accuracy": {"a": 0.8, "b": 0.9},
        "Policy entropy": {"entropy": 0.2},
        "Staleness": {"max": 0.4, "mean": 0.3},
        "Objective's gate": {"gate": 0.5},
        "Waiting": {"learner waits": 0.6, "rollout engines idle": 0.7},
    }
    assert all(axes.get_xlabel() == "step" and axes.get_ylabel() for axes in _panels(tmp_path).values())


def test_curves_accuracy_has_a_curve_for_each_set(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "set": "easy", "accuracy": 0.1},
        {"step": 0, "set": "hard", "accuracy": 0.0},
        {"step": 20, "set": "easy", "accuracy": 0.5},
    ]
    _write(tmp_path / "eval.jsonl", rows)
    assert _lines(_panels(tmp_path)["Held-out accuracy"]) == {"easy": [(0, 0.1), (20, 0.5)], "hard": [(0, 0.0)]}


def test_curves_missing_column_says_no_data_beside_those_that_are_there(tmp_path: Path) -> None:
    _write(tmp_path / "metrics.jsonl", [{"step": 1, "reward/mean": 0.1, "objective/entropy": None}])
    silent = {title for title, axes in _panels(tmp_path).items() if _says_no_data(axes)}
    assert silent == {"Held-out accuracy", "Policy entropy", "Staleness", "Objective's gate", "Waiting"}


def test_curves_null_is_left_out_of_its_curve(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": s, "objective/entropy": None if s == 2 else s / 10} for s in (1, 2, 3)]
    _write(tmp_path / "metrics.jsonl", rows)
    assert _lines(_panels(tmp_path)["Policy entropy"]) == {"entropy": [(1, 0.1), (3, 0.3)]}


def test_curves_many_steps_are_smoothed_except_maxima(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": s, "reward/mean": float(s % 5), "staleness/max": float(s % 2)} for s in range(1, 41)
    ]
    _write(tmp_path / "metrics.jsonl", rows)
    panels = _panels(tmp_path)
    # Any five steps in a row hold the rewards 0, 1, 2, 3, 4.
    assert [y for _, y in _lines(panels["Reward"])["reward"][4:]] == pytest.approx([2.0] * 36)
    assert len(panels["Reward"].lines) == 2
    assert [y for _, y in _lines(panels["Staleness"])["max"]] == [float(s % 2) for s in range(1, 41)]


def test_curves_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "rew')
    assert _lines(_panels(tmp_path)["Reward"]) == {"reward": [(1, 0.5)]}


def test_curves_empty_run_still_gives_a_picture(tmp_path: Path) -> None:
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    height, width = imread(path).shape[:2]
    assert (width, height) == (1540, 825)
    assert all(_says_no_data(axes) for axes in _panels(tmp_path).values())


def test_running_mean_of_few_values_is_over_those_there_are() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, (1 + 3) / 2, (3 + 5) / 2, (5 + 7) / 2]


def test_summary_text_of_a_finished_run_says_what_it_came_to() -> None:
    assert summary_text(SUMMARY).splitlines() == [
        "Run finished: 100 steps in 12 min 30 s, in runs/quickstart",
        "  accuracy (heldout)  12.0 % → 41.2 % (+29.2 points)",
        "  reward              0.100 → 0.457 (means of the first and the last tenth of the steps)",
        "  groups              1,650 submitted = 1,600 trained + 40 filtered + 6 stale + 4 failed",
        "  staleness           mean 0.80, max 1 versions behind (bound 1)",
        "  waiting             learner 3.1 % of the time, rollout engines 1.2 %",
        # 750 s in all: 600, 75 and what is left.
        "  the time went       train 80.0 %, wait 10.0 %, rest 10.0 %",
        "  at once             2.0 calls to rollout, 0.1 calls to reward",
        "  tokens              1,500,000 generated, 1,200,000 trained (2,000 generated a second)",
        "  parity              largest |Δ log-prob| learner to rollout engine: 0.00012",
        "  saved               final, curves.png",
    ]


def test_summary_text_of_an_interrupted_run_says_so_and_invents_no_number() -> None:
    summary = dataclasses.replace(
        SUMMARY,
        steps=0,
        accuracy_after=None,
        reward_first=math.nan,
        reward_last=math.nan,
        staleness_mean=math.nan,
        staleness_max=math.nan,
        parity_max=math.nan,
        learner_wait_share=math.nan,
        errors=3,
        evaluation_errors=2,
        interrupted=True,
        saved=(),
    )
    text = summary_text(summary)
    assert text.startswith("Run interrupted after 0 steps in 12 min 30 s")
    assert "12.0 % → not measured\n" in text
    assert "not measured → not measured (means" in text
    assert "mean not measured, max not measured versions" in text
    assert "learner not measured of the time" in text
    assert "rollout engine: not measured" in text
    assert (
        "not scored          3 completions of training, 2 of evaluations (errors and timeouts of the reward; left out)"
        in text
    )
    assert text.endswith("saved               nothing")
    assert "nan" not in text


def test_summary_without_an_evaluation_has_no_accuracy() -> None:
    summary = dataclasses.replace(SUMMARY, accuracy_before=None, accuracy_after=None)
    assert "  accuracy (heldout)  not measured\n" in summary_text(summary)


def test_summary_as_json_has_every_field_and_null_for_nan() -> None:
    tree = json.loads(json_bytes(dataclasses.replace(SUMMARY, parity_max=math.nan)))
    assert list(tree) == [field.name for field in dataclasses.fields(RunSummary)]
    assert tree["parity_max"] is None
    assert tree["saved"] == ["final", "curves.png"]
    assert tree["groups"]["filtered"] == 40


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (750, "12 min 30 s"),
        (3600, "1 h 00 min"),
        (11_100, "3 h 05 min"),
    ],
)
def test_duration_text_at_each_scale_reads_as_said(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_percent_text_without_a_number_says_not_measured() -> None:
    assert [percent_text(share) for share in (None, math.nan, 0.0)] == ["not measured", "not measured", "0.0 %"]
