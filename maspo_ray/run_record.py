"""What a run remembers of its steps for the summary at its end.

Promise: a summary can be made at any moment, also of a run that was interrupted; what was never measured is NaN or None.
"""

import math
from collections.abc import Mapping
from time import monotonic

from maspo_ray.config import RunConfig
from maspo_ray.summary import RunSummary


class RunRecord:
    """Gathers; one for each run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._started = monotonic()
        self._rows: list[Mapping[str, float]] = []
        self._accuracies: list[float] = []
        self._parity_max = math.nan

    def step(self, row: Mapping[str, float]) -> None:
        self._rows.append(row)

    def accuracy(self, accuracy: float) -> None:
        self._accuracies.append(accuracy)

    def parity(self, distance: float) -> None:
        self._parity_max = distance if math.isnan(self._parity_max) else max(self._parity_max, distance)

    def summary(
        self,
        *,
        groups: dict[str, int],
        seconds: dict[str, dict[str, float]],
        errors: int,
        interrupted: bool,
        saved: tuple[str, ...],
    ) -> RunSummary:
        """Returns what the run has come to so far."""
        rows = self._rows
        tenth = max(1, len(rows) // 10)
        return RunSummary(
            run_dir=str(self._config.run_dir),
            steps=len(rows),
            accuracy_before=self._accuracies[0] if self._accuracies else None,
            accuracy_after=self._accuracies[-1] if len(self._accuracies) > 1 else None,
            eval_set=self._config.eval.name,
            reward_first=_mean(rows[:tenth], "reward/mean"),
            reward_last=_mean(rows[-tenth:], "reward/mean"),
            staleness_mean=_mean(rows, "staleness/mean"),
            staleness_max=max((row["staleness/max"] for row in rows), default=math.nan),
            max_staleness=self._config.pipeline.max_staleness,
            learner_wait_share=_mean(rows, "time/learner_wait_share", weight="time/step_s"),
            rollout_idle_share=_mean(rows, "time/rollout_idle_share", weight="time/step_s"),
            groups=groups,
            seconds=seconds,
            tokens_generated=int(sum(row["tokens/generated"] for row in rows)),
            tokens_trained=int(sum(row["tokens/trained"] for row in rows)),
            parity_max=self._parity_max,
            wall_s=monotonic() - self._started,
            errors=errors,
            interrupted=interrupted,
            saved=saved,
        )


def _mean(rows: list[Mapping[str, float]], name: str, weight: str | None = None) -> float:
    known = [(row[name], row[weight] if weight else 1.0) for row in rows if not math.isnan(row.get(name, math.nan))]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan
