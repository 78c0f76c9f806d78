"""The whole pipeline before simulated actors, in virtual time: every group ends once, and nothing too old is trained on."""

import asyncio
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulated import Behaviour, SimulatedFleet, VirtualLoop, simulated_config, simulated_pipeline
from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.controller import _first_cause
from maspo_ray.errors import ActorLate, RunError
from maspo_ray.evaluation.evaluator import EvalResult, Evaluator
from maspo_ray.experience import Prompt, UpdateReport

PROMPTS = [Prompt(f"p/{i}", "", np.arange(5, dtype=np.int32), "") for i in range(7)]


@dataclass
class _Seen:
    """What came of a run: the ledger's rows, the counts, and what the learner was given."""

    counts: dict[str, int] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    batches: list[set[int]] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    left_running: int = 0
    payloads: list[Any] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def train(self, version: int, shares: Sequence[Any], applied: Sequence[bool]) -> None:
        self.batches.append(set())
        self.alive.append(sum(reference() is not None for reference in self.payloads))
        for plans, payloads in shares:
            self.payloads += [weakref.ref(payload) for payload in payloads]
            for plan, done in zip(plans, applied, strict=True):
                bundles = [bundle for micro_batch in plan.micro_batches for bundle in micro_batch]
                self.batches[-1].update(bundle.group_id for bundle in bundles)
                (self.trained if done else self.left_out).extend(bundle.group_id for bundle in bundles)
                for bundle in bundles:
                    completions = payloads[bundle.payload].value.completions
                    self.staleness += [version - completions[item.sample].spans[0].version for item in bundle.items]


def _run(
    folder: Path,
    behaviour: Behaviour,
    *,
    steps: int,
    engines: int = 4,
    ranks: int = 2,
    updates: int = 1,
    evaluator: Any = None,
    break_it: Callable[[SimulatedFleet], None] | None = None,
    seen: _Seen | None = None,
    timeout_s: float | None = None,
    **pipeline: Any,
) -> _Seen:
    seen, loop = seen or _Seen(), VirtualLoop()
    config = simulated_config(folder, steps=steps, **pipeline)
    config = config.model_copy(
        update={
            "learner": config.learner.model_copy(update={"updates_per_batch": updates}),
            "eval": config.eval.model_copy(update={"every": 1}),
            "rollout": config.rollout.model_copy(update={"timeout_s": timeout_s or config.rollout.timeout_s}),
        }
    )

    async def main() -> None:
        fleet = SimulatedFleet(loop, engines, 3, ranks, behaviour)
        fleet.on_train = seen.train
        if break_it is not None:
            break_it(fleet)
        run, journal, pool = await simulated_pipeline(config, fleet, PROMPTS, evaluator)
        if evaluator is not None:
            evaluator.pool = pool
        try:
            await run.run()
        finally:
            journal.close()
            # What ends with the groups that it is of, as a call to an actor does.
            for _ in range(3):
                await asyncio.sleep(0)
            seen.left_running = len(asyncio.all_tasks()) - 1
            seen.metrics = _lines(folder / "metrics.jsonl")
            seen.counts = run.group_counts
            seen.rows = _lines(folder / "ledger.jsonl")
            seen.evaluations = _lines(folder / "eval.jsonl")
            seen.notes = [row["note"] for row in _lines(folder / "notes.jsonl")]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
    return seen


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _check_books(seen: _Seen, max_staleness: int) -> None:
    ended = [row["group_id"] for row in seen.rows]
    assert sorted(ended) == list(range(seen.counts["submitted"]))
    outcomes = Counter(row["outcome"] for row in seen.rows)
    assert seen.counts == {"submitted": len(ended)} | {
        name: outcomes[name] for name in ("trained", "filtered", "stale", "failed")
    }
    # A group's completions may lie in several micro-batches of an update; no group is in two updates.
    assert {row["group_id"] for row in seen.rows if row["outcome"] == "trained"} == set(seen.trained)
    assert not set(seen.trained) & set(seen.left_out)
    assert sum(map(len, seen.batches)) == len(set(seen.trained) | set(seen.left_out))
    assert all(0 <= behind <= max_staleness for behind in seen.staleness)
    for row in seen.rows:
        if row["outcome"] == "trained":
            assert row["step"] - 1 - row["min_version"] <= max_staleness


