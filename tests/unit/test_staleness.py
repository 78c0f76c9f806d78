"""The gate by hand-worked cases, then by a machine that tries every order of events."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maspo_ray.groups.staleness import StalenessGate


def _accept(gate: StalenessGate, count: int) -> None:
    for _ in range(count):
        gate.admit()
    for _ in range(count):
        gate.accept()


def test_gate_at_version_0_admits_staleness_plus_one_batches() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=2, total_groups=100)
    assert gate.capacity() == (0 + 2 + 1) * 4


def test_gate_on_policy_admits_one_batch_until_its_version_is_published() -> None:
    gate = StalenessGate(groups_per_step=3, max_staleness=0, total_groups=9)
    assert [gate.admit() for _ in range(3)] == [0, 0, 0]
    assert gate.capacity() == 0
    for _ in range(3):
        gate.accept()
    assert gate.capacity() == 0
    gate.publish(1)
    assert gate.capacity() == 3
    assert gate.admit() == 1


def test_gate_near_the_end_admits_no_more_than_the_total() -> None:
    gate = StalenessGate(groups_per_step=4, max_staleness=2, total_groups=8)
    assert gate.capacity() == 8


def test_gate_admit_without_capacity_is_refused() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0, total_groups=5)
    gate.admit()
    with pytest.raises(AssertionError, match="no capacity"):
        gate.admit()


def test_gate_accept_moves_a_group_and_keeps_its_place() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=0, total_groups=4)
    gate.admit()
    gate.accept()
    assert (gate.running, gate.accepted, gate.ready, gate.capacity()) == (0, 1, 1, 1)


def test_gate_give_back_running_frees_a_place() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0, total_groups=1)
    gate.admit()
    gate.give_back_running()
    assert (gate.running, gate.accepted, gate.capacity()) == (0, 0, 1)


def test_gate_give_back_accepted_frees_a_place() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0, total_groups=1)
    _accept(gate, 1)
    assert gate.capacity() == 0
    gate.give_back_accepted()
    assert (gate.accepted, gate.capacity()) == (0, 1)


def test_gate_give_back_accepted_of_a_trained_group_is_refused() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=1, total_groups=4)
    _accept(gate, 2)
    gate.publish(1)
    assert (gate.accepted, gate.ready) == (2, 0)
    with pytest.raises(AssertionError, match="none is ready"):
        gate.give_back_accepted()


def test_gate_end_without_a_running_group_is_refused() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=0, total_groups=1)
    with pytest.raises(AssertionError, match="none is running"):
        gate.accept()
    with pytest.raises(AssertionError, match="none is running"):
        gate.give_back_running()


@pytest.mark.parametrize("version", [0, 2])
def test_gate_publish_of_any_but_the_next_version_is_refused(version: int) -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=3, total_groups=9)
    _accept(gate, 3)
    with pytest.raises(AssertionError, match="go up by 1"):
        gate.publish(version)


def test_gate_publish_without_a_ready_batch_is_refused() -> None:
    gate = StalenessGate(groups_per_step=2, max_staleness=1, total_groups=8)
    _accept(gate, 1)
    with pytest.raises(AssertionError, match="1 groups ready"):
        gate.publish(1)


def test_gate_is_fresh_up_to_the_bound_and_not_beyond() -> None:
    gate = StalenessGate(groups_per_step=1, max_staleness=2, total_groups=9)
    for version in range(1, 4):
        _accept(gate, 1)
        gate.publish(version)
    # Version 3: tokens of versions 1, 2 and 3 are at most 2 behind; those of version 0 are 3 behind.
    assert [gate.is_fresh(version) for version in range(4)] == [False, True, True, True]
    assert gate.oldest_allowed_version == 1


@dataclass(slots=True)
class _LiveGroup:
    admitted_version: int
    accepted: bool = False


class GateMachine(RuleBasedStateMachine):
    """Groups end in any order and any way; the learner trains on them in the order of their admission."""

    @initialize(groups_per_step=st.integers(1, 4), max_staleness=st.integers(0, 3), steps=st.integers(1, 6))
    def start(self, groups_per_step: int, max_staleness: int, steps: int) -> None:
        self.batch, self.bound, self.total = groups_per_step, max_staleness, groups_per_step * steps
        self.gate = StalenessGate(groups_per_step, max_staleness, self.total)
        self.live: list[_LiveGroup] = []

    def _pick(self, data: st.DataObject, accepted: bool) -> _LiveGroup:
        return data.draw(st.sampled_from([group for group in self.live if group.accepted is accepted]))

    def _any_live(self, accepted: bool) -> bool:
        return any(group.accepted is accepted for group in self.live)

    def _batch_is_ready(self) -> bool:
        oldest = self.live[: self.batch]
        return len(oldest) == self.batch and all(group.accepted for group in oldest)

    @precondition(lambda self: self.gate.capacity() > 0)
    @rule()
    def admit(self) -> None:
        self.live.append(_LiveGroup(self.gate.admit()))

    @precondition(lambda self: self._any_live(accepted=False))
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self._pick(data, accepted=False).accepted = True
        self.gate.accept()

    @precondition(lambda self: self._any_live(accepted=False))
    @rule(data=st.data())
    def filter_or_fail(self, data: st.DataObject) -> None:
        self._remove(self._pick(data, accepted=False))
        self.gate.give_back_running()

    @precondition(lambda self: self._any_live(accepted=True))
    @rule(data=st.data())
    def drop_ready(self, data: st.DataObject) -> None:
        self._remove(self._pick(data, accepted=True))
        self.gate.give_back_accepted()

    @precondition(lambda self: self._batch_is_ready())
    @rule()
    def train(self) -> None:
        trained, self.live = self.live[: self.batch], self.live[self.batch :]
        for group in trained:
            assert self.gate.version - group.admitted_version <= self.bound
            assert self.gate.is_fresh(group.admitted_version)
        self.gate.publish(self.gate.version + 1)

    @precondition(lambda self: self.gate.version * self.batch == self.total)
    @rule()
    def rest(self) -> None:
        """A run that is over admits nothing; the machine needs something to do there."""
        assert self.gate.capacity() == 0

    def _remove(self, gone: _LiveGroup) -> None:
        self.live = [group for group in self.live if group is not gone]

    @invariant()
    def counts_are_those_of_the_groups(self) -> None:
        assert self.gate.running == sum(not group.accepted for group in self.live)
        assert self.gate.ready == sum(group.accepted for group in self.live)
        assert self.gate.accepted == self.gate.ready + self.gate.version * self.batch

    @invariant()
    def places_never_exceed_the_limit(self) -> None:
        limit = min((self.gate.version + self.bound + 1) * self.batch, self.total)
        assert 0 <= self.gate.accepted + self.gate.running <= limit
        assert self.gate.capacity() == limit - self.gate.accepted - self.gate.running

    @invariant()
    def learner_never_starves(self) -> None:
        """Whatever was dropped, a run that is not over has a batch under way or may start more."""
        if self.gate.version * self.batch < self.total and len(self.live) < self.batch:
            assert self.gate.capacity() > 0


GateMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_gate_any_interleaving_keeps_counts_limit_and_bound = GateMachine.TestCase
