"""Which replica takes the next piece of work: by hand, then by a machine that tries every order of events against a plain model."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maspo_ray.hosts.engine_table import EngineTable, ReplicaState

UP, UPDATING, AWAY = ReplicaState.UP, ReplicaState.UPDATING, ReplicaState.AWAY


def test_table_gives_work_to_the_least_loaded_and_the_first_of_equals() -> None:
    table = EngineTable(3)
    # 5 | 5 4 | 5 4 3, then 3 + 3 on the last, and 4 + 1 before 5 and 6.
    assert [table.take(work, 0.0) for work in (5, 4, 3, 3, 1)] == [0, 1, 2, 2, 1]
    assert [table.outstanding(replica) for replica in range(3)] == [5, 5, 6]
    table.give_back(0, 5, 1.0)
    assert table.take(9, 1.0) == 0


def test_table_gives_one_that_updates_work_only_where_none_is_up() -> None:
    table = EngineTable(2)
    table.take(1000, 0.0)
    table.set_state([1], UPDATING)
    assert table.take(1, 0.0) == 0
    table.set_state([0], UPDATING)
    assert table.take(1, 0.0) == 1
    table.set_state([0, 1], UP)
    assert [table.outstanding(replica) for replica in range(2)] == [1001, 1]


def test_table_gives_one_that_is_away_nothing_and_keeps_what_it_has() -> None:
    table = EngineTable(2)
    assert table.take(7, 0.0, only=1) == 1
    table.set_state([1], AWAY)
    assert table.take(1, 0.0, only=1) is None
    table.set_state([0], UPDATING)
    assert table.take(1, 0.0) == 0
    table.set_state([0], AWAY)
    assert table.take(1, 0.0) is None
    assert table.outstanding(1) == 7
    table.give_back(1, 7, 0.0)
    assert (table.outstanding(1), table.state(1)) == (0, AWAY)


def test_table_silence_counts_from_the_first_work_or_the_last_sign_whichever_came_later() -> None:
    table = EngineTable(2)
    table.hear(0, 50.0)
    assert table.silences(100.0) == {}
    table.take(1, 100.0, only=0)
    # More work is no sign of life.
    table.take(1, 104.0, only=0)
    assert table.silences(105.0) == {0: 5.0}
    table.hear(0, 106.0)
    assert table.silences(108.0) == {0: 2.0}
    # Nor is that it was given up; what it answered is.
    table.give_back(0, 1, None)
    assert table.silences(109.0) == {0: 3.0}
    table.take(1, 109.0, only=0)
    table.give_back(0, 1, 110.0)
    assert table.silences(111.0) == {0: 1.0}
    table.give_back(0, 1, 112.0)
    assert table.silences(200.0) == {}
    table.take(1, 300.0, only=0)
    assert table.silences(301.0) == {0: 1.0}


def test_table_more_given_back_than_taken_is_refused() -> None:
    table = EngineTable(1)
    with pytest.raises(AssertionError, match="it has none"):
        table.give_back(0, 0, 0.0)
    table.take(3, 0.0)
    with pytest.raises(AssertionError, match="less work than 4"):
        table.lighten(0, 4)
    with pytest.raises(AssertionError, match="less work than -1"):
        table.lighten(0, -1)
    table.lighten(0, 2)
    with pytest.raises(AssertionError, match="less work than 2"):
        table.give_back(0, 2, 0.0)


@dataclass(slots=True)
class _Replica:
    """Attributes: pieces: what each has left; silent_since: None where it has no work."""

    state: ReplicaState = UP
    pieces: list[int] = field(default_factory=list)
    silent_since: float | None = None


class TableMachine(RuleBasedStateMachine):
    """Replicas update, go and come back while pieces of work of any size begin, shrink and end."""

    @initialize(replicas=st.integers(1, 4))
    def start(self, replicas: int) -> None:
        self.table = EngineTable(replicas)
        self.model = [_Replica() for _ in range(replicas)]
        self.now = 0.0

    def _pick(self, data: st.DataObject) -> tuple[int, int]:
        """Returns a replica with work and one of its pieces."""
        replica = data.draw(st.sampled_from([i for i, own in enumerate(self.model) if own.pieces]))
        return replica, data.draw(st.integers(0, len(self.model[replica].pieces) - 1))

    def _expected(self) -> int | None:
        for state in (UP, UPDATING):
            loads = {i: sum(own.pieces) for i, own in enumerate(self.model) if own.state is state}
            if loads:
                return min(loads, key=lambda i: (loads[i], i))
        return None

    def _taken(self, replica: int, work: int) -> None:
        own = self.model[replica]
        if not own.pieces:
            own.silent_since = self.now
        own.pieces.append(work)

    @rule(work=st.integers(0, 100_000))
    def take(self, work: int) -> None:
        expected = self._expected()
        assert self.table.take(work, self.now) == expected
        if expected is not None:
            self._taken(expected, work)

    @rule(work=st.integers(0, 100), data=st.data())
    def take_by_one(self, work: int, data: st.DataObject) -> None:
        only = data.draw(st.integers(0, len(self.model) - 1))
        away = self.model[only].state is AWAY
        assert self.table.take(work, self.now, only) == (None if away else only)
        if not away:
            self._taken(only, work)

    @precondition(lambda self: any(own.pieces for own in self.model))
    @rule(data=st.data())
    def lighten(self, data: st.DataObject) -> None:
        replica, piece = self._pick(data)
        done = data.draw(st.integers(0, self.model[replica].pieces[piece]))
        self.table.lighten(replica, done)
        self.model[replica].pieces[piece] -= done

    @precondition(lambda self: any(own.pieces for own in self.model))
    @rule(data=st.data(), answered=st.booleans())
    def give_back(self, data: st.DataObject, answered: bool) -> None:
        replica, piece = self._pick(data)
        own = self.model[replica]
        self.table.give_back(replica, own.pieces.pop(piece), self.now if answered else None)
        if answered:
            own.silent_since = self.now

    @rule(data=st.data(), state=st.sampled_from(ReplicaState))
    def move(self, data: st.DataObject, state: ReplicaState) -> None:
        replicas = data.draw(st.sets(st.integers(0, len(self.model) - 1)))
        self.table.set_state(replicas, state)
        for replica in replicas:
            self.model[replica].state = state

    @rule(data=st.data())
    def hear(self, data: st.DataObject) -> None:
        replica = data.draw(st.integers(0, len(self.model) - 1))
        self.table.hear(replica, self.now)
        self.model[replica].silent_since = self.now

    @rule(seconds=st.integers(1, 50))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def loads_are_those_of_the_pieces(self) -> None:
        for replica, own in enumerate(self.model):
            assert self.table.outstanding(replica) == sum(own.pieces) >= 0
            assert self.table.state(replica) is own.state

    @invariant()
    def silences_are_of_those_with_work(self) -> None:
        known = {
            i: self.now - own.silent_since
            for i, own in enumerate(self.model)
            if own.pieces and own.silent_since is not None
        }
        assert self.table.silences(self.now) == known
        assert len(known) == sum(bool(own.pieces) for own in self.model)


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_table_any_interleaving_is_as_a_plain_model_says = TableMachine.TestCase
