"""Every group ends exactly once, with its row, and the counts add up."""

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.errors import RunError
from maspo_ray.groups.ledger import GroupLedger, GroupOutcome


@pytest.fixture
def rows() -> list[dict[str, object]]:
    return []


@pytest.fixture
def ledger(rows: list[dict[str, object]]) -> GroupLedger:
    return GroupLedger(rows.append)


def test_ledger_trained_group_writes_its_whole_row(ledger: GroupLedger, rows: list[dict[str, object]]) -> None:
    ledger.submit(7, "train/3", version=2)
    assert rows == []
    ledger.end(7, GroupOutcome.TRAINED, min_version=2, max_version=3, step=4)
    assert rows == [
        {
            "group_id": 7,
            "prompt_id": "train/3",
            "outcome": "trained",
            "submitted_version": 2,
            "min_version": 2,
            "max_version": 3,
            "step": 4,
        }
    ]
    assert type(rows[0]["outcome"]) is str


def test_ledger_failed_group_has_a_cause_and_no_step(ledger: GroupLedger, rows: list[dict[str, object]]) -> None:
    ledger.submit(1, "train/0", version=0)
    ledger.end(1, GroupOutcome.FAILED, cause="rollout actor died")
    assert rows[0]["cause"] == "rollout actor died"
    assert (rows[0]["outcome"], rows[0]["min_version"], rows[0]["max_version"], rows[0]["step"]) == (
        "failed",
        None,
        None,
        None,
    )


def test_ledger_every_outcome_adds_up(ledger: GroupLedger) -> None:
    outcomes = (
        [GroupOutcome.TRAINED] * 4 + [GroupOutcome.FILTERED] * 3 + [GroupOutcome.STALE] * 2 + [GroupOutcome.FAILED]
    )
    for group_id, outcome in enumerate(outcomes):
        ledger.submit(group_id, "p", version=0)
        ledger.end(group_id, outcome, step=1 if outcome is GroupOutcome.TRAINED else None)
    assert ledger.counts == {"submitted": 10, "trained": 4, "filtered": 3, "stale": 2, "failed": 1}
    ledger.check_balanced()


def test_ledger_open_groups_are_named_by_the_check(ledger: GroupLedger) -> None:
    for group_id in (11, 12, 13):
        ledger.submit(group_id, "p", version=0)
    ledger.end(12, GroupOutcome.STALE)
    assert ledger.open_ids == [11, 13]
    with pytest.raises(AssertionError, match=r"\[11, 13\]"):
        ledger.check_balanced()


def test_ledger_second_end_is_refused_and_writes_nothing(ledger: GroupLedger, rows: list[dict[str, object]]) -> None:
    ledger.submit(5, "p", version=0)
    ledger.end(5, GroupOutcome.STALE)
    with pytest.raises(AssertionError, match="group 5 ended twice"):
        ledger.end(5, GroupOutcome.TRAINED, step=1)
    assert len(rows) == 1
    assert ledger.counts["trained"] == 0


def test_ledger_end_of_an_unknown_group_is_refused(ledger: GroupLedger) -> None:
    with pytest.raises(AssertionError, match="group 9 ended; it was never submitted"):
        ledger.end(9, GroupOutcome.FAILED)


def test_ledger_second_submission_is_refused_while_open_and_after(ledger: GroupLedger) -> None:
    ledger.submit(5, "p", version=0)
    with pytest.raises(AssertionError, match="submitted twice"):
        ledger.submit(5, "p", version=0)
    ledger.end(5, GroupOutcome.STALE)
    with pytest.raises(AssertionError, match="submitted twice"):
        ledger.submit(5, "p", version=0)


@pytest.mark.parametrize("group_id", [4, 7])
def test_ledger_id_that_does_not_follow_the_last_is_refused(ledger: GroupLedger, group_id: int) -> None:
    ledger.submit(5, "p", version=0)
    with pytest.raises(AssertionError, match=f"group {group_id} was submitted after 5"):
        ledger.submit(group_id, "p", version=0)
    assert (ledger.open_ids, ledger.counts["submitted"]) == ([5], 1)


@given(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=30))
def test_ledger_takes_exactly_what_a_set_of_all_its_ids_would(first: int, calls: list[tuple[bool, int]]) -> None:
    ledger = GroupLedger(lambda row: None)
    submitted, ended = [], set[int]()
    for submits, group_id in calls:
        allowed = (
            group_id == (submitted[-1] + 1 if submitted else first)
            if submits
            else group_id in submitted and group_id not in ended
        )
        if submits and not submitted and not allowed:
            continue  # Any id may be the first; this run begins at `first`.
        with nullcontext() if allowed else pytest.raises(AssertionError):
            if submits:
                ledger.submit(group_id, "p", version=0)
            else:
                ledger.end(group_id, GroupOutcome.STALE)
        if allowed:
            (submitted.append if submits else ended.add)(group_id)
    assert ledger.open_ids == [group_id for group_id in submitted if group_id not in ended]
    assert (ledger.counts["submitted"], ledger.counts["stale"]) == (len(submitted), len(ended))


@pytest.mark.parametrize(("outcome", "step"), [(GroupOutcome.TRAINED, None), (GroupOutcome.STALE, 3)])
def test_ledger_step_without_training_or_training_without_step_is_refused(
    ledger: GroupLedger, outcome: GroupOutcome, step: int | None
) -> None:
    ledger.submit(1, "p", version=0)
    with pytest.raises(AssertionError, match="a trained group has a step"):
        ledger.end(1, outcome, step=step)


def test_ledger_group_whose_row_could_not_be_written_has_ended_nevertheless() -> None:
    def full_disk(row: dict[str, object]) -> None:
        raise RunError("no space left")

    ledger = GroupLedger(full_disk)
    for group_id in (1, 2):
        ledger.submit(group_id, "p", version=0)
        with pytest.raises(RunError, match="no space"):
            ledger.end(group_id, GroupOutcome.STALE)
    # The counts of the summary add up, though the file lacks its rows.
    ledger.check_balanced()
    assert ledger.counts["stale"] == 2
