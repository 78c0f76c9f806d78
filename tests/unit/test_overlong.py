"""Over-long completions: equation 13 of DAPO by hand, and what of a group is trained on."""

import math

import pytest

from maspo_ray.advantages import group_advantages
from maspo_ray.config import AdvantageConfig, OverlongConfig
from maspo_ray.experience import CompletionFacts, Outcome, Rollout, Verdict
from maspo_ray.groups.overlong import overlong_penalty, trained_advantages, why_not_trained

# L_max 20, L_cache 4: free up to 16 tokens.
CONFIG = OverlongConfig(buffer_tokens=4, penalty=2.0)


def _facts(num_tokens: int, finish_reason: str = "stop") -> CompletionFacts:
    return CompletionFacts(num_tokens, 0, 0, finish_reason)


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    # 2 · (|y| − 16) / 4 from 16 tokens on.
    [(1, 0.0), (15, 0.0), (16, 0.0), (17, 0.5), (18, 1.0), (19, 1.5), (20, 2.0)],
)
def test_overlong_penalty_grows_over_the_buffer(num_tokens: int, penalty: float) -> None:
    assert overlong_penalty(_facts(num_tokens), 20, CONFIG) == penalty


def test_overlong_penalty_of_what_was_cut_off_is_whole_however_short() -> None:
    # The model's context may end a completion before max_new_tokens.
    assert overlong_penalty(_facts(20, "length"), 20, CONFIG) == 2.0
    assert overlong_penalty(_facts(9, "length"), 20, CONFIG) == 2.0


def test_overlong_penalty_without_a_config_is_0() -> None:
    assert overlong_penalty(_facts(20, "length"), 20, None) == 0.0


def _rollouts(*finish_reasons: str, unscored: int | None = None) -> list[Rollout]:
    return [
        Rollout(
            _facts(5, reason),
            Verdict.unscored(Outcome.ERROR, "no") if i == unscored else Verdict.from_reward(1.0),
        )
        for i, reason in enumerate(finish_reasons)
    ]


def test_trained_advantages_leave_out_what_was_cut_off_only_if_asked() -> None:
    rollouts = _rollouts("stop", "length", "stop", unscored=2)
    assert trained_advantages(rollouts, (0.5, -0.5, 0.0), filter_overlong=False) == (0.5, -0.5, None)
    assert trained_advantages(rollouts, (0.5, -0.5, 0.0), filter_overlong=True) == (0.5, None, None)


def _why(
    rewards: list[float], *finish_reasons: str, filter_zero_variance: bool = True
) -> tuple[str | None, tuple[float | None, ...]]:
    advantages = group_advantages(rewards, AdvantageConfig(kind="dr_grpo"))
    unscored = next((i for i, reward in enumerate(rewards) if math.isnan(reward)), None)
    trained = trained_advantages(_rollouts(*finish_reasons, unscored=unscored), advantages.values, filter_overlong=True)
    return why_not_trained(trained, advantages, filter_zero_variance), trained


def test_group_with_a_cut_off_completion_keeps_the_baseline_that_it_counts_in() -> None:
    # Mean of 1, 0, 0, 0 with the cut-off one is ¼; without it, it would be ⅓.
    assert _why([1, 0, 0, 0], "stop", "stop", "stop", "length") == (None, (0.75, -0.25, -0.25, None))
    # What is left is of one reward, but not of the group's mean, which is ½.
    assert _why([1, 1, 0, 0], "stop", "stop", "length", "length") == (None, (0.5, 0.5, None, None))


@pytest.mark.parametrize(
    ("rewards", "reasons", "cause"),
    [
        ([1, 1, 1], ("stop", "stop", "stop"), "all rewards are equal"),
        # 0.5 is the mean of 0, 1 and itself.
        ([0, 1, 0.5], ("length", "length", "stop"), "what was not cut off has no advantage"),
        # So is 0.2 of 0.1 and 0.3, but for its last bit.
        ([0.1, 0.3, 0.2], ("length", "length", "stop"), "what was not cut off has no advantage"),
        ([0, 1, 1], ("length", "length", "length"), "every scored completion was cut off"),
        ([0, 1, math.nan], ("length", "length", "stop"), "every scored completion was cut off"),
    ],
)
def test_group_without_a_signal_in_what_is_left_is_filtered(
    rewards: list[float], reasons: tuple[str, ...], cause: str
) -> None:
    assert _why(rewards, *reasons)[0] == cause
    # Where zero variance is not filtered, still nothing cannot be trained on: the loss would be divided by no tokens.
    nothing = cause if "every" in cause else None
    assert _why(rewards, *reasons, filter_zero_variance=False)[0] == nothing
