"""The reference policy on a real model: what the learner measures its KL to, each log-prob beside the token that it is of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import ray
from numpy.typing import NDArray

from actors.deepspeed_learner import DeepSpeedLearner
from actors.hf_reference import HFReference
from maspo_ray.config import KLConfig, LearnerConfig, MaspoConfig, ModelConfig
from maspo_ray.experience import Completion, CompletionFacts, Experience, Group, Prompt, Rollout, Verdict, VersionSpan
from maspo_ray.packing import pack

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TEMPERATURE, LR, KL_COEF = 0.8, 1e-2, 0.1
PROMPT_TOKENS, MAX_TOKENS = 20, 60
LENGTHS = (30, 9, 25, 15, 1, 25)
"""Of the completions, by sample. So long that rounding depends on which lies first behind the prompt."""
ORDERS = [(0, 1, 2, 3, 4, 5), (4, 2, 5, 0, 3, 1)]
"""In which completions end, by their samples: as submitted, and otherwise."""


def _completion(rng: np.random.Generator, sample: int) -> Completion:
    length = LENGTHS[sample]
    return Completion(
        rng.integers(3, 60, size=length).astype(np.int32),
        rng.normal(-4, 0.3, size=length).astype(np.float32),
        (VersionSpan(0, 0, length),),
        "stop",
        "",
        sample,
    )


def _prompt_and_completions(seed: int) -> tuple[Prompt, list[Completion]]:
    """Returns a prompt of random tokens and its completions, by their samples; two of them are as long."""
    rng = np.random.default_rng(seed)
    prompt = Prompt(str(seed), "", rng.integers(3, 60, size=PROMPT_TOKENS).astype(np.int32), "")
    return prompt, [_completion(rng, sample) for sample in range(len(LENGTHS))]


def _score(reference: HFReference, prompt: Prompt, ended: Sequence[Completion]) -> Sequence[NDArray[np.float32]]:
    """Returns the log-probs of completions that ended in this order, two of them together and then the rest, in this order."""
    logprobs, num_tokens = reference.completion_logprobs(prompt, ended[:2], ended[2:])
    assert num_tokens == sum(LENGTHS)
    return logprobs


def _experience(reference: HFReference, group_id: int, order: Sequence[int]) -> Experience:
    """Returns a group whose completions ended in this order, two of them together and then the rest, scored by the reference."""
    prompt, completions = _prompt_and_completions(group_id)
    parts = [[completions[i] for i in order[:2]], [completions[i] for i in order[2:]]]
    rollouts = [
        Rollout(payload, position, CompletionFacts.of(completion), Verdict.from_reward(float(completion.sample % 2)))
        for payload, part in zip(map(ray.put, parts), parts, strict=True)
        for position, completion in enumerate(part)
    ]
    rollouts.sort(key=lambda rollout: rollout.facts.sample)
    group = Group(group_id, prompt.prompt_id, ray.put(prompt), len(prompt.token_ids), 0, tuple(rollouts))
    logprobs, _ = reference.completion_logprobs(prompt, *ray.get(group.payloads))
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


def test_reference_logprobs_belong_to_their_completions_in_whichever_order_they_come(reference: HFReference) -> None:
    prompt, completions = _prompt_and_completions(0)
    alone = [reference.completion_logprobs(prompt, [completion])[0][0] for completion in completions]
    for order in ORDERS:
        scored = _score(reference, prompt, [completions[i] for i in order])
        for i, logprobs in zip(order, scored, strict=True):
            assert logprobs.shape == (LENGTHS[i],) and logprobs.dtype == np.float32
            assert np.abs(logprobs - alone[i]).max() < 1e-5


def test_reference_logprobs_are_the_same_to_the_last_bit_in_whichever_order_they_come(reference: HFReference) -> None:
    prompt, completions = _prompt_and_completions(1)
    first, second = (
        dict(zip(order, _score(reference, prompt, [completions[i] for i in order]), strict=True)) for order in ORDERS
    )
    assert all(np.array_equal(first[sample], second[sample]) for sample in range(len(LENGTHS)))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_zero_in_the_first_update_and_not_in_the_second(
    tiny_model: str, own_ray: None, reference: HFReference, estimator: Any
) -> None:
    experiences = [_experience(reference, group_id, order) for group_id, order in enumerate(ORDERS)]
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
