"""Admission and staleness: which group may start, and which may still be trained on.

Promise: accepted + running groups never exceed min((version + max_staleness + 1) · groups_per_step, total_groups), so groups
trained in the order of their admission are at most `max_staleness` versions behind. A pure state machine: it owns no tasks,
no clock and no groups, only their counts.
"""


class StalenessGate:
    """Counts groups on their way to the learner.

    A group is *running* from `admit` until it is accepted or given back, and *accepted* from there on: ready, or trained.
    """

    def __init__(self, groups_per_step: int, max_staleness: int, total_groups: int) -> None:
        assert groups_per_step >= 1, f"groups_per_step is {groups_per_step}; a step trains on at least one group."
        assert max_staleness >= 0, f"max_staleness is {max_staleness}; it counts versions."
        assert total_groups >= 0, f"total_groups is {total_groups}; it counts groups."
        self._groups_per_step = groups_per_step
        self._max_staleness = max_staleness
        self._total_groups = total_groups
        self._version = 0
        self._running = 0
        self._accepted = 0

    @property
    def version(self) -> int:
        return self._version

    @property
    def running(self) -> int:
        return self._running

    @property
    def accepted(self) -> int:
        """Groups that are ready or trained."""
        return self._accepted

    @property
    def ready(self) -> int:
        """Accepted groups that no published step has trained on."""
        return self._accepted - self._version * self._groups_per_step

    @property
    def oldest_allowed_version(self) -> int:
        """The oldest version whose tokens may be trained on now."""
        return self._version - self._max_staleness

    def capacity(self) -> int:
        """Returns how many groups may start now."""
        fresh = (self._version + self._max_staleness + 1) * self._groups_per_step
        return min(fresh, self._total_groups) - self._accepted - self._running

    def admit(self) -> int:
        """Starts a group; returns the version at its admission."""
        assert self.capacity() > 0, (
            f"a group was admitted at version {self._version} with {self._running} running and {self._accepted} accepted; "
            "there is no capacity."
        )
        self._running += 1
        return self._version

    def accept(self) -> None:
        """A running group is ready for the learner."""
        self._end_running()
        self._accepted += 1

    def give_back_running(self) -> None:
        """A running group was filtered or failed: another may start in its place."""
        self._end_running()

    def give_back_accepted(self) -> None:
        """A ready group went past the staleness bound: another may start in its place."""
        assert self.ready > 0, f"a group was given back at version {self._version}; none is ready."
        self._accepted -= 1

    def publish(self, version: int) -> None:
        """The learner trained on `groups_per_step` ready groups, and its weights are now `version`."""
        assert version == self._version + 1, (
            f"version {version} was published after {self._version}; versions go up by 1."
        )
        assert self.ready >= self._groups_per_step, (
            f"version {version} was published with {self.ready} groups ready; a step trains on {self._groups_per_step}."
        )
        self._version = version

    def is_fresh(self, min_version: int) -> bool:
        """Whether tokens as old as `min_version` may be trained on now."""
        return min_version >= self.oldest_allowed_version

    def _end_running(self) -> None:
        assert self._running > 0, "a group ended; none is running."
        self._running -= 1
