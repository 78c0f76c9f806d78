"""A learner's saved state on real DeepSpeed: fresh ranks that load it go on bit for bit as if nothing had been in between."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.deepspeed_learner import DeepSpeedLearner
from maspo_ray.config import KLConfig, LearnerConfig, LoraConfig, MaspoConfig, ModelConfig
from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Experience,
    Group,
    Prompt,
    Rollout,
    SampledGroup,
    Verdict,
    VersionSpan,
)
from maspo_ray.packing import pack

pytestmark = [pytest.mark.engine, pytest.mark.ray]
MAX_TOKENS, GROUPS, GROUP_SIZE = 40, 4, 3
STEPS_BEFORE, STEPS_AFTER = 2, 2
"""Two steps on each side: a schedule that was not loaded, beside an optimizer that was, shows in the second alone."""
LORA = {"lora": LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj"))}


def _group(rng: np.random.Generator, group_id: int) -> Experience:
    """Returns an experience of random tokens and advantages."""
    prompt = Prompt(str(group_id), "", rng.integers(3, 60, size=4).astype(np.int32), "")
    lengths = rng.integers(2, 10, size=GROUP_SIZE)
    completions = tuple(
        Completion(
            rng.integers(3, 60, size=length).astype(np.int32),
            rng.normal(-4, 0.3, size=length).astype(np.float32),
            (VersionSpan(0, 0, int(length)),),
            "stop",
            "",
        )
        for length in lengths
    )
    payload = ray.put(SampledGroup(prompt, completions))
    rollouts = tuple(Rollout(CompletionFacts.of(c), Verdict.from_reward(1.0)) for c in completions)
    group = Group(group_id, prompt.prompt_id, payload, len(prompt.token_ids), 0, 0, rollouts)
    return Experience(group, tuple(float(a) for a in rng.normal(size=GROUP_SIZE)))


def _batch(seed: int) -> list[Experience]:
    rng = np.random.default_rng(seed)
    return [_group(rng, group_id) for group_id in range(GROUPS)]


def _start(model: ModelConfig, learner: LearnerConfig, seed: int) -> list[Any]:
    """Returns the ranks of a learner, set up."""
    actors = [
        ray.remote(DeepSpeedLearner)
        .options(num_cpus=0.5)
        .remote(
            model=model,
            learner=learner,
            objective=MaspoConfig(),
            kl=KLConfig(),
            temperature=1.0,
            total_updates=STEPS_BEFORE + STEPS_AFTER,
            rank=rank,
            world_size=learner.replicas,
            threads=1,
            seed=seed,
        )
        for rank in range(learner.replicas)
    ]
    rendezvous = ray.get(actors[0].rendezvous.remote())
    ray.get([actor.setup.remote(*rendezvous) for actor in actors])
    return actors


@dataclass(frozen=True)
class _Step:
    """What a train step came to: `loss`, `learner/grad_norm`, `learner/lr` and the model's weights after it."""

    figures: tuple[float, float, float]
    weights: dict[str, torch.Tensor]


def _train(actors: list[Any], batch: list[Experience]) -> _Step:
    def whole_weights(learner: Any) -> dict[str, torch.Tensor]:
        return learner._weights.state()[0]

    plans = pack(batch, len(actors), MAX_TOKENS, True)
    # A world of 1 in disguise would train on the first rank's share alone.
    assert all(any(plan.micro_batches) for (plan,), _ in plans)
    calls = [actor.train_step.remote(0, own, *payloads) for actor, (own, payloads) in zip(actors, plans, strict=True)]
    [report] = ray.get(calls)[0]
    assert report.applied
    weights = ray.get([actor.__ray_call__.remote(whole_weights) for actor in actors])[0]
    metrics = report.metrics
    return _Step((metrics["loss"], metrics["learner/grad_norm"], metrics["learner/lr"]), weights)


def _end(actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "dtype", "settings"),
    [
        (1, 0, "float32", {}),
        (2, 1, "float32", LORA),
        pytest.param(2, 2, "bfloat16", {}, marks=pytest.mark.slow),
        (2, 3, "float32", {}),
        pytest.param(2, 1, "float32", {}, marks=pytest.mark.slow),
        pytest.param(2, 3, "float32", LORA, marks=pytest.mark.slow),
    ],
    ids=["one_zero0", "two_zero1_lora", "two_zero2_bfloat16", "two_zero3", "two_zero1", "two_zero3_lora"],
)
def test_load_state_in_fresh_ranks_goes_on_bit_for_bit(
    tiny_model: str, own_ray: None, tmp_path: Path, ranks: int, zero_stage: Any, dtype: Any, settings: dict[str, Any]
) -> None:
    model = ModelConfig(path=tiny_model, dtype=dtype)
    # Each update has a learning rate of its own, so that the schedule's place shows.
    learner = LearnerConfig(
        lr=1e-2, schedule="linear", warmup_steps=2, zero_stage=zero_stage, replicas=ranks, **settings
    )
    before, after = [_batch(seed) for seed in range(STEPS_BEFORE)], [_batch(10 + seed) for seed in range(STEPS_AFTER)]
    state = str(tmp_path / "state")
    actors = _start(model, learner, seed=0)
    try:
        for batch in before:
            saved = _train(actors, batch)
        ray.get([actor.save_state.remote(state) for actor in actors])
        uninterrupted = [_train(actors, batch) for batch in after]
    finally:
        _end(actors)
    # Another seed: nothing that is drawn at random when a learner starts, such as an adapter's first weights, may stay.
    actors = _start(model, learner, seed=1)
    try:
        ray.get([actor.load_state.remote(state) for actor in actors])
        resumed = [_train(actors, batch) for batch in after]
    finally:
        _end(actors)
    assert len({step.figures[2] for step in uninterrupted}) == STEPS_AFTER
    for one, other in zip(uninterrupted, resumed, strict=True):
        assert one.figures == other.figures
        assert one.weights.keys() == other.weights.keys()
        assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    assert any(not torch.equal(weight, saved.weights[name]) for name, weight in resumed[0].weights.items())