def test_pipeline_of_many_engines_trains_fresh_groups_and_counts_the_others(tmp_path: Path) -> None:
    behaviour = Behaviour(sigma=1.0, train_s=60.0, unscorable_share=0.02)
    seen = _run(tmp_path, behaviour, engines=16, steps=8, groups_per_step=48, max_staleness=3)
    _check_books(seen, max_staleness=3)
    assert seen.counts["trained"] == 8 * 48
    # What is under way is bounded, by (η + 1) · B.
    under_way = [row["groups/running"] + row["groups/ready"] for row in seen.metrics]
    assert len(under_way) == 8 and max(under_way) == 4 * 48
    assert [row["object_store/used_mib"] for row in seen.metrics] == [0.0] * 8
    # A fifth is filtered; with σ = 1 a group's slowest of 8 often takes longer than 4 steps.
    assert min(seen.counts[outcome] for outcome in ("filtered", "stale", "failed")) > 5
    assert max(seen.staleness) == 3
    # Most of what is too old is cancelled in its engine, and not refused when it is done.
    stale = [row for row in seen.rows if row["outcome"] == "stale"]
    assert sum("cancelled" in row.get("cause", "") for row in stale) > len(stale) / 2


def test_pipeline_without_staleness_is_on_policy(tmp_path: Path) -> None:
    seen = _run(tmp_path, Behaviour(), steps=4, groups_per_step=8, max_staleness=0)
    _check_books(seen, max_staleness=0)
    assert (seen.counts["trained"], seen.counts["stale"], set(seen.staleness)) == (32, 0, {0})


def test_pipeline_whose_groups_carry_no_signal_ends_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        _run(tmp_path, Behaviour(filtered_share=1.0), steps=1, groups_per_step=4, max_dropped_in_a_row=9)
    assert caught.group_contains(RunError, match="the last 9 groups could not be trained on")
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    # Admission fills (η + 1) · B = 8 places; each filtered group gives its place to another.
    assert [row["group_id"] for row in sorted(rows, key=lambda row: row["group_id"])] == list(range(len(rows)))
    assert Counter(row["outcome"] for row in rows)["filtered"] == 9


def _fail(*_: object) -> None:
    raise RunError("a part of the run is gone")


async def _fail_when_called(*_: object, **__: object) -> None:
    raise RunError("a part of the run is gone")


def _fail_in_training(fleet: SimulatedFleet) -> None:
    fleet.on_train = _fail


def _fail_in_publishing(fleet: SimulatedFleet) -> None:
    fleet.on_publish = lambda version: _fail() if version == 2 else None


def _fail_in_a_beat(fleet: SimulatedFleet) -> None:
    fleet.hosts[2].beat = _fail_when_called  # type: ignore[method-assign]


def _fail_in_generating(fleet: SimulatedFleet) -> None:
    def fail(version: int) -> None:
        if version == 1:
            fleet.hosts[1]._engine.sample = _fail_when_called  # type: ignore[method-assign,assignment]

    fleet.on_publish = fail


def _fail_in_scoring(fleet: SimulatedFleet) -> None:
    fleet._score = _fail_when_called  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    "break_it",
    [_fail_in_training, _fail_in_publishing, _fail_in_a_beat, _fail_in_generating, _fail_in_scoring],
)
def test_pipeline_wherever_it_fails_ends_with_the_cause_and_leaves_nothing_running(
    tmp_path: Path, break_it: Callable[[SimulatedFleet], None]
) -> None:
    seen = _Seen()
    with pytest.raises(ExceptionGroup) as caught:
        _run(tmp_path, Behaviour(), steps=9, groups_per_step=8, max_staleness=1, break_it=break_it, seen=seen)
    cause = _first_cause(caught.value)
    assert isinstance(cause, RunError) and str(cause) == "a part of the run is gone"
    assert seen.left_running == 0
    assert sorted(row["group_id"] for row in seen.rows) == list(range(seen.counts["submitted"]))
    assert seen.counts["submitted"] == sum(seen.counts.values()) - seen.counts["submitted"] > 0


