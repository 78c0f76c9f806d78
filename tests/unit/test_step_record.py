"""A step's record: what is read back is what was written, whatever the batch and however it was packed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maspo_ray.errors import ConfigError
from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Experience,
    Group,
    Outcome,
    Prompt,
    Rollout,
    SampledGroup,
    Verdict,
    VersionSpan,
)
from maspo_ray.packing import Bundle, Item, RankPlan, pack
from maspo_ray.run_dir.step_record import number_references, read_step, write_step


def _batch(seed: int, num_groups: int, size: int, kl: bool) -> tuple[list[Experience], dict[Any, Any]]:
    """Returns experiences of random lengths, tokens and versions, and what their references refer to.

    Some completions could not be scored; these and others are left out.
    """
    rng = np.random.default_rng(seed)
    experiences, values = [], {}
    for group_id in rng.permutation(1000)[:num_groups].tolist():
        prompt = Prompt(f"rows/{group_id}", "a text", rng.integers(0, 70_000, rng.integers(1, 6)).astype(np.int32), "4")
        payload, replica = f"payload {group_id}", int(rng.integers(0, 300))
        completions = tuple(_completion(rng) for _ in range(size))
        values[payload] = SampledGroup(prompt, completions)
        rollouts = []
        for completion in completions:
            scored = rollouts == [] or rng.random() < 0.8
            verdict = Verdict(float(rng.random()), True) if scored else Verdict.unscored(Outcome.ERROR, "")
            rollouts.append(Rollout(CompletionFacts.of(completion), verdict))
        seeds = tuple(rng.integers(0, 2**63 - 1, size).tolist())
        prompt_tokens = len(prompt.token_ids)
        group = Group(group_id, prompt.prompt_id, payload, prompt_tokens, 3, replica, tuple(rollouts), seeds)
        if kl:
            values[f"reference {group_id}"] = [
                rng.normal(size=len(c.token_ids)).astype(np.float32) for c in completions
            ]
        left_out = [
            i > 0 and not (rollout.verdict.outcome is Outcome.SCORED and rng.random() < 0.8)
            for i, rollout in enumerate(rollouts)
        ]
        advantages = tuple(None if out else float(rng.normal()) for out in left_out)
        experiences.append(Experience(group, advantages, f"reference {group_id}" if kl else None))
    return experiences, values


def _completion(rng: np.random.Generator) -> Completion:
    ends = sorted(set(rng.integers(1, 300, rng.integers(1, 4)).tolist()))
    spans = [VersionSpan(3 + i, start, end) for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    logprobs = rng.normal(size=ends[-1]).astype(np.float32)
    logprobs[0] = rng.choice(np.array([-0.0, np.nan, -np.inf, -1.5], np.float32))
    ids = rng.integers(0, 70_000, ends[-1]).astype(np.int32)
    return Completion(ids, logprobs, tuple(spans), str(rng.choice(["stop", "length"])), "a text")


def _resolved(plans: Sequence[RankPlan], payloads: Sequence[Any]) -> list[Any]:
    """Returns what a rank computes with, in its order: plans whose positions are replaced by what they speak of, as bytes."""

    def item(bundle: Bundle, item: Item) -> list[Any]:
        completion = payloads[bundle.payload].completions[item.sample]
        reference = None if bundle.reference is None else payloads[bundle.reference][item.sample]
        return [
            (completion.token_ids.dtype, completion.token_ids.tobytes()),
            (completion.logprobs.dtype, completion.logprobs.tobytes()),
            (completion.spans, completion.finish_reason),
            None if reference is None else (reference.dtype, reference.tobytes()),
            item,
        ]

    def bundle(bundle: Bundle) -> list[Any]:
        prompt = payloads[bundle.payload].prompt
        facts = (bundle.group_id, bundle.replica, prompt.prompt_id, prompt.token_ids.dtype, prompt.token_ids.tobytes())
        return [facts, [item(bundle, own) for own in bundle.items]]

    return [(plan.batch_tokens, [[bundle(own) for own in bundles] for bundles in plan.micro_batches]) for plan in plans]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    ranks=st.integers(1, 3),
    updates=st.integers(1, 2),
    size=st.integers(1, 5),
    max_tokens=st.integers(1, 1000),
    share=st.booleans(),
    kl=st.booleans(),
)
def test_record_read_back_gives_every_rank_the_same_plans_and_contents(
    tmp_path: Path, seed: int, ranks: int, updates: int, size: int, max_tokens: int, share: bool, kl: bool
) -> None:
    batch, values = _batch(seed, ranks * updates, size, kl)
    shares = pack(batch, ranks, max_tokens, share, updates)
    path = tmp_path / "steps" / "step_000007.npz"
    own, own_shares, references = number_references(batch, shares)
    # A rank is sent what it trains on; the record holds every group of the batch, and all that is referred to.
    assert set(references) == values.keys()
    write_step(path, 7, 6, own, own_shares, {i: values[reference] for i, reference in enumerate(references)})
    record = read_step(path)
    assert (record.step, record.version, len(record.shares)) == (7, 6, ranks)
    for (plans, references), (read_plans, payloads) in zip(shares, record.shares, strict=True):
        assert _resolved(plans, [values[of] for of in references]) == _resolved(read_plans, payloads)
    for experience, group in zip(batch, record.groups, strict=True):
        own = experience.group
        assert (group.group_id, group.submitted_version, group.seeds) == (own.group_id, 3, own.seeds)
        assert (group.replica, group.sampled.prompt.prompt_id) == (own.replica, own.prompt_id)
        assert group.advantages == experience.advantages
        # NaN, which a completion has that could not be scored, equals nothing.
        assert np.array_equal(group.rewards, own.rewards, equal_nan=True)
        in_order = values[own.payload].completions
        assert [c.token_ids.tolist() for c in group.sampled.completions] == [c.token_ids.tolist() for c in in_order]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_record_sends_a_rank_only_what_its_plans_speak_of(tmp_path: Path) -> None:
    batch, values = _batch(0, 4, 2, kl=True)
    write_step(tmp_path / "step.npz", 1, 0, batch, pack(batch, 2, 4096, True), values)
    for plans, payloads in read_step(tmp_path / "step.npz").shares:
        groups = {bundle.group_id for plan in plans for bundles in plan.micro_batches for bundle in bundles}
        # What was sampled and its references for each of its groups, out of two places for each of 4.
        assert sum(payload is not None for payload in payloads) == 2 * len(groups) < 2 * 4 == len(payloads)


def test_record_without_seeds_says_that_the_engine_chose(tmp_path: Path) -> None:
    batch, values = _batch(0, 1, 3, kl=False)
    group = batch[0].group
    batch = [Experience(replace(group, seeds=()), batch[0].advantages)]
    write_step(tmp_path / "step.npz", 1, 0, batch, pack(batch, 1, 4096, True), values)
    assert read_step(tmp_path / "step.npz").groups[0].seeds == (-1, -1, -1)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "there is no such file"), (b"", "it cannot be read"), (b"PK not a zip", "it cannot be read")],
)
def test_record_that_is_gone_or_broken_is_one_line(tmp_path: Path, content: bytes | None, cause: str) -> None:
    path = tmp_path / "step_000003.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_step(path)
    assert str(error.value).startswith(f"the step's record is {path}; {cause}")
    assert "\n" not in str(error.value)


def test_record_cut_off_is_refused(tmp_path: Path) -> None:
    batch, values = _batch(0, 2, 3, kl=True)
    path = tmp_path / "step.npz"
    write_step(path, 1, 0, batch, pack(batch, 1, 4096, True), values)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="it cannot be read"):
        read_step(path)
