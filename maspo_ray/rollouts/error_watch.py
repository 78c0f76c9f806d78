"""Completions that could not be scored: counted by what they were sampled for; too large a share of training's latest ends the run.

Promise: an evaluation's faults are counted, and neither end a run nor weigh in training's share. A pure state machine.
"""

import logging
from collections import Counter, deque
from typing import Literal

from maspo_ray.errors import RunError
from maspo_ray.experience import Outcome, Verdict

_log = logging.getLogger(__name__)

_WINDOW = 256
_FEWEST_TO_JUDGE = 32

Purpose = Literal["training", "evaluation"]
"""What a completion was sampled for."""


class ErrorWatch:
    """Counts completions that could not be scored; raises when they are too large a share of the last 256 of training.

    Attributes:
        errors: of training, over the run; evaluation_errors, of evaluations.
    """

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._num_judged = 0
        # Of those that failed, which they were, counted from 1, and why: a controller has very many completions, and few that fail.
        self._failed: deque[tuple[int, str | None]] = deque(maxlen=_WINDOW)
        self.errors = 0
        self.evaluation_errors = 0

    def add(self, verdict: Verdict, purpose: Purpose) -> None:
        """Takes up a verdict.

        Raises:
            RunError: too many of training's latest completions could not be scored.
        """
        failed = verdict.outcome is not Outcome.SCORED
        if purpose == "evaluation":
            if failed:
                self.evaluation_errors += 1
                _warn_at_times("completions of evaluations", self.evaluation_errors, verdict)
            return
        self._num_judged += 1
        if failed:
            self.errors += 1
            _warn_at_times("completions", self.errors, verdict)
            self._failed.append((self._num_judged, verdict.cause))
            self._judge()

    def _judge(self) -> None:
        seen = min(self._num_judged, _WINDOW)
        causes = [cause for number, cause in self._failed if number > self._num_judged - seen]
        if seen < _FEWEST_TO_JUDGE or len(causes) / seen <= self._max_error_rate:
            return
        [(cause, times)] = Counter(causes).most_common(1)
        raise RunError(
            f"{len(causes)} of the last {seen} completions could not be scored, more than "
            f"reward.max_error_rate ({self._max_error_rate:g}) allows; the most frequent cause, {times} of {len(causes)}, was: "
            f"{cause}. Mend the reward, or raise reward.max_error_rate."
        )


def _warn_at_times(of_what: str, errors: int, verdict: Verdict) -> None:
    """Warns at the first, second, fourth, eighth …: a cause that repeats must not drown the rest."""
    if errors.bit_count() == 1:
        _log.warning("%s that could not be scored: %d; the latest: %s", of_what, errors, verdict.cause)
