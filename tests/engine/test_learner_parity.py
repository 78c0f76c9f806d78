"""How far engines are from the learner, as it finds in training's own pass, against |Δ log-prob| by plain PyTorch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from learners import random_batch, sequence_logprobs, start_learners
from transformers import AutoModelForCausalLM

from maspo_ray.experience import Completion, Experience, Parity, SampledGroup, UpdateReport, VersionSpan
from maspo_ray.packing import pack

pytestmark = [pytest.mark.engine, pytest.mark.ray]
VERSION = 4


def _spans(size: int, fresh: bool) -> tuple[VersionSpan, ...]:
    """Returns the spans of a completion that began with the weights that meet the batch, or of one that only went on under them."""
    if fresh or size == 1:
        return (VersionSpan(VERSION if fresh else VERSION - 1, 0, size),)
    return VersionSpan(VERSION - 1, 0, 1), VersionSpan(VERSION, 1, size)


def _sampled(experience: Experience, completions: Sequence[Completion], replica: int) -> Experience:
    """Returns the experience with other completions of as many tokens, from another replica."""
    payload = SampledGroup(ray.get(experience.group.payload).prompt, tuple(completions))
    return replace(experience, group=replace(experience.group, payload=ray.put(payload), replica=replica))


def _by_engines(
    model: torch.nn.Module, experiences: Sequence[Experience], with_nan: bool
) -> tuple[list[Experience], list[tuple[int, np.ndarray]]]:
    """Returns experiences whose behaviour log-probs are the model's, but for a difference, and by group the replica and the differences
    of the tokens that count.

    Replica 0 is off by 0.01 in all tokens; it has a completion that began a version ago, by far too far off. Replica 1 is off by noise, in
    groups 1 and 3; replica 2 has nothing that began with the weights of now.
    """
    rng = np.random.default_rng(1)
    found, deltas = [], []
    for g, experience in enumerate(experiences):
        group = ray.get(experience.group.payload)
        replica = (0, 1, 2, 1)[g]
        own, counted = [], []
        for i, completion in enumerate(group.completions):
            with torch.no_grad():
                logprobs = sequence_logprobs(model, group.prompt, completion).numpy()
            size = len(logprobs)
            delta = np.full(size, 0.01) if replica == 0 else rng.normal(size=size) * 1e-3
            fresh = replica < 2 and not (replica == 0 and i == 1)
            if not fresh:
                delta += 5.0
            if with_nan and g == 1 and i == 0:
                delta[-1] = np.nan
            logprobs = (logprobs + delta).astype(np.float32)
            own.append(replace(completion, logprobs=logprobs, spans=_spans(size, fresh)))
            if fresh:
                counted.append(np.abs(delta[np.isfinite(delta)]))
        found.append(_sampled(experience, own, replica))
        deltas.append((replica, np.concatenate(counted) if counted else np.zeros(0)))
    return found, deltas


def _parities(deltas: Sequence[tuple[int, np.ndarray]]) -> dict[int, Parity]:
    """Returns what the differences of some groups come to."""
    found = {}
    for replica in sorted({replica for replica, own in deltas if len(own)}):
        all_of_it = np.concatenate([own for other, own in deltas if other == replica])
        found[replica] = Parity(float(all_of_it.max()), float(all_of_it.mean()), len(all_of_it))
    return found


def _assert_same(found: dict[int, Parity], expected: dict[int, Parity]) -> None:
    assert found.keys() == expected.keys()
    for replica, parity in found.items():
        known = expected[replica]
        assert parity.tokens == known.tokens
        # In float32 log-probs of -4 are exact to 2.4e-7 and sums over the vocabulary to a few times that.
        assert (parity.max, parity.mean) == pytest.approx((known.max, known.mean), abs=5e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_parity_is_of_the_tokens_of_the_weights_that_meet_them_by_replica_for_any_cut(
    tiny_model: str, own_ray: None, ranks: int
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    experiences, _ = random_batch(0)
    broken, deltas = _by_engines(model, experiences, with_nan=True)
    expected = _parities(deltas)
    assert expected.keys() == {0, 1}
    assert (expected[0].max, expected[0].mean) == pytest.approx((0.01, 0.01))
    whole, whole_deltas = _by_engines(model, experiences, with_nan=False)
    assert _parities(whole_deltas)[1].tokens == expected[1].tokens + 1
    actors = start_learners(tiny_model, ranks, None, 4096)

    def step(batch: Sequence[Experience], max_tokens: int, share: bool, updates: int = 1) -> list[list[UpdateReport]]:
        plans = pack(batch, ranks, max_tokens, share, updates)
        return ray.get(
            [a.train_step.remote(VERSION, own, *payloads) for a, (own, payloads) in zip(actors, plans, strict=True)]
        )

    try:
        # A log-prob that is no number does not count, nor does it hide the others; and it has the update left out, so that the same
        # weights meet the batch each time.
        for max_tokens, share in ((4096, True), (24, True), (40, False)):
            for [report] in step(broken, max_tokens, share):
                assert not report.applied
                _assert_same(report.parity, expected)
        # The second update meets other weights.
        for first, second in step(whole, 24, True, updates=2):
            assert first.applied and second.applied
            _assert_same(first.parity, _parities(whole_deltas[:2]))
            assert second.parity == {}
    finally:
        for actor in actors:
            ray.kill(actor)
