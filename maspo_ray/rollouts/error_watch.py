"""Completions that could not be scored: counted, and too large a share of the latest ends the run. A pure state machine."""

import logging
from collections import deque

from maspo_ray.errors import RunError
from maspo_ray.experience import Outcome, Verdict

_log = logging.getLogger(__name__)

_WINDOW = 256
_FEWEST_TO_JUDGE = 32


class ErrorWatch:
    """Counts completions that could not be scored; raises when they are too large a share of the last 256."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._num_judged = 0
        # Of those that failed, which they were, counted from 1: a controller has very many completions, and few that fail.
        self._failed: deque[int] = deque(maxlen=_WINDOW)
        self._first_cause: str | None = None
        self.errors = 0

    def add(self, verdict: Verdict) -> None:
        self._num_judged += 1
        if verdict.outcome is Outcome.SCORED:
            return
        self._note(verdict)
        seen = min(self._num_judged, _WINDOW)
        errors = sum(number > self._num_judged - seen for number in self._failed)
        if seen >= _FEWEST_TO_JUDGE and errors / seen > self._max_error_rate:
            raise RunError(
                f"{errors} of the last {seen} completions could not be scored, more than "
                f"reward.max_error_rate ({self._max_error_rate:g}) allows; the first cause was: {self._first_cause}. "
                "Mend the reward, or raise reward.max_error_rate."
            )

    def _note(self, verdict: Verdict) -> None:
        self._failed.append(self._num_judged)
        self.errors += 1
        if self.errors.bit_count() == 1:
            # At the first, second, fourth, eighth …: a cause that repeats must not drown the rest.
            _log.warning("completions that could not be scored: %d; the latest: %s", self.errors, verdict.cause)
        self._first_cause = self._first_cause or verdict.cause
