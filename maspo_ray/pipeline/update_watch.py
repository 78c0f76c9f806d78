"""Updates that were left out: logged, and too many in a row end the run. A pure state machine."""

import logging

from maspo_ray.errors import RunError
from maspo_ray.experience import UpdateReport

_log = logging.getLogger(__name__)


class UpdateWatch:
    """Counts updates that were left out, one after the other."""

    def __init__(self, max_skipped_in_a_row: int) -> None:
        self._max_skipped = max_skipped_in_a_row
        self._skipped = 0

    def watch(self, step: int, report: UpdateReport) -> None:
        """Takes note of an update.

        Raises:
            RunError: it is one left out too many.
        """
        self._skipped = 0 if report.applied else self._skipped + 1
        if report.applied:
            return
        groups = ", ".join(map(str, report.faulty_groups))
        what = f"the loss of group {groups} is not finite" if groups else "the gradient is not finite"
        _log.warning("an update of step %d was left out: %s", step, what)
        if self._skipped > self._max_skipped:
            raise RunError(
                f"the last {self._skipped} updates were left out (the latest: {what}), more than "
                f"learner.max_skipped_updates ({self._max_skipped}) allows. Lower learner.lr, or look at these groups' rewards and "
                "log-probs."
            )
