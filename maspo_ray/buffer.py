"""Ready groups, oldest first.

Promise: what is put in comes out exactly once, by `take` or by `pop_stale`, in the order of the oldest version that sampled
its tokens, then of its group id. Does not decide what is stale; `staleness` does.
"""

from bisect import bisect_left, insort

from maspo_ray.experience import Experience


def _age(experience: Experience) -> tuple[int, int]:
    return experience.group.min_version, experience.group.group_id


class ReadyBuffer:
    """Holds experiences until the learner takes them."""

    def __init__(self) -> None:
        self._experiences: list[Experience] = []

    def __len__(self) -> int:
        return len(self._experiences)

    def put(self, experience: Experience) -> None:
        insort(self._experiences, experience, key=_age)

    def take(self, count: int) -> list[Experience] | None:
        """Returns the `count` oldest experiences and lets go of them, or None, and keeps all, where there are fewer."""
        return self._pop_first(count) if count <= len(self) else None

    def pop_stale(self, oldest_allowed_version: int) -> list[Experience]:
        """Returns the experiences with a token older than `oldest_allowed_version` and lets go of them."""
        return self._pop_first(
            bisect_left(self._experiences, oldest_allowed_version, key=lambda experience: experience.group.min_version)
        )

    def _pop_first(self, count: int) -> list[Experience]:
        first, self._experiences = self._experiences[:count], self._experiences[count:]
        return first
