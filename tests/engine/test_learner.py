"""The learner on a real DeepSpeed engine, on one rank and on two, against plain PyTorch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.deepspeed_learner import DeepSpeedLearner
from maspo_ray.config import KLConfig, LearnerConfig, MaspoConfig, ModelConfig
from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Experience,
    Group,
    Prompt,
    Rollout,
    UpdateReport,
    Verdict,
    VersionSpan,
)
from maspo_ray.objectives import policy_loss
from maspo_ray.packing import pack
from maspo_ray.tensor_ops import kl_estimate

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TEMPERATURE, KL, LR, STEPS, IMPORTANCE_CAP = 0.8, 0.1, 1e-3, 3, 1.5
PROBE = np.arange(3, 19, dtype=np.int32)


def _batch(seed: int, groups: int = 4, n: int = 3) -> tuple[list[Experience], list[tuple[Any, ...]]]:
    """Returns experiences of random tokens, and (prompt, completion, old, reference, advantage) of each rollout."""
    rng = np.random.default_rng(seed)
    experiences, rows = [], []
    for group_id in range(groups):
        prompt = Prompt(str(group_id), "", rng.integers(3, 60, size=rng.integers(2, 6)).astype(np.int32), "")
        lengths = rng.integers(1, 12, size=n)
        completions = [
            Completion(
                rng.integers(3, 60, size=k).astype(np.int32),
                (-4 + rng.normal(size=k) * 0.3).astype(np.float32),
                (VersionSpan(0, 0, int(k)),),
                "stop",
                "",
            )
            for k in lengths
        ]
        references = [(-4 + rng.normal(size=k) * 0.3).astype(np.float32) for k in lengths]
        advantages = tuple(float(a) for a in rng.normal(size=n))
        payload = ray.put(completions)
        rollouts = tuple(
            Rollout(payload, i, CompletionFacts.of(c), Verdict.from_reward(1.0)) for i, c in enumerate(completions)
        )
        group = Group(group_id, prompt.prompt_id, ray.put(prompt), len(prompt.token_ids), 0, rollouts)
        experiences.append(Experience(group, advantages, ray.put(references)))
        rows += zip([prompt] * n, completions, references, advantages, strict=True)
    return experiences, rows


Row = tuple[Prompt, Completion, np.ndarray, float]


def _sequence_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
    logits = model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, ids[len(prompt.token_ids) :, None])[:, 0]


def _expected(
    model_path: str, batches: list[list[Row]], updates: int, recompute: bool
) -> tuple[np.ndarray, list[float]]:
    """Returns the probe's log-probs and the losses of the same updates, sequence by sequence in plain PyTorch."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for batch in batches:
        size = len(batch) // updates
        with torch.no_grad():
            met = [_sequence_logprobs(model, prompt, completion) for prompt, completion, _, _ in batch]
        for start in range(0, len(batch), size):
            total = torch.zeros(())
            for i in range(start, start + size):
                prompt, completion, reference, advantage = batch[i]
                logprobs = _sequence_logprobs(model, prompt, completion)
                behaviour = torch.from_numpy(completion.logprobs)
                advantages = torch.full_like(behaviour, advantage)
                old = met[i] if recompute else behaviour
                terms = policy_loss(logprobs, old, advantages, MaspoConfig()).token_loss
                if recompute:
                    terms = terms * (met[i] - behaviour).exp().clamp(max=IMPORTANCE_CAP)
                total = total + terms.sum()
                total = total + KL * kl_estimate(logprobs, torch.from_numpy(reference), "k3").sum()
            loss = total / sum(len(row[1].token_ids) for row in batch[start : start + size])
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        row = torch.from_numpy(PROBE.astype(np.int64))[None]
        logprobs = (model(row).logits[0, :-1] / TEMPERATURE).log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].numpy()
    return logprobs, losses


def _start(model_path: str, ranks: int, zero_stage: int, max_tokens: int, old_policy: Any = "behaviour") -> list[Any]:
    actors = [
        ray.remote(DeepSpeedLearner)
        .options(num_cpus=0.5)
        .remote(
            model=ModelConfig(path=model_path, dtype="float32"),
            learner=LearnerConfig(lr=LR, zero_stage=zero_stage, replicas=ranks, max_tokens_per_micro_batch=max_tokens),
            objective=MaspoConfig(old_policy=old_policy, importance_cap=IMPORTANCE_CAP),
            kl=KLConfig(coef=KL),
            temperature=TEMPERATURE,
            total_updates=STEPS,
            rank=rank,
            world_size=ranks,
            threads=1,
            seed=0,
        )
        for rank in range(ranks)
    ]
    rendezvous = ray.get(actors[0].rendezvous.remote())
    ray.get([actor.setup.remote(*rendezvous) for actor in actors])
    return actors


