"""Learner actors on a tiny model, batches of random tokens for them, and the log-probs that plain PyTorch gives."""

from typing import Any

import numpy as np
import ray
import torch

from actors.deepspeed_learner import DeepSpeedLearner
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

TEMPERATURE, KL, LR, STEPS, IMPORTANCE_CAP = 0.8, 0.1, 1e-3, 3, 1.5
EPS = 1e-3
"""Far above AdamW's usual: the update is then a smooth function of the gradient, and rounding does not turn a step's sign."""
MAX_NORM = 11.0
"""Some updates' gradients are longer, others' are not."""


def random_batch(seed: int, groups: int = 4, n: int = 3) -> tuple[list[Experience], list[tuple[Any, ...]]]:
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
        payload = ray.put(SampledGroup(prompt, tuple(completions)))
        rollouts = tuple(Rollout(CompletionFacts.of(c), Verdict.from_reward(1.0)) for c in completions)
        group = Group(group_id, prompt.prompt_id, payload, len(prompt.token_ids), 0, group_id % 3, rollouts)
        experiences.append(Experience(group, advantages, ray.put(references)))
        rows += zip([prompt] * n, completions, references, advantages, strict=True)
    return experiences, rows


def sequence_logprobs(model: torch.nn.Module, prompt: Prompt, completion: Completion) -> torch.Tensor:
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
    logits = model(ids[None]).logits[0, len(prompt.token_ids) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(1, ids[len(prompt.token_ids) :, None])[:, 0]


def start_learners(
    model_path: str,
    ranks: int,
    zero_stage: Any,
    max_tokens: int,
    old_policy: Any = "behaviour",
    dtype: Any = "float32",
    trust_remote_code: bool = False,
    **settings: Any,
) -> list[Any]:
    actors = [
        ray.remote(DeepSpeedLearner)
        .options(num_cpus=0.5)
        .remote(
            model=ModelConfig(path=model_path, dtype=dtype, trust_remote_code=trust_remote_code),
            learner=LearnerConfig(
                lr=LR,
                eps=EPS,
                max_grad_norm=MAX_NORM,
                zero_stage=zero_stage,
                replicas=ranks,
                max_tokens_per_micro_batch=max_tokens,
                **settings,
            ),
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
