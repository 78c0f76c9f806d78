"""Group advantages: hand-worked values, and that what cannot be scored or compared gets exactly 0."""

import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maspo_ray.advantages import GroupAdvantages, group_advantages
from maspo_ray.config import AdvantageConfig
from maspo_ray.errors import ConfigError

KINDS = ["grpo", "dr_grpo", "rloo"]
NAN = math.nan


def _advantages(kind: str, rewards: list[float]) -> GroupAdvantages:
    return group_advantages(rewards, AdvantageConfig.model_validate({"kind": kind}))


def test_grpo_binary_rewards_divides_by_the_sample_standard_deviation() -> None:
    # mean 1/4; sample variance (9/16 + 3·1/16) / 3 = 1/4, std 1/2.
    # (1 − 1/4) / (1/2 + 1e-6) = 1.499997; (0 − 1/4) / (1/2 + 1e-6) = −0.499999
    result = _advantages("grpo", [1.0, 0.0, 0.0, 0.0])
    assert result.values == pytest.approx((1.499997, -0.499999, -0.499999, -0.499999), abs=1e-9)
    assert (result.num_scored, result.has_signal) == (4, True)


def test_grpo_two_completions_are_the_root_of_one_half_apart_from_zero() -> None:
    # mean 1/2, sample variance (1/4 + 1/4) / 1 = 1/2, std 0.70710678: 0.5 / (0.70710678 + 1e-6) = 0.70710578
    assert _advantages("grpo", [0.0, 1.0]).values == pytest.approx((-0.70710578, 0.70710578), abs=1e-8)


def test_grpo_tiny_spread_is_damped_by_the_epsilon() -> None:
    # std of (0, 2e-6) is 1.41421356e-6: 1e-6 / (1.41421356e-6 + 1e-6) = 0.41421356
    assert _advantages("grpo", [0.0, 2e-6]).values == pytest.approx((-0.41421356, 0.41421356), abs=1e-8)


def test_dr_grpo_rewards_only_lose_their_mean() -> None:
    # mean (3 + 0 + 0 + 1) / 4 = 1
    assert _advantages("dr_grpo", [3.0, 0.0, 0.0, 1.0]).values == (2.0, -1.0, -1.0, 0.0)


def test_rloo_rewards_lose_the_mean_of_the_others() -> None:
    # 3 − (0 + 0 + 1)/3 = 8/3;  0 − (3 + 0 + 1)/3 = −4/3;  1 − (3 + 0 + 0)/3 = 0
    assert _advantages("rloo", [3.0, 0.0, 0.0, 1.0]).values == pytest.approx((8 / 3, -4 / 3, -4 / 3, 0.0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Without the unscored: (1, 0), mean 1/2.
        ("grpo", (0.70710578, 0.0, -0.70710578)),
        ("dr_grpo", (0.5, 0.0, -0.5)),
        ("rloo", (1.0, 0.0, -1.0)),
    ],
)
def test_advantages_unscored_completion_is_left_out_of_the_baseline_and_gets_zero(
    kind: str, expected: tuple[float, ...]
) -> None:
    result = _advantages(kind, [1.0, NAN, 0.0])
    assert result.values == pytest.approx(expected, abs=1e-8)
    assert result.values[1] == 0.0
    assert (result.num_scored, result.has_signal) == (2, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rewards", "num_scored"), [([], 0), ([NAN, NAN], 0), ([NAN, 1.0, NAN], 1), ([0.7], 1)])
def test_advantages_fewer_than_two_scored_has_no_signal(kind: str, rewards: list[float], num_scored: int) -> None:
    assert _advantages(kind, rewards) == GroupAdvantages((0.0,) * len(rewards), num_scored, has_signal=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rewards",
    [
        [0.0, 0.0, 0.0],
        [0.1, 0.1, 0.1],  # their floating-point mean by plain summation is not 0.1
        [-0.1, NAN, -0.1, -0.1],
        [0.1 + 0.2, 0.3],  # differ in the last bit only
    ],
)
def test_advantages_equal_rewards_are_exactly_zero_without_signal(kind: str, rewards: list[float]) -> None:
    result = _advantages(kind, rewards)
    assert result.values == (0.0,) * len(rewards)
    assert not result.has_signal
    assert result.num_scored == sum(not math.isnan(reward) for reward in rewards)


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_infinite_reward_raises_and_names_it(kind: str) -> None:
    with pytest.raises(ConfigError, match="reward is -inf; it must be finite"):
        _advantages(kind, [0.0, -math.inf])


@settings(deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    rewards=st.lists(st.one_of(st.just(NAN), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0])), max_size=9),
)
def test_advantages_any_group_is_finite_centred_and_ordered_as_its_rewards(kind: str, rewards: list[float]) -> None:
    result = _advantages(kind, rewards)
    assert len(result.values) == len(rewards)
    assert all(math.isfinite(value) for value in result.values)
    assert result.has_signal == any(value != 0 for value in result.values)
    scale = max((abs(value) for value in result.values), default=0.0)
    assert sum(result.values) == pytest.approx(0.0, abs=1e-6 * max(scale, 1.0))
    scored = [(reward, value) for reward, value in zip(rewards, result.values, strict=True) if not math.isnan(reward)]
    assert [value for _, value in sorted(scored)] == sorted(value for _, value in scored)


def test_advantages_module_imports_no_torch() -> None:
    program = "import sys, maspo_ray.advantages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
