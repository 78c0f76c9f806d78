"""The whole pipeline before simulated actors, in virtual time: every group ends once, and nothing too old is trained on."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.simulated import Behaviour, SimulatedFleet, VirtualLoop, simulated_config, simulated_pipeline
from maspo_ray.errors import RunError
from maspo_ray.experience import Prompt

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

    def train(self, arguments: Sequence[Any], applied: Sequence[bool]) -> None:
        self.batches.append(set())
        for version, plans, *payloads in arguments:
            for plan, done in zip(plans, applied, strict=True):
                bundles = [bundle for micro_batch in plan.micro_batches for bundle in micro_batch]
                self.batches[-1].update(bundle.group_id for bundle in bundles)
                (self.trained if done else self.left_out).extend(bundle.group_id for bundle in bundles)
                items = [item for bundle in bundles for item in bundle.items]
                self.staleness += [version - payloads[item.completion[0]].version for item in items]


def _run(
    folder: Path,
    behaviour: Behaviour,
    *,
    steps: int,
    engines: int = 4,
    ranks: int = 2,
    updates: int = 1,
    **pipeline: Any,
) -> _Seen:
    seen, loop = _Seen(), VirtualLoop()
    config = simulated_config(folder, steps=steps, **pipeline)
    config = config.model_copy(update={"learner": config.learner.model_copy(update={"updates_per_batch": updates})})

    async def main() -> None:
        fleet = SimulatedFleet(loop, engines, 3, ranks, behaviour)
        fleet.on_train = seen.train
        run, files = simulated_pipeline(config, fleet, PROMPTS)
        try:
            await run.run()
        finally:
            files.close()
            seen.counts = run.group_counts
            seen.rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())
    return seen


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
