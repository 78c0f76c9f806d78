"""What becomes of completions that are too long: DAPO's soft punishment, and leaving those that were cut off out of the loss.

Promise: pure; both are off unless the config asks for them, and the verifier's verdict stays as it was given. The one shape
of what is trained on is a group's advantages with None where a rollout is in no loss, whatever the reason.
"""

from collections.abc import Sequence

from maspo_ray.advantages import GroupAdvantages
from maspo_ray.config import OverlongConfig
from maspo_ray.experience import CompletionFacts, Outcome, Rollout

_NO_SIGNAL = 1e-12
"""Relative to the group's largest. An advantage of a reward that is the group's mean may differ from 0 in its last bits."""


def is_cut_off(facts: CompletionFacts) -> bool:
    """Whether a completion ended because it reached the limit."""
    return facts.finish_reason == "length"


def overlong_penalty(facts: CompletionFacts, max_new_tokens: int, config: OverlongConfig | None) -> float:
    """Returns what a completion's length takes off its reward, from 0 to `penalty`; 0 without a config.

    With L_max = `max_new_tokens` and L_cache = `buffer_tokens`, DAPO (arXiv:2503.14476, section 3.4, equation 13) adds to the reward

        0                                  where |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache    where L_max − L_cache < |y| ≤ L_max
        −1                                 where L_max < |y|

    and this is its negative times `penalty`. No completion here is longer than L_max, which the engine ends; one that it cut off
    would have been, so that the last case is of those, also where the model's context cut them off before L_max.
    """
    if config is None:
        return 0.0
    if is_cut_off(facts):
        return config.penalty
    excess = facts.num_tokens - (max_new_tokens - config.buffer_tokens)
    return config.penalty * min(max(excess / config.buffer_tokens, 0.0), 1.0)


def trained_advantages(
    rollouts: Sequence[Rollout], advantages: Sequence[float], filter_overlong: bool
) -> tuple[float | None, ...]:
    """Returns each rollout's advantage, None for one that is in no loss and no normaliser.

    Those are what could not be scored and, with `filter_overlong`, what was cut off. The latter have counted in the baseline that
    `advantages` are taken from: what they were scored says how hard the prompt is, their tokens do not say what was wrong with
    them (DAPO's overlong filtering, section 3.4; TRL's `mask_truncated_completions`).
    """
    return tuple(
        None
        if rollout.verdict.outcome is not Outcome.SCORED or (filter_overlong and is_cut_off(rollout.facts))
        else advantage
        for rollout, advantage in zip(rollouts, advantages, strict=True)
    )


def why_not_trained(
    trained: Sequence[float | None], advantages: GroupAdvantages, filter_zero_variance: bool
) -> str | None:
    """Returns why a group is to be filtered, None if the learner can have it.

    One of which nothing is left is never trained on; with `filter_zero_variance`, neither is one of which what is left has no
    advantage.

    Args:
        trained: as `trained_advantages` returns it.
        advantages: of all rollouts, also those that were left out.
    """
    left = [abs(advantage) for advantage in trained if advantage is not None]
    if not left:
        return "every scored completion was cut off"
    if not filter_zero_variance:
        return None
    if not advantages.has_signal:
        return "all rewards are equal"
    largest = max(map(abs, advantages.values))
    return "what was not cut off has no advantage" if max(left) <= _NO_SIGNAL * largest else None
