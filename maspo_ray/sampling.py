"""The config's keys of sampling → what an engine is asked for, in training and in an evaluation."""

import logging

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.experience import Sampling

_log = logging.getLogger(__name__)


def training_sampling(rollout: RolloutConfig) -> Sampling:
    """Returns how the completions that are trained on are sampled."""
    return Sampling(
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
    )


def evaluation_sampling(evaluation: EvalConfig, rollout: RolloutConfig) -> Sampling:
    """Returns how an evaluation's completions are sampled: what ends them is training's, where `eval` does not say otherwise."""
    at_least, stop, tokens = evaluation.min_new_tokens, evaluation.stop, evaluation.stop_token_ids
    return Sampling(
        temperature=evaluation.temperature,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens if at_least is None else at_least,
        top_p=evaluation.top_p,
        top_k=evaluation.top_k,
        min_p=evaluation.min_p,
        stop=rollout.stop if stop is None else stop,
        stop_token_ids=rollout.stop_token_ids if tokens is None else tokens,
    )


def say_what_the_ratio_leaves_out(rollout: RolloutConfig) -> None:
    """Says so where training samples from a part of the policy: ratio, KL and entropy are of the whole one."""
    if rollout.reshaping:
        keys = " and ".join(f"rollout.{name} is {getattr(rollout, name)}" for name in rollout.reshaping)
        _log.info(
            "%s; tokens are sampled from a part of the policy, while the ratio is of the whole ones: it leaves out how much probability "
            "that part has under either (docs/pipeline.md, Sampling from a part of the policy).",
            keys,
        )