class _SlowEvaluator:
    """Takes long, and notes the versions at its beginning and at its end."""

    pool: Any = None

    def __init__(self, fleet_of: list[SimulatedFleet], takes_s: float) -> None:
        self._fleets = fleet_of
        self._takes_s = takes_s

    async def evaluate(self) -> EvalResult:
        [fleet] = self._fleets
        before = fleet.hosts[0]._version
        await asyncio.sleep(self._takes_s)
        return EvalResult(0.5, 1, 1, 0, before, fleet.hosts[0]._version)


class _RealEvaluator:
    """Evaluates as a run does."""

    pool: Any = None

    async def evaluate(self) -> EvalResult:
        return await Evaluator(
            self.pool, PROMPTS, EvalConfig(samples=3), RolloutConfig(max_new_tokens=64), 5
        ).evaluate()


def test_pipeline_trains_while_it_evaluates_but_for_the_first_and_the_last(tmp_path: Path) -> None:
    fleets: list[SimulatedFleet] = []
    seen = _run(
        tmp_path,
        Behaviour(),
        steps=6,
        groups_per_step=8,
        max_staleness=1,
        evaluator=_SlowEvaluator(fleets, 400.0),
        break_it=fleets.append,
    )
    # Each takes as long as a few steps. The first is over before the first update, the last has nothing after it, and of those between
    # one runs after the other, over the versions that come meanwhile.
    assert [row["step"] for row in seen.evaluations] == list(range(7))
    versions = [(row["version"], row["max_version"]) for row in seen.evaluations]
    assert versions[0] == (0, 0) and versions[-1] == (6, 6)
    assert versions[1][0] == 1 and versions[1][1] > 1


def test_pipeline_without_staleness_waits_for_each_evaluation(tmp_path: Path) -> None:
    fleets: list[SimulatedFleet] = []
    evaluator = _SlowEvaluator(fleets, 400.0)
    seen = _run(
        tmp_path, Behaviour(), steps=3, groups_per_step=4, max_staleness=0, evaluator=evaluator, break_it=fleets.append
    )
    assert [(row["version"], row["max_version"]) for row in seen.evaluations] == [(i, i) for i in range(4)]


def test_pipeline_counts_of_all_rows_add_up_to_the_ledger(tmp_path: Path) -> None:
    fleets: list[SimulatedFleet] = []
    behaviour = Behaviour(sigma=1.0, train_s=60.0, unscorable_share=0.05)
    evaluator = _RealEvaluator()
    seen = _run(
        tmp_path,
        behaviour,
        engines=16,
        steps=8,
        groups_per_step=48,
        max_staleness=2,
        evaluator=evaluator,
        break_it=fleets.append,
    )
    for outcome in ("filtered", "stale", "failed"):
        assert sum(row[f"groups/{outcome}"] for row in seen.metrics) == seen.counts[outcome] > 0
    cancelled = [row for row in seen.rows if "cancelled" in row.get("cause", "")]
    assert sum(row["groups/cancelled"] for row in seen.metrics) == len(cancelled) > 0
    # Every completion that ended is in a row, also of groups that were then filtered, cancelled or too late.
    assert sum(row["tokens/generated"] for row in seen.metrics) == sum(fleets[0].tokens_ended)
    assert all(row.keys() == seen.metrics[0].keys() for row in seen.metrics)


def test_pipeline_lets_go_of_a_batch_once_it_is_trained(tmp_path: Path) -> None:
    seen = _run(tmp_path, Behaviour(), steps=5, groups_per_step=8, max_staleness=1)
    # When a batch is trained on, nothing is alive any more of those before it.
    assert seen.alive == [0] * 5


def test_pipeline_says_what_it_waits_for_when_it_waits_long(tmp_path: Path) -> None:
    def slow_down(fleet: SimulatedFleet) -> None:
        def slow(version: int) -> None:
            if version == 3:
                fleet.completion_s = iter(lambda: 2500.0, None)

        fleet.on_publish = slow

    seen = _run(tmp_path, Behaviour(), engines=2, steps=6, groups_per_step=4, max_staleness=1, break_it=slow_down)
    [first, *_] = [note for note in seen.notes if "for the groups of step" in note]
    assert re.fullmatch(
        r"waiting for \d+ s for the groups of step \d: \d of 4 ready, \d on the way "
        r"\(\d with rollout/\d, \d with rollout/\d; the oldest for \d+ s\)",
        first,
    )


