"""Ready groups, oldest first.

Promise: what is put in comes out exactly once, by `take` or by `pop_stale`, in the order of the oldest version that sampled
its tokens, then of its group id. Does not decide what is stale; `staleness` does.
"""

from heapq import heappop, heappush

from maspo_ray.experience import Experience


class ReadyBuffer:
    """Holds experiences until the learner takes them."""

    def __init__(self) -> None:
        # A heap of (oldest version, group id, experience). Group ids differ, so that no two experiences are compared.
        self._heap: list[tuple[int, int, Experience]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, experience: Experience) -> None:
        heappush(self._heap, (experience.group.min_version, experience.group.group_id, experience))

    def take(self, count: int) -> list[Experience] | None:
        """Returns the `count` oldest experiences and lets go of them, or None, and keeps all, where there are fewer."""
        return [self._pop() for _ in range(count)] if count <= len(self) else None

    def pop_stale(self, oldest_allowed_version: int) -> list[Experience]:
        """Returns the experiences with a token older than `oldest_allowed_version` and lets go of them."""
        stale = []
        while self._heap and self._heap[0][0] < oldest_allowed_version:
            stale.append(self._pop())
        return stale

    def _pop(self) -> Experience:
        return heappop(self._heap)[2]
