"""What a run remembers of its steps for the summary at its end.

Promise: a summary can be made at any moment, also of a run that was interrupted; what was never measured is NaN or None. Keeps
eight numbers of a step, however many it has.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from time import monotonic

from maspo_ray.config import RunConfig
from maspo_ray.run_dir.summary import RunSummary

_COLUMNS = (
    "reward/mean",
    "staleness/mean",
    "staleness/max",
    "time/step_s",
    "time/learner_wait_share",
    "time/rollout_idle_share",
    "tokens/generated",
    "tokens/trained",
)


class RunHistory:
    """Gathers; one for each run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._started = monotonic()
        self._columns = {name: array("d") for name in _COLUMNS}
        self._accuracies: list[float] = []
        self._parity_max = math.nan

    def step(self, row: Mapping[str, float]) -> None:
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))

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
        evaluation_errors: int,
        interrupted: bool,
        saved: tuple[str, ...],
        failure: str | None = None,
    ) -> RunSummary:
        """Returns what the run has come to so far."""
        columns = self._columns
        rewards, step_s = columns["reward/mean"], columns["time/step_s"]
        tenth = max(1, len(rewards) // 10)
        return RunSummary(
            run_dir=str(self._config.run_dir),
            steps=len(rewards),
            accuracy_before=self._accuracies[0] if self._accuracies else None,
            accuracy_after=self._accuracies[-1] if len(self._accuracies) > 1 else None,
            eval_set=self._config.eval.name,
            reward_first=_mean(rewards[:tenth]),
            reward_last=_mean(rewards[-tenth:]),
            staleness_mean=_mean(columns["staleness/mean"]),
            staleness_max=max(columns["staleness/max"], default=math.nan),
            max_staleness=self._config.pipeline.max_staleness,
            learner_wait_share=_mean(columns["time/learner_wait_share"], step_s),
            rollout_idle_share=_mean(columns["time/rollout_idle_share"], step_s),
            groups=groups,
            seconds=seconds,
            tokens_generated=int(sum(columns["tokens/generated"])),
            tokens_trained=int(sum(columns["tokens/trained"])),
            parity_max=self._parity_max,
            wall_s=monotonic() - self._started,
            errors=errors,
            evaluation_errors=evaluation_errors,
            interrupted=interrupted,
            saved=saved,
            failure=failure,
        )


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    known = [(value, weight) for value, weight in pairs if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan
