"""Every group's life, exactly once.

Promise: a group that was submitted ends once, as trained, filtered, stale or failed, with one row for it where its sink takes the row; at
the end of a run the counts add up or `check_balanced` says which groups do not. Ids are given one after the other, so that only the open
groups need be kept: any other id below the next is that of a group that has ended. Owns no file: rows go to a sink.
"""

from collections.abc import Callable
from enum import StrEnum


class GroupOutcome(StrEnum):
    """How a group's life ended."""

    TRAINED = "trained"
    FILTERED = "filtered"
    STALE = "stale"
    FAILED = "failed"


class GroupLedger:
    """Accounts for groups from submission to their end.

    Args:
        sink: receives one row for each group that ends: group_id, prompt_id, outcome, submitted_version, min_version,
            max_version, step, and cause where one was given.
    """

    def __init__(self, sink: Callable[[dict[str, object]], None]) -> None:
        self._sink = sink
        self._open: dict[int, tuple[str, int]] = {}
        self._ids = range(0)
        self._ends = dict.fromkeys(GroupOutcome, 0)

    @property
    def counts(self) -> dict[str, int]:
        """Groups submitted, and by outcome."""
        return {"submitted": len(self._ids), **{outcome.value: count for outcome, count in self._ends.items()}}

    @property
    def open_ids(self) -> list[int]:
        """Groups that were submitted and have not ended, in the order of their submission."""
        return list(self._open)

    def submit(self, group_id: int, prompt_id: str, version: int) -> None:
        """Opens a group's life at the version of its admission.

        Args:
            group_id: any for the first group; for the others, one more than that of the group before.
        """
        assert group_id not in self._ids, f"group {group_id} was submitted twice."
        start = self._ids.start if self._ids else group_id
        assert group_id == start + len(self._ids), (
            f"group {group_id} was submitted after {self._ids[-1]}; ids are given one after the other."
        )
        self._ids = range(start, group_id + 1)
        self._open[group_id] = (prompt_id, version)

    def end(
        self,
        group_id: int,
        outcome: GroupOutcome,
        *,
        min_version: int | None = None,
        max_version: int | None = None,
        step: int | None = None,
        cause: str | None = None,
    ) -> None:
        """Closes a group's life and writes its row.

        Args:
            min_version: the oldest version that sampled one of its tokens; max_version, the newest. None where the group
                has no tokens.
            step: the update that trained it; None exactly where it was not trained.
            cause: why it was filtered or failed.
        """
        assert group_id in self._ids, f"group {group_id} ended; it was never submitted."
        assert group_id in self._open, f"group {group_id} ended twice."
        assert (step is not None) == (outcome is GroupOutcome.TRAINED), (
            f"group {group_id} ended {outcome} with step {step}; a trained group has a step, no other has."
        )
        prompt_id, submitted_version = self._open[group_id]
        row: dict[str, object] = {
            "group_id": group_id,
            "prompt_id": prompt_id,
            "outcome": outcome.value,
            "submitted_version": submitted_version,
            "min_version": min_version,
            "max_version": max_version,
            "step": step,
        }
        if cause is not None:
            row["cause"] = cause
        # The life has ended, whether or not its row can be written.
        del self._open[group_id]
        self._ends[outcome] += 1
        self._sink(row)

    def check_balanced(self) -> None:
        """Asserts that every submitted group has ended, once."""
        assert not self._open, f"groups {self.open_ids} were submitted and never ended."
        ended = sum(self._ends.values())
        assert len(self._ids) == ended, f"{len(self._ids)} groups were submitted and {ended} ended."
