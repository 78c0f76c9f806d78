"""The reference policy on a real model: what the learner measures its KL to, each log-prob beside the token that it is of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import ray

from actors.deepspeed_learner import DeepSpeedLearner
from actors.hf_reference import HFReference
from maspo_ray.config import KLConfig, LearnerConfig, MaspoConfig, ModelConfig
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
TEMPERATURE, LR, KL_COEF = 0.8, 1e-2, 0.1
PROMPT_TOKENS, MAX_TOKENS = 20, 60
LENGTHS = (30, 9, 25, 15, 1, 25)
"""Of the completions, by sample. The learner packs the longest first, several copies of the prompt for a group."""


def _group(seed: int) -> SampledGroup:
    """Returns a prompt of random tokens and its completions, two of which are as long."""
    rng = np.random.default_rng(seed)
    prompt = Prompt(str(seed), "", rng.integers(3, 60, size=PROMPT_TOKENS).astype(np.int32), "")
    completions = [
        Completion(
            rng.integers(3, 60, size=length).astype(np.int32),
            rng.normal(-4, 0.3, size=length).astype(np.float32),
            (VersionSpan(0, 0, length),),
            "stop",
            "",
        )
        for length in LENGTHS
    ]
    return SampledGroup(prompt, tuple(completions))


def _experience(reference: HFReference, group_id: int, shift: int = 0) -> Experience:
    """Returns a group that the reference has scored.

    Args:
        shift: by how many places the reference's log-probs are moved.
    """
    sampled = _group(group_id)
    rollouts = tuple(
        Rollout(CompletionFacts.of(completion), Verdict.from_reward(float(i % 2)))
        for i, completion in enumerate(sampled.completions)
    )
    logprobs, num_tokens = reference.completion_logprobs(sampled)
    assert num_tokens == sum(LENGTHS)
    logprobs = [*logprobs[shift:], *logprobs[:shift]]
    group = Group(group_id, sampled.prompt.prompt_id, ray.put(sampled), PROMPT_TOKENS, 0, 0, rollouts)
    advantages = tuple(1.0 if rollout.verdict.correct else -1.0 for rollout in rollouts)
    return Experience(group, advantages, ray.put(logprobs))


@pytest.fixture(scope="module")
def reference(tiny_model: str) -> HFReference:
    actor = HFReference(model=ModelConfig(path=tiny_model, dtype="float32"), temperature=TEMPERATURE, threads=1)
    actor.setup()
    return actor


def _kl(learner: Any, version: int, experiences: Sequence[Experience]) -> float:
    """Returns `objective/kl` of one update, which it makes."""
    [(plans, payloads)] = pack(experiences, 1, MAX_TOKENS, True)
    [report] = ray.get(learner.train_step.remote(version, plans, *payloads))
    assert report.applied
    return report.metrics["objective/kl"]


def test_reference_logprobs_belong_to_their_completions(reference: HFReference) -> None:
    group = _group(0)
    together, _ = reference.completion_logprobs(group)
    for completion, logprobs in zip(group.completions, together, strict=True):
        [alone], _ = reference.completion_logprobs(SampledGroup(group.prompt, (completion,)))
        assert logprobs.shape == completion.token_ids.shape and logprobs.dtype == np.float32
        assert np.abs(logprobs - alone).max() < 1e-5


@pytest.mark.parametrize(
    "estimator", [pytest.param("k1", marks=pytest.mark.slow), pytest.param("k2", marks=pytest.mark.slow), "k3"]
)
def test_kl_is_zero_in_the_first_update_and_not_in_the_second(
    tiny_model: str, own_ray: None, reference: HFReference, estimator: Any
) -> None:
    experiences = [_experience(reference, group_id) for group_id in range(2)]
    learner = (
        ray.remote(DeepSpeedLearner)
        .options(num_cpus=1)
        .remote(
            model=ModelConfig(path=tiny_model, dtype="float32"),
            learner=LearnerConfig(lr=LR),
            objective=MaspoConfig(),
            kl=KLConfig(coef=KL_COEF, estimator=estimator),
            temperature=TEMPERATURE,
            total_updates=2,
            rank=0,
            world_size=1,
            threads=1,
            seed=0,
        )
    )
    try:
        ray.get(learner.setup.remote(*ray.get(learner.rendezvous.remote())))
        first, second = (_kl(learner, step, experiences) for step in range(2))
    finally:
        ray.kill(learner)
    # The two score the same tokens in other rows, so that log-probs near −4 differ by rounding, about 1e-6. k1's mean would not see
    # log-probs in another order; k2 and k3 do.
    assert abs(first) < 1e-5
    # One update later it is none: the measure does not give 0 for any two models.
    assert abs(second) > 1e-3