def test_pipeline_whose_engine_hangs_ends_by_its_deadline_with_its_name(tmp_path: Path) -> None:
    def hang(fleet: SimulatedFleet) -> None:
        async def never(*_: object, **__: object) -> None:
            await asyncio.Event().wait()

        def stop(version: int) -> None:
            if version == 2:
                fleet.hosts[1]._engine.sample = never  # type: ignore[method-assign,assignment]

        fleet.on_publish = stop

    seen = _Seen()
    with pytest.raises(ExceptionGroup) as caught:
        _run(
            tmp_path,
            Behaviour(),
            steps=9,
            groups_per_step=8,
            max_staleness=1,
            break_it=hang,
            seen=seen,
            timeout_s=3600.0,
        )
    cause = _first_cause(caught.value)
    assert isinstance(cause, ActorLate) and (cause.role, cause.replica) == ("rollout", 1)
    assert re.match(r"rollout/1 has ended no completion for 36\d\d s.*rollout.timeout_s is 3600", str(cause))
    assert seen.left_running == 0


def test_pipeline_whose_engine_misses_an_update_ends_with_its_name(tmp_path: Path) -> None:
    def miss(fleet: SimulatedFleet) -> None:
        async def nothing(weight_version: int) -> None:
            pass

        fleet.hosts[2]._engine.finish_weight_update = nothing  # type: ignore[method-assign]

    with pytest.raises(ExceptionGroup) as caught:
        _run(tmp_path, Behaviour(), steps=3, groups_per_step=8, max_staleness=1, break_it=miss)
    assert str(_first_cause(caught.value)).startswith("rollout/2 did not take up version 1: ")


def test_pipeline_whose_gradient_is_zero_goes_on(tmp_path: Path) -> None:
    def zero(fleet: SimulatedFleet) -> None:
        train = fleet.learner.train

        async def train_for_nothing(version: int, shares: Sequence[Any]) -> list[UpdateReport]:
            reports = await train(version, shares)
            fleet.changed_at.clear()
            return [replace(r, metrics=r.metrics | {"learner/update_to_weight": 0.0}) for r in reports]

        fleet.learner.train = train_for_nothing  # type: ignore[method-assign]

    seen = _run(tmp_path, Behaviour(), steps=2, groups_per_step=4, break_it=zero)
    assert seen.counts["trained"] == 8


def test_pipeline_trains_on_what_the_late_policy_lets_in(tmp_path: Path) -> None:
    late_policy = {"path": "maspo_ray.groups.late_policy:TrainStale", "args": {"max_lag": 4}}
    behaviour = Behaviour(sigma=1.2, train_s=20.0)
    seen = _run(tmp_path, behaviour, engines=16, steps=10, groups_per_step=16, max_staleness=1, late_policy=late_policy)
    _check_books(seen, max_staleness=4)
    assert max(seen.staleness) > 1
    assert max(row["staleness/over_bound_share"] for row in seen.metrics) > 0


@settings(max_examples=25, deadline=None)
@given(
    behaviour=st.builds(
        Behaviour,
        sigma=st.floats(0.1, 1.5),
        train_s=st.floats(1.0, 300.0),
        publish_s=st.floats(0.1, 50.0),
        score_s=st.floats(0.01, 100.0),
        filtered_share=st.floats(0.0, 0.5),
        unscored_share=st.floats(0.0, 0.12),
        unscorable_share=st.floats(0.0, 0.3),
        skipped_share=st.floats(0.0, 0.5),
        seed=st.integers(0, 2**32),
    ),
    max_staleness=st.integers(0, 3),
    steps=st.integers(1, 4),
    engines=st.integers(1, 5),
    ranks=st.integers(1, 3),
    updates=st.integers(1, 2),
)
def test_pipeline_whatever_the_actors_do_every_group_ends_once(
    tmp_path_factory: pytest.TempPathFactory, behaviour: Behaviour, max_staleness: int, steps: int, **sizes: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    seen = _run(folder, behaviour, steps=steps, groups_per_step=6, max_staleness=max_staleness, **sizes)
    _check_books(seen, max_staleness)
    left_out = len(set(seen.left_out))
    assert (seen.counts["trained"] + left_out, left_out) == (6 * steps, left_out)
    failed_updates = [row for row in seen.rows if row.get("cause") == "its update was left out"]
    assert {row["group_id"] for row in failed_updates} == set(seen.left_out)
