"""The run's record: a summary at any moment, means weighted as their names say, nothing unmeasured read as 0."""

import math
from pathlib import Path
from typing import Any

import pytest

from maspo_ray.config import RunConfig
from maspo_ray.run_dir.history import RunHistory
from maspo_ray.run_dir.summary import RunSummary

NAN = math.nan


def _record(**keys: Any) -> RunHistory:
    tree = {"model": {"path": "org/model"}, "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}}}
    return RunHistory(RunConfig.model_validate(tree | keys))


def _row(reward: float = 0.5, **metrics: float) -> dict[str, float]:
    row = {
        "reward/mean": reward,
        "staleness/mean": 0.0,
        "staleness/max": 0.0,
        "time/step_s": 1.0,
        "time/learner_wait_share": 0.0,
        "time/rollout_idle_share": 0.0,
        "tokens/generated": 0.0,
        "tokens/trained": 0.0,
    }
    return row | {name.replace("__", "/"): value for name, value in metrics.items()}


def _summary(record: RunHistory, **facts: Any) -> RunSummary:
    given = {
        "groups": {"submitted": 0},
        "seconds": {},
        "errors": 0,
        "evaluation_errors": 0,
        "interrupted": False,
        "saved": (),
    }
    return record.summary(**(given | facts))


def test_summary_before_the_first_step_measures_nothing() -> None:
    summary = _summary(_record(), interrupted=True)
    assert (summary.steps, summary.accuracy_before, summary.accuracy_after) == (0, None, None)
    unmeasured = [
        summary.reward_first,
        summary.reward_last,
        summary.staleness_mean,
        summary.staleness_max,
        summary.learner_wait_share,
        summary.rollout_idle_share,
        summary.parity_max,
    ]
    assert all(math.isnan(value) for value in unmeasured)
    assert (summary.tokens_generated, summary.tokens_trained, summary.interrupted) == (0, 0, True)


def test_summary_carries_the_configs_and_the_callers_facts() -> None:
    record = _record(run_dir="runs/x", eval={"name": "sums"}, pipeline={"max_staleness": 3})
    groups = {"submitted": 5, "trained": 4, "failed": 1}
    summary = _summary(record, groups=groups, errors=7, evaluation_errors=2, saved=("final",))
    assert (summary.run_dir, summary.eval_set, summary.max_staleness) == (str(Path("runs/x")), "sums", 3)
    assert (summary.groups, summary.saved, summary.interrupted) == (groups, ("final",), False)
    assert (summary.errors, summary.evaluation_errors) == (7, 2)
    assert summary.wall_s >= 0


@pytest.mark.parametrize(
    ("accuracies", "before", "after"), [([], None, None), ([0.3], 0.3, None), ([0.3, 0.5, 0.9], 0.3, 0.9)]
)
def test_summary_accuracy_is_before_and_after_only_where_both_were_measured(
    accuracies: list[float], before: float | None, after: float | None
) -> None:
    record = _record()
    for accuracy in accuracies:
        record.accuracy(accuracy)
    summary = _summary(record)
    assert (summary.accuracy_before, summary.accuracy_after) == (before, after)


@pytest.mark.parametrize(
    ("num_steps", "first", "last"),
    [
        (1, 0.0, 0.0),
        (9, 0.0, 8.0),  # a tenth of 9 steps is one step
        (20, 0.5, 18.5),  # of 20, two: (0 + 1) / 2 and (18 + 19) / 2
        (29, 0.5, 27.5),
    ],
)
def test_summary_rewards_are_means_of_the_first_and_the_last_tenth(num_steps: int, first: float, last: float) -> None:
    record = _record()
    for step in range(num_steps):
        record.step(_row(reward=float(step)))
    summary = _summary(record)
    assert (summary.steps, summary.reward_first, summary.reward_last) == (num_steps, first, last)


def test_summary_mean_leaves_out_what_a_step_did_not_measure() -> None:
    record = _record()
    for reward in [NAN, 1.0] + [0.0] * 17 + [0.5]:
        record.step(_row(reward=reward))
    summary = _summary(record)
    # The first tenth is NaN and 1, the last 0 and 0.5.
    assert (summary.reward_first, summary.reward_last) == (1.0, 0.25)


def test_summary_shares_are_of_time_and_staleness_of_steps() -> None:
    record = _record()
    record.step(_row(time__step_s=3.0, time__learner_wait_share=0.2, time__rollout_idle_share=0.4, staleness__mean=1.0))
    record.step(_row(time__step_s=1.0, time__learner_wait_share=0.6, time__rollout_idle_share=0.0, staleness__mean=0.5))
    summary = _summary(record)
    # Waited: (3 · 0.2 + 1 · 0.6) / 4. Idle: (3 · 0.4 + 1 · 0) / 4. Staleness: (1 + 0.5) / 2.
    assert summary.learner_wait_share == pytest.approx(0.3)
    assert summary.rollout_idle_share == pytest.approx(0.3)
    assert summary.staleness_mean == pytest.approx(0.75)


def test_summary_staleness_max_and_tokens_are_over_all_steps() -> None:
    record = _record()
    for stale, generated, trained in ((1.0, 10.0, 8.0), (2.0, 20.0, 9.0), (0.0, 30.0, 10.0)):
        record.step(_row(staleness__max=stale, tokens__generated=generated, tokens__trained=trained))
    summary = _summary(record)
    assert (summary.staleness_max, summary.tokens_generated, summary.tokens_trained) == (2.0, 60, 27)


def test_summary_parity_is_the_largest_distance_measured() -> None:
    record = _record()
    for distance in (0.1, 0.3, 0.2):
        record.parity(distance)
    assert _summary(record).parity_max == 0.3


def test_summary_does_not_end_the_record() -> None:
    record = _record()
    record.step(_row(reward=0.0))
    _summary(record)
    record.step(_row(reward=1.0))
    assert (_summary(record).steps, _summary(record).reward_last) == (2, 1.0)