def _run(
    actors: Sequence[Any], batches: Sequence[list[Experience]], max_tokens: int, share: bool, updates: int
) -> list[dict[str, float]]:
    metrics = []
    for experiences in batches:
        plans = pack(experiences, len(actors), max_tokens, share, updates)
        # A world of 1 in disguise would see the batch of one rank only; the shares must differ and both be there.
        for update in range(updates):
            shares = [own[update].micro_batches for own, _ in plans]
            counts = [sum(len(bundle.items) for bundles in share for bundle in bundles) for share in shares]
            assert sum(counts) == 12 // updates
            assert all(counts)
        calls = [actor.train_step.remote(own, *payloads) for actor, (own, payloads) in zip(actors, plans, strict=True)]
        for reports in ray.get(calls):
            assert all(report.applied and not report.faulty_groups for report in reports)
        metrics += [report.metrics for report in ray.get(calls)[0]]
    return metrics


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "max_tokens", "share", "updates", "old_policy"),
    [
        (1, 1, 4096, True, 1, "behaviour"),
        (2, 0, 40, False, 1, "behaviour"),
        (2, 3, 24, True, 2, "behaviour"),
        (2, 2, 30, True, 2, "recompute"),
    ],
    ids=["one", "two_unshared", "two_zero3_updates", "two_zero2_recompute"],
)
def test_learner_updates_equal_plain_pytorch_for_any_cut(
    tiny_model: str,
    own_ray: None,
    tmp_path: Path,
    ranks: int,
    zero_stage: int,
    max_tokens: int,
    share: bool,
    updates: int,
    old_policy: str,
) -> None:
    batches = [_batch(seed) for seed in range(STEPS)]
    rows = [rows for _, rows in batches]
    expected, losses = _expected(tiny_model, rows, updates, recompute=old_policy == "recompute")
    actors = _start(tiny_model, ranks, zero_stage, max_tokens, old_policy)
    try:
        metrics = _run(actors, [experiences for experiences, _ in batches], max_tokens, share, updates)
        assert [m["loss"] for m in metrics] == pytest.approx(losses, rel=1e-4, abs=5e-6)
        if zero_stage > 0:
            assert all(m["learner/grad_norm"] > 0 for m in metrics)
        [scored] = ray.get([actor.completion_logprobs.remote([(PROBE[:1], PROBE[1:])]) for actor in actors])[0]
        assert np.abs(scored - expected).max() < 1e-4
        ray.get([actor.save.remote(str(tmp_path / "saved")) for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.no_grad():
        row = torch.from_numpy(PROBE.astype(np.int64))[None]
        again = (saved(row).logits[0, :-1] / TEMPERATURE).log_softmax(-1).gather(1, row[0, 1:, None])[:, 0].numpy()
    assert np.abs(again - expected).max() < 1e-4
    assert (tmp_path / "saved" / "tokenizer.json").exists()


def _broken(experience: Experience, fault: str) -> Experience:
    """Returns the experience with a NaN in its second completion."""
    group, nan = experience.group, float("nan")
    if fault == "advantage":
        return Experience(group, (0.5, nan, -0.5), experience.reference_logprobs)
    if fault == "reference":
        references = ray.get(experience.reference_logprobs)
        return Experience(group, experience.advantages, ray.put([references[0], references[1] * nan, references[2]]))
    completions = ray.get(group.rollouts[0].payload)
    completions[1] = replace(completions[1], logprobs=completions[1].logprobs * nan)
    payload = ray.put(completions)
    rollouts = tuple(replace(rollout, payload=payload) for rollout in group.rollouts)
    return Experience(replace(group, rollouts=rollouts), experience.advantages, experience.reference_logprobs)


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "fault"),
    [(1, 1, "behaviour"), (2, 0, "advantage"), (2, 2, "reference"), (2, 3, "advantage")],
)
def test_learner_step_with_a_loss_that_is_not_finite_is_left_out_and_names_the_group(
    tiny_model: str, own_ray: None, ranks: int, zero_stage: int, fault: str
) -> None:
    experiences, _ = _batch(0)
    [first, second, *rest] = experiences
    broken = [first, _broken(second, fault), *rest]
    actors = _start(tiny_model, ranks, zero_stage, 4096)

    def probe() -> np.ndarray:
        return ray.get([actor.completion_logprobs.remote([(PROBE[:1], PROBE[1:])]) for actor in actors])[0][0]

    def step(batch: list[Experience]) -> UpdateReport:
        plans = pack(batch, ranks, 4096, True)
        calls = [a.train_step.remote(own, *payloads) for a, (own, payloads) in zip(actors, plans, strict=True)]
        reports = [report for [report] in ray.get(calls)]
        assert len({(report.applied, report.faulty_groups) for report in reports}) == 1
        return reports[0]

    try:
        before = probe()
        report = step(broken)
        assert (report.applied, report.faulty_groups) == (False, (second.group.group_id,))
        assert report.metrics["learner/skipped"] == 1
        assert np.array_equal(before, probe())
        # What was left out leaves nothing behind for the next step.
        assert step(experiences).applied
        after = probe()
        assert np.isfinite(after).all() and not np.array_equal(before, after)
    finally:
        for actor in actors:
            ray.kill(actor)
