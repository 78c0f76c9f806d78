"""Overlong completions: DAPO's length penalty on their reward, and leaving those that were cut off out of the loss.

Promise: pure; both are off unless the config asks for them, and the verifier's verdict is not changed. A group's trained rollouts have
one form, whatever left the others out: its advantages, with None for a rollout that is in no loss.
"""

from collections.abc import Sequence

from maspo_ray.advantages import GroupAdvantages
from maspo_ray.config import OverlongConfig
from maspo_ray.experience import CompletionFacts, Outcome, Rollout

_NO_SIGNAL = 1e-12
"""Relative to the group's largest advantage. Where a reward equals the group's mean, its advantage may differ from 0 by rounding."""


def is_cut_off(facts: CompletionFacts) -> bool:
    """Whether a completion ended at the token limit rather than at an end-of-sequence token."""
    return facts.finish_reason == "length"


def overlong_penalty(facts: CompletionFacts, max_new_tokens: int, config: OverlongConfig | None) -> float:
    """Returns the length penalty to subtract from a completion's reward, from 0 to `config.penalty`; 0 without a config.

    With L_max = `max_new_tokens` and L_cache = `buffer_tokens`, DAPO (arXiv:2503.14476, section 3.4, equation 13) adds to the reward

        0                                  where |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache    where L_max − L_cache < |y| ≤ L_max
        −1                                 where L_max < |y|

    and this returns its negative times `penalty`. The engine ends every completion at L_max, or earlier where the model's context is
    full. The last case is therefore that of completions that were cut off, which would have gone on.
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

    Those are the rollouts that could not be scored and, with `filter_overlong`, those that were cut off (DAPO's overlong filtering, section
    3.4; TRL's `mask_truncated_completions`). Rollouts that were cut off still count in the baseline of `advantages`: their reward says
    how hard the prompt is, but not which of their tokens were at fault.
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
    """Returns the reason to filter a group, None if the learner can train on it.

    A group without a trained rollout is always filtered; with `filter_zero_variance`, so is one whose trained rollouts all have an
    advantage of 0.

    Args:
        trained: as `trained_advantages` returns it.
        advantages: of all the group's rollouts, also those that are not trained on.
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
