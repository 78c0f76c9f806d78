"""The intake as a state machine: whatever happens in whatever order, every group ends once and nothing too old is trained on."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maspo_ray.errors import ConfigError
from maspo_ray.experience import CompletionFacts, Experience, Group, Rollout, Verdict
from maspo_ray.groups.intake import Intake
from maspo_ray.groups.late_policy import DropStale, TrainStale
from maspo_ray.groups.ledger import GroupOutcome


def _experience(group_id: int, submitted: int, min_version: int, max_version: int) -> Experience:
    facts = CompletionFacts(4, min_version, max_version, "stop")
    rollout = Rollout(facts, Verdict.from_reward(1.0))
    return Experience(Group(group_id, f"train/{group_id}", f"payload {group_id}", 3, submitted, 0, (rollout,)), (1.0,))


class IntakeMachine(RuleBasedStateMachine):
    """Groups start, end, expire and age in any order; the learner takes what is there."""

    @initialize(
        batch=st.integers(1, 4), bound=st.integers(0, 3), steps=st.integers(1, 6), extra=st.none() | st.integers(0, 2)
    )
    def start(self, batch: int, bound: int, steps: int, extra: int | None) -> None:
        self.batch, self.bound, self.steps = batch, bound, steps
        self.max_lag = bound if extra is None else bound + extra
        policy = DropStale(bound) if extra is None else TrainStale(bound, bound + extra)
        self.rows: list[dict[str, Any]] = []
        self.intake = Intake(batch, bound, steps, policy, self.rows.append)
        # The versions at which running groups were admitted; the ready ones as they were accepted.
        self.running: dict[int, int] = {}
        self.ready: dict[int, int] = {}

    def _pick(self, data: st.DataObject) -> tuple[int, int]:
        group_id = data.draw(st.sampled_from(sorted(self.running)))
        return group_id, self.running.pop(group_id)

    @precondition(lambda self: self.intake.capacity() > 0)
    @rule()
    def admit(self) -> None:
        group_id, version = self.intake.admit("train/0")
        assert version == self.intake.version
        self.running[group_id] = version

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        group_id, submitted = self._pick(data)
        # An engine samples a group's first token at any version from its admission on, and goes on under later ones.
        first = data.draw(st.integers(submitted, self.intake.version))
        self.intake.accept(_experience(group_id, submitted, first, data.draw(st.integers(first, self.intake.version))))
        self.ready[group_id] = first

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from([GroupOutcome.FILTERED, GroupOutcome.FAILED]))
    def drop(self, data: st.DataObject, outcome: GroupOutcome) -> None:
        group_id, submitted = self._pick(data)
        self.intake.drop(_experience(group_id, submitted, submitted, submitted).group, outcome, "no signal")

    @precondition(lambda self: any(v < self.intake.oldest_trainable_version for v in self.running.values()))
    @rule()
    def expire(self) -> None:
        oldest = self.intake.oldest_trainable_version
        for group_id in [group_id for group_id, version in self.running.items() if version < oldest]:
            del self.running[group_id]
            self.intake.expired(group_id)

    @precondition(lambda self: self.intake.version < self.steps)
    @rule(applied=st.booleans())
    def train(self, applied: bool) -> None:
        version = self.intake.version
        batch = self.intake.take()
        refused = {group_id for group_id, first in self.ready.items() if version - first > self.max_lag}
        for group_id in refused:
            del self.ready[group_id]
        if batch is None:
            assert len(self.ready) < self.batch
            return
        assert len(batch) == self.batch
        assert all(lag <= self.max_lag for lag in self.intake.lags(batch))
        taken = [self.ready.pop(experience.group.group_id) for experience in batch]
        # The oldest are taken first.
        assert not self.ready or max(taken) <= min(self.ready.values())
        self.intake.publish(version + 1)
        for experience in batch:
            self.intake.trained(experience, version + 1, applied)

    @precondition(lambda self: self.intake.version == self.steps)
    @rule()
    def rest(self) -> None:
        assert self.intake.capacity() == 0 and not self.running and not self.ready

    @invariant()
    def counts_are_those_of_the_groups(self) -> None:
        assert self.intake.running == len(self.running)
        assert self.intake.ready == len(self.ready)
        counts = self.intake.counts
        assert counts["submitted"] == len(self.running) + len(self.ready) + len(self.rows)
        ended = [row["group_id"] for row in self.rows]
        assert len(ended) == len(set(ended))

    @invariant()
    def trained_rows_are_within_the_bound(self) -> None:
        for row in self.rows:
            if row["outcome"] == "trained":
                assert row["step"] - 1 - row["min_version"] <= self.max_lag

    @invariant()
    def learner_never_starves(self) -> None:
        if self.intake.version < self.steps and len(self.running) + len(self.ready) < self.batch:
            assert self.intake.capacity() > 0

    def teardown(self) -> None:
        if hasattr(self, "intake"):
            self.intake.close()
            assert len(self.rows) == self.intake.counts["submitted"]


IntakeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_intake_any_interleaving_ends_every_group_once_and_within_the_bound = IntakeMachine.TestCase


def _aged(policy: Any) -> tuple[Intake, list[dict[str, Any]]]:
    """Returns an intake at version 2, bound 1, with a group ready whose first token is of version 0, and one of version 2."""
    rows: list[dict[str, Any]] = []
    intake = Intake(1, 1, 5, policy, rows.append)
    late, _ = intake.admit("train/late")
    for version in (0, 1):
        group_id, _ = intake.admit("train/quick")
        intake.accept(_experience(group_id, version, version, version))
        [quick] = intake.take() or []
        intake.publish(version + 1)
        intake.trained(quick, version + 1, True)
    intake.accept(_experience(late, 0, 0, 2))
    return intake, rows


def test_take_drops_what_went_past_the_bound_and_gives_its_place_back() -> None:
    intake, rows = _aged(DropStale(1))
    assert (intake.ready, intake.capacity()) == (1, 1)
    assert intake.take() is None
    assert (intake.ready, intake.capacity()) == (0, 2)
    assert (rows[-1]["outcome"], rows[-1]["min_version"], rows[-1]["max_version"]) == ("stale", 0, 2)


def test_take_lets_in_what_the_late_policy_trains_on_before_what_is_fresh() -> None:
    intake, _ = _aged(TrainStale(1, max_lag=2))
    fresh, version = intake.admit("train/fresh")
    intake.accept(_experience(fresh, version, 2, 2))
    [late] = intake.take() or []
    assert (late.group.min_version, intake.lags([late])) == (0, [2])
    assert intake.oldest_trainable_version == 0


def test_late_policy_with_a_lag_below_the_bound_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"max_lag is 0; it must be a whole number, at least pipeline.max_staleness \(1\)"
    ):
        TrainStale(1, max_lag=0)
