"""What becomes of a group that has gone past `max_staleness`: dropped, or trained on all the same.

Promise: pure. A policy of one's own is a class with these methods (`protocols.LatePolicy`), which `pipeline.late_policy.path` names.
"""

from maspo_ray.errors import ConfigError
from maspo_ray.experience import Experience


class DropStale:
    """Nothing older than `max_staleness` is trained on."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness

    def oldest_version(self, version: int) -> int:
        return version - self._max_staleness

    def judge(self, experience: Experience, version: int) -> Experience | None:
        return None


class TrainStale:
    """Trains on what came too late, up to `max_lag` versions behind: the ratio to the policy that sampled it corrects for its age, or,
    with `objective.old_policy: recompute`, the truncated importance weight."""

    def __init__(self, max_staleness: int, max_lag: int) -> None:
        if not isinstance(max_lag, int) or max_lag < max_staleness:
            raise ConfigError(
                f"pipeline.late_policy.args.max_lag is {max_lag}; it must be a whole number, at least pipeline.max_staleness "
                f"({max_staleness}). Raise it."
            )
        self._max_lag = max_lag

    def oldest_version(self, version: int) -> int:
        return version - self._max_lag

    def judge(self, experience: Experience, version: int) -> Experience | None:
        return experience if experience.group.min_version >= self.oldest_version(version) else None
