"""Reductions by hand, files read back, and the idle time by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.hosts.idle import IdleMeter
from maspo_ray.run_dir.metrics import STEP_COLUMNS, StepMetrics, combine_updates, without_lags_above
from maspo_ray.run_dir.sinks import JsonlSink, JsonlWriter, TensorBoardSink, json_bytes


def test_metrics_mean_is_weighted() -> None:
    metrics = StepMetrics()
    metrics.add("gate", 1.0, weight=3)
    metrics.add("gate", 0.5, weight=1)
    assert metrics.reduce() == {"gate": (3 * 1.0 + 1 * 0.5) / 4}


def test_metrics_each_reduction_does_as_it_says() -> None:
    metrics = StepMetrics()
    for value in (2.0, 5.0, 3.0):
        metrics.add("mean", value)
        metrics.add("sum", value, reduction="sum")
        metrics.add("max", value, reduction="max")
        metrics.add("last", value, reduction="last")
    assert metrics.reduce() == {"mean": 10 / 3, "sum": 10.0, "max": 5.0, "last": 3.0}


def test_metrics_max_of_negative_values_is_negative() -> None:
    metrics = StepMetrics()
    metrics.add("low", -2.0, reduction="max")
    assert metrics.reduce() == {"low": -2.0}


def test_metrics_mean_over_no_weight_is_nan_and_adds_nothing_to_others() -> None:
    metrics = StepMetrics()
    metrics.add("gate", math.nan, weight=0)
    assert math.isnan(metrics.reduce()["gate"])
    metrics.add("gate", 0.5, weight=2)
    assert metrics.reduce() == {"gate": 0.5}


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max"])
def test_metrics_nan_is_never_hidden(values: tuple[float, float], reduction: str) -> None:
    metrics = StepMetrics()
    for value in values:
        metrics.add("x", value, reduction=reduction)  # type: ignore[arg-type]
    assert math.isnan(metrics.reduce()["x"])


def test_metrics_second_reduction_of_a_name_is_refused() -> None:
    metrics = StepMetrics()
    metrics.add("tokens", 3.0, reduction="sum")
    with pytest.raises(AssertionError, match="tokens was added as a mean; it is a sum"):
        metrics.add("tokens", 3.0)


def test_metrics_weight_of_a_sum_is_refused() -> None:
    with pytest.raises(AssertionError, match="a sum has no weights"):
        StepMetrics().add("tokens", 3.0, weight=2, reduction="sum")


def test_metrics_declared_columns_are_there_whatever_happened_counts_as_0_and_the_rest_undefined() -> None:
    metrics = StepMetrics(STEP_COLUMNS)
    nothing = metrics.reduce()
    assert list(nothing) == list(STEP_COLUMNS)
    counts = {"groups/cancelled"}
    assert {name for name, value in nothing.items() if value == 0} == counts
    assert all(math.isnan(value) for name, value in nothing.items() if name not in counts)
    metrics.add("groups/cancelled", 1, reduction="sum")
    metrics.add("staleness/max", 0, reduction="max")
    metrics.add_all("reward/mean", [0.25, 0.75])
    something = metrics.reduce()
    assert list(something) == list(STEP_COLUMNS)
    assert (something["groups/cancelled"], something["staleness/max"], something["reward/mean"]) == (1, 0, 0.5)


@pytest.mark.parametrize("reduction", ["mean", "max", "last"])
def test_metrics_reduction_of_nothing_is_nan(reduction: str) -> None:
    metrics = StepMetrics()
    metrics.add("x", 3.0, 0.0, reduction)  # type: ignore[arg-type]
    assert math.isnan(metrics.reduce()["x"])


def test_jsonl_sink_writes_a_line_a_step_and_null_for_nan(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"version": 1, "reward/mean": 0.25, "parity/max": math.nan})
    # Read before it is closed: a run that is killed has its lines.
    assert path.read_text() == '{"step":1,"version":1,"reward/mean":0.25,"parity/max":null}\n'
    sink.write(2, {"reward/mean": math.inf})
    sink.close()
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {"step": 2, "reward/mean": None}


def test_jsonl_sink_column_named_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the sink's own"):
        JsonlSink(tmp_path / "metrics.jsonl").write(1, {"step": 2.0})


def test_jsonl_writer_opened_again_goes_on_after_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    for step in (0, 1):
        writer = JsonlWriter(path)
        writer.write({"step": step, "set": "prüfung"})
        writer.close()
    assert path.read_text(encoding="utf-8") == '{"step":0,"set":"prüfung"}\n{"step":1,"set":"prüfung"}\n'


def test_json_has_null_for_nan_wherever_it_is_and_numpy_numbers_as_numbers() -> None:
    value = {
        "a": [1, math.nan, {"b": (-math.inf, "x")}],
        "c": np.float64("nan"),
        "d": np.float32(0.5),
        "e": np.int64(7),
    }
    assert json.loads(json_bytes(value)) == {"a": [1, None, {"b": [None, "x"]}], "c": None, "d": 0.5, "e": 7}
    with pytest.raises(TypeError, match="PosixPath has no form in JSON"):
        json_bytes({"path": Path("/")})


def test_tensorboard_sink_scalars_are_read_back_without_nan(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.write(1, {"reward/mean": 0.25, "parity/max": math.nan})
    sink.write(2, {"reward/mean": 0.5, "parity/max": 0.125})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("parity/max")] == [(2, 0.125)]


def test_idle_time_of_an_engine_with_one_request_is_the_rest_of_the_time() -> None:
    meter = IdleMeter(now=100.0)
    meter.started(102.0, 1)
    meter.finished(107.0, 1)
    # Idle 100-102 and 107-110, of 10 s.
    assert meter.take(now=110.0) == (2 + 3, 10)


def test_idle_time_with_overlapping_requests_counts_none_outstanding_only() -> None:
    meter = IdleMeter(now=0.0)
    meter.started(1.0, 2)
    meter.started(2.0, 1)
    meter.finished(3.0, 1)
    meter.finished(6.0, 2)
    # Busy 1-6, of 8 s.
    assert meter.take(now=8.0) == (1 + 2, 8)


def test_idle_time_second_take_counts_from_the_first() -> None:
    meter = IdleMeter(now=0.0)
    assert meter.take(now=10.0) == (10, 10)
    meter.started(11.0, 1)
    assert meter.take(now=11.5) == (1, 1.5)
    meter.finished(12.0, 1)
    # Busy 11.5-12, idle 12-14.
    assert meter.take(now=14.0) == (2, 2.5)
    assert meter.take(now=14.0) == (0, 0)


@pytest.mark.parametrize("nothing", ["started", "finished"])
def test_idle_time_is_not_counted_twice_where_nothing_is_asked_for_or_ends(nothing: str) -> None:
    meter = IdleMeter(now=0.0)
    getattr(meter, nothing)(3.0, 0)
    assert meter.take(now=4.0) == (4, 4)


@given(st.lists(st.tuples(st.sampled_from(["started", "finished", "take"]), st.integers(1, 3)), max_size=30))
def test_idle_time_of_any_takes_adds_up_to_the_time_without_work(events: list[tuple[str, int]]) -> None:
    meter, outstanding, now = IdleMeter(now=0.0), 0, 0.0
    idle_s, of_s, expected_s = 0.0, 0.0, 0.0
    for kind, count in [*events, ("take", 1)]:
        now += count
        expected_s += count if outstanding == 0 else 0.0
        if kind == "take":
            taken_idle_s, taken_of_s = meter.take(now)
            idle_s, of_s = idle_s + taken_idle_s, of_s + taken_of_s
        elif kind == "started":
            meter.started(now, count)
            outstanding += count
        elif count <= outstanding:
            meter.finished(now, count)
            outstanding -= count
    assert (idle_s, of_s) == (expected_s, now)


def test_idle_meter_finish_without_start_is_refused() -> None:
    meter = IdleMeter(now=0.0)
    meter.started(0.0, 1)
    with pytest.raises(AssertionError, match="2 completions ended; 1 were outstanding"):
        meter.finished(1.0, 2)


def test_combine_updates_weighs_means_by_tokens() -> None:
    # (1 · 30 + 5 · 10) / 40 = 2
    assert combine_updates([_update(1.0, 30.0, lr=0.1), _update(5.0, 10.0, ratio_max=1.5)]) == {
        "loss": 2.0,
        "tokens/trained": 40.0,
        "objective/ratio_max": 2.0,
        "learner/clipped_share": 0.0,
        "learner/lr": 0.2,
        "learner/skipped": 0.0,
        "time/train_s": 6.0,
    }


def _update(
    loss: float, tokens: float, ratio_max: float = 2.0, clipped: float = 0.0, lr: float = 0.2
) -> dict[str, float]:
    return {
        "loss": loss,
        "tokens/trained": tokens,
        "objective/ratio_max": ratio_max,
        "learner/clipped_share": clipped,
        "learner/lr": lr,
        "learner/skipped": 0.0,
        "time/train_s": 3.0,
    }


SKIPPED = dict.fromkeys(_update(0.0, 0.0), math.nan) | {
    "tokens/trained": 0.0,
    "learner/lr": 0.3,
    "learner/skipped": 1.0,
    "time/train_s": 3.0,
}


def test_combine_updates_clipped_share_is_of_the_updates_applied_each_counting_once() -> None:
    updates = [_update(1.0, 30.0, clipped=1.0), SKIPPED, _update(1.0, 10.0), _update(1.0, 10.0), _update(1.0, 50.0)]
    assert combine_updates(updates)["learner/clipped_share"] == 0.25


def test_combine_updates_one_that_was_left_out_is_counted_and_spoils_nothing() -> None:
    learned = combine_updates([_update(1.0, 30.0), SKIPPED, SKIPPED])
    assert learned == _update(1.0, 30.0) | {"learner/lr": 0.3, "learner/skipped": 2.0, "time/train_s": 9.0}


def test_combine_updates_that_were_all_left_out_leave_counts_and_undefined_figures_by_the_same_names() -> None:
    learned = combine_updates([SKIPPED, SKIPPED])
    assert list(learned) == list(_update(1.0, 30.0))
    known = {"tokens/trained": 0.0, "learner/lr": 0.3, "learner/skipped": 2.0, "time/train_s": 6.0}
    assert {name: value for name, value in learned.items() if not math.isnan(value)} == known


def test_lags_that_no_token_can_have_are_left_out() -> None:
    row = {
        "loss": 1.0,
        "objective/entropy/lag_0": 2.0,
        "objective/entropy/lag_2": 3.0,
        "objective/ratio_p50/lag_10": 4.0,
    }
    assert list(without_lags_above(2, row)) == ["loss", "objective/entropy/lag_0", "objective/entropy/lag_2"]
