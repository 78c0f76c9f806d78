"""What becomes of updates that are left out."""

import logging

import pytest

from maspo_ray.errors import RunError
from maspo_ray.experience import UpdateReport
from maspo_ray.pipeline.update_watch import UpdateWatch

APPLIED = UpdateReport({}, True, ())


def test_update_left_out_is_logged_with_its_groups(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        UpdateWatch(1).watch(7, UpdateReport({}, False, (3, 5)))
        UpdateWatch(1).watch(8, UpdateReport({}, False, ()))
    assert caplog.messages == [
        "an update of step 7 was left out: the loss of group 3, 5 is not finite",
        "an update of step 8 was left out: the gradient is not finite",
    ]


def test_updates_left_out_in_a_row_end_the_run_and_others_start_the_count_anew() -> None:
    watch, left_out = UpdateWatch(2), UpdateReport({}, False, (4,))
    for report in (left_out, left_out, APPLIED, left_out, left_out):
        watch.watch(1, report)
    with pytest.raises(RunError, match=r"the last 3 updates .*group 4 .*learner.max_skipped_updates \(2\) allows"):
        watch.watch(1, left_out)
