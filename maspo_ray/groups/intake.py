"""The groups of a run from their admission to their end: gate, ledger, buffer and late policy, always in step.

Promise: every admitted group ends exactly once, as trained, filtered, stale or failed; what `take` returns is within `max_staleness`, or
the late policy has let it in; a place that a group does not use is given back. A pure state machine: it owns no tasks, no clock
and no actors.
"""

from collections.abc import Callable, Sequence

from maspo_ray.errors import RunError
from maspo_ray.experience import Experience, Group
from maspo_ray.groups.buffer import ReadyBuffer
from maspo_ray.groups.ledger import GroupLedger, GroupOutcome
from maspo_ray.groups.staleness import StalenessGate
from maspo_ray.protocols import LatePolicy


class Intake:
    """Counts and holds groups on their way to the learner.

    Args:
        sink: receives the ledger's rows.
    """

    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        steps: int,
        late_policy: LatePolicy,
        sink: Callable[[dict[str, object]], None],
    ) -> None:
        self._groups_per_step = groups_per_step
        self._gate = StalenessGate(groups_per_step, max_staleness, steps * groups_per_step)
        self._ledger = GroupLedger(sink)
        self._ready = ReadyBuffer()
        self._late_policy = late_policy
        self._num_groups = 0

    @property
    def version(self) -> int:
        return self._gate.version

    @property
    def running(self) -> int:
        """Groups that are on their way."""
        return self._gate.running

    @property
    def ready(self) -> int:
        """Groups that wait for the learner."""
        return self._gate.ready

    @property
    def counts(self) -> dict[str, int]:
        """Groups submitted, and by outcome."""
        return self._ledger.counts

    @property
    def max_lag(self) -> int:
        """How many versions behind the learner a token that is trained on may be at most."""
        return self._gate.version - self.oldest_trainable_version

    @property
    def oldest_trainable_version(self) -> int:
        """A group with an older token is refused by the learner, now and later: what is left of it need not be generated."""
        return self._late_policy.oldest_version(self._gate.version)

    def capacity(self) -> int:
        """Returns how many groups may start now."""
        return self._gate.capacity()

    def admit(self, prompt_id: str) -> tuple[int, int]:
        """Starts a group; returns its id and the version at its admission."""
        group_id, version = self._num_groups, self._gate.admit()
        self._num_groups += 1
        self._ledger.submit(group_id, prompt_id, version)
        return group_id, version

    def accept(self, experience: Experience) -> None:
        """A running group is ready for the learner."""
        self._ready.put(experience)
        self._gate.accept()

    def drop(self, group: Group, outcome: GroupOutcome, cause: str) -> None:
        """A running group ends without being trained on; another may start in its place."""
        self._end(group, outcome, cause=cause)
        self._gate.give_back_running()

    def expired(self, group_id: int) -> None:
        """A running group was cancelled, since it could no longer be trained on; another may start in its place."""
        self._ledger.end(group_id, GroupOutcome.STALE, cause="cancelled: its first tokens went past the bound")
        self._gate.give_back_running()

    def take(self) -> list[Experience] | None:
        """Returns a step's experiences, the oldest, or None where there are too few.

        What has gone past the bound is let in or leaves here, counted.
        """
        late, let_in = self._ready.pop_stale(self._gate.oldest_allowed_version), []
        for experience in late:
            judged = self._late_policy.judge(experience, self._gate.version)
            if judged is not None:
                let_in.append((experience, judged))
            else:
                self._end(experience.group, GroupOutcome.STALE)
                self._gate.give_back_accepted()
        missing = max(0, self._groups_per_step - len(let_in))
        fresh = self._ready.take(missing)
        # As they came, where they wait on: the policy is asked again.
        for experience, _ in let_in if fresh is None else let_in[self._groups_per_step :]:
            self._ready.put(experience)
        if fresh is None:
            return None
        assert all(self._gate.is_fresh(experience.group.min_version) for experience in fresh), (
            "a group is past the bound"
        )
        return [judged for _, judged in let_in[: self._groups_per_step]] + fresh

    def publish(self, version: int) -> None:
        """The learner trained on what `take` returned, and its weights are now `version`."""
        self._gate.publish(version)

    def trained(self, experience: Experience, step: int, applied: bool) -> None:
        """Ends a group of a step that was published.

        Args:
            applied: whether its update changed the weights.
        """
        if applied:
            self._end(experience.group, GroupOutcome.TRAINED, step=step)
        else:
            self._end(experience.group, GroupOutcome.FAILED, cause="its update was left out")

    def close(self) -> None:
        """Ends what has not ended; then every group has, once.

        Raises:
            RunError: a row cannot be written.
        """
        unwritten: RunError | None = None
        for group_id in self._ledger.open_ids:
            try:
                self._ledger.end(group_id, GroupOutcome.FAILED, cause="the run ended")
            except RunError as error:
                unwritten = unwritten or error
        self._ledger.check_balanced()
        if unwritten is not None:
            raise unwritten

    def lags(self, batch: Sequence[Experience]) -> list[int]:
        """Returns how many versions behind the oldest token of each is."""
        return [self._gate.version - experience.group.min_version for experience in batch]

    def _end(self, group: Group, outcome: GroupOutcome, step: int | None = None, cause: str | None = None) -> None:
        self._ledger.end(
            group.group_id,
            outcome,
            min_version=group.min_version,
            max_version=group.max_version,
            step=step,
            cause=cause,
        )
