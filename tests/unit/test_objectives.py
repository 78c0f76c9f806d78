"""Policy losses: gates worked by hand, the surrogate's gradient, extremes, dtypes, and the sums reported of them."""

import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maspo_ray.config import GrpoConfig, MaspoConfig, ObjectiveConfig
from maspo_ray.errors import ConfigError
from maspo_ray.objectives import GATES, PolicyLoss, importance_weights, objective_sums, policy_loss

CONFIGS = [MaspoConfig(), GrpoConfig(), MaspoConfig(ratio_cap=3.0), GrpoConfig(ratio_cap=3.0)]


def _loss(config: Any, ratio: list[float], old_prob: float, advantage: list[float]) -> PolicyLoss:
    """Returns the loss of tokens of given ratios, in float64 so that hand-worked numbers hold to their last digit."""
    old_logprobs = torch.full((len(ratio),), math.log(old_prob), dtype=torch.float64)
    logprobs = old_logprobs + torch.tensor(ratio, dtype=torch.float64).log()
    return policy_loss(logprobs, old_logprobs, torch.tensor(advantage, dtype=torch.float64), config)


@pytest.mark.parametrize(
    ("settings", "ratio", "old_prob", "advantage", "expected"),
    [
        # π_old 1: m = 1. Â 1: σ = 1.03; (ρ − 1)² = 0.25; exp(−0.25 / 2.1218) = exp(−0.117824)
        pytest.param({}, 1.5, 1.0, 1.0, 0.888852, id="positive_above"),
        pytest.param({}, 0.5, 1.0, 1.0, 1.0, id="positive_below_is_open"),
        # Â −1: σ = 1 / 1.03 = 0.970874; exp(−0.25 · 1.0609 / 2) = exp(−0.132613)
        pytest.param({}, 0.5, 1.0, -1.0, 0.875804, id="negative_below"),
        pytest.param({}, 2.0, 1.0, -1.0, 1.0, id="negative_above_is_open"),
        pytest.param({}, 1.0, 1.0, 1.0, 1.0, id="at_one"),
        pytest.param({}, 5.0, 1.0, 0.0, 1.0, id="no_advantage"),
        # Â 2: σ = 1.06; exp(−0.25 / 2.2472) = exp(−0.111250)
        pytest.param({}, 1.5, 1.0, 2.0, 0.894715, id="positive_stronger_is_wider"),
        # π_old 0.01: m = 0.01^−0.3 = 3.981072; σ = 4.100504; exp(−4 / (2 · 16.814132)) = exp(−0.118948)
        pytest.param({}, 3.0, 0.01, 1.0, 0.887854, id="mass_widens"),
        # The same token, α 0.5: m = 0.01^−0.5 = 10; σ = 10.3; exp(−4 / 212.18) = exp(−0.018852)
        pytest.param({"alpha": 0.5}, 3.0, 0.01, 1.0, 0.981325, id="alpha"),
        # σ_base 0.5: m = 0.5 · 3.981072 = 1.990536; σ = 2.050252; exp(−4 / (2 · 4.203533)) = exp(−0.475790)
        pytest.param({"sigma_base": 0.5}, 3.0, 0.01, 1.0, 0.621394, id="sigma_base"),
        # π_old 1e-17: 10^5.1 is clamped to σ_max 10; σ = 10.3; exp(−100 / 212.18) = exp(−0.471298)
        pytest.param({}, 11.0, 1e-17, 1.0, 0.624192, id="sigma_max"),
        # 1 + 5 · 3 = 16 is clamped to risk_max 10; σ = 10; exp(−100 / 200)
        pytest.param({"beta_pos": 5.0}, 11.0, 1.0, 3.0, 0.606531, id="risk_max"),
        # 1 / (1 + 19 · 1) = 0.05 is clamped to risk_min 0.1; σ = 0.1; exp(−0.01 / 0.02)
        pytest.param({"beta_neg": 19.0}, 0.9, 1.0, -1.0, 0.606531, id="risk_min"),
        # β_neg Â = 1.2: its branch has no value there and is not asked for one. σ = 1 + 0.03 · 40 = 2.2; exp(−1 / 9.68)
        pytest.param({}, 2.0, 1.0, 40.0, 0.901851, id="advantage_beyond_one_over_beta_neg"),
    ],
)
def test_maspo_gate_hand_worked_token_gives_its_gaussian(
    settings: dict[str, float], ratio: float, old_prob: float, advantage: float, expected: float
) -> None:
    loss = _loss(MaspoConfig.model_validate(settings), [ratio], old_prob, [advantage])
    assert loss.gate.item() == pytest.approx(expected, abs=1e-6)
    assert loss.token_loss.item() == pytest.approx(-expected * ratio * advantage, rel=1e-5)


def test_maspo_gate_old_probability_above_one_by_rounding_keeps_sigma_base() -> None:
    # log π_old = 1: e^−0.3 < 1 is clamped to σ_base 1; σ = 1.03, as in the first case above.
    assert _loss(MaspoConfig(), [1.5], math.e, [1.0]).gate.item() == pytest.approx(0.888852, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(1, 1.19, 1), (1, 1.21, 0), (1, 0.1, 1), (-1, 0.81, 1), (-1, 0.79, 0), (-1, 9.0, 1), (0, 9.0, 1), (0, 0.1, 1)],
)
def test_grpo_gate_hand_worked_token_clips_on_the_side_of_its_advantage(
    advantage: float, ratio: float, expected: float
) -> None:
    loss = _loss(GrpoConfig(epsilon=0.2), [ratio], 0.5, [advantage])
    assert loss.gate.item() == expected
    assert loss.token_loss.item() == pytest.approx(-expected * ratio * advantage)


@pytest.mark.parametrize("config_class", [MaspoConfig, GrpoConfig])
def test_ratio_cap_stops_negative_tokens_above_it_and_nothing_else(config_class: Any) -> None:
    ratio, advantage = [3.1, 2.9, 3.1, 3.1], [-1.0, -1.0, 1.0, 0.0]
    capped = _loss(config_class(ratio_cap=3.0), ratio, 0.5, advantage)
    free = _loss(config_class(), ratio, 0.5, advantage)
    assert free.gate[0].item() == 1.0 and capped.gate[0].item() == 0.0
    assert torch.equal(capped.gate[1:], free.gate[1:])


def _random_tokens(num_tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    old_logprobs = -8 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    logprobs = old_logprobs + torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return logprobs, old_logprobs, torch.randn(num_tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("config", CONFIGS)
def test_policy_loss_gradient_is_minus_gate_ratio_advantage_and_equals_finite_differences(config: Any) -> None:
    logprobs, old_logprobs, advantages = _random_tokens()
    leaf = logprobs.clone().requires_grad_()
    loss = policy_loss(leaf, old_logprobs, advantages, config)
    (gradient,) = torch.autograd.grad(loss.token_loss.sum(), leaf)
    ratio = torch.exp(logprobs - old_logprobs)
    torch.testing.assert_close(gradient, -loss.gate * ratio * advantages, rtol=1e-12, atol=0)

    def frozen_surrogate(shift: float) -> Tensor:
        return -loss.gate * torch.exp(logprobs + shift - old_logprobs) * advantages

    step = 1e-5
    numeric = (frozen_surrogate(step) - frozen_surrogate(-step)) / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-6)
    # The sample has open, closing and (where the config has them) shut gates, so that this is about all of them.
    assert (loss.gate == 1).any() and (loss.gate < 1).any()


@pytest.mark.parametrize("config", CONFIGS)
def test_policy_loss_only_logprobs_get_a_gradient_and_gate_and_ratio_are_detached(config: Any) -> None:
    logprobs, old_logprobs, advantages = (tensor.requires_grad_() for tensor in _random_tokens(8))
    loss = policy_loss(logprobs, old_logprobs, advantages, config)
    assert not loss.gate.requires_grad and not loss.ratio.requires_grad
    loss.token_loss.sum().backward()
    assert logprobs.grad is not None and old_logprobs.grad is None and advantages.grad is None


def test_policy_loss_beyond_the_clamp_has_a_bounded_ratio_and_no_gradient() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -26.0, -20.5], dtype=torch.float64, requires_grad=True)
    old_logprobs = torch.tensor([-26.0, -20.5, -1.0, -1.0], dtype=torch.float64)
    # Â on the side where the gate is 1. log ρ = 25, 19.5, −25, −19.5.
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    loss = policy_loss(logprobs, old_logprobs, advantages, MaspoConfig())
    loss.token_loss.sum().backward()
    expected = torch.tensor([20.0, 19.5, -20.0, -19.5], dtype=torch.float64).exp()
    torch.testing.assert_close(loss.ratio, expected, rtol=1e-9, atol=0)
    assert logprobs.grad is not None
    torch.testing.assert_close(
        logprobs.grad, torch.stack([expected.new_zeros(()), expected[1], expected.new_zeros(()), -expected[3]])
    )


@pytest.mark.parametrize("config", [*CONFIGS, MaspoConfig(alpha=0.0), MaspoConfig(sigma_base=1e-30, sigma_max=1e-30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_policy_loss_extremes_stay_finite_with_their_gradients(config: Any, dtype: torch.dtype) -> None:
    log_ratios = [-1e4, -25.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 25.0, 1e4]
    old = [-1e4, -100.0, -39.14, -1.0, 0.0]  # e^−39.14 is 1e-17
    advantages = [-100.0, -34.0, -1.0, 0.0, 1.0, 1 / 0.03, 34.0, 100.0]  # 1/β_neg and both sides of it
    grid = torch.cartesian_prod(torch.tensor(log_ratios), torch.tensor(old), torch.tensor(advantages)).to(dtype)
    old_logprobs = grid[:, 1]
    logprobs = (old_logprobs + grid[:, 0]).requires_grad_()
    loss = policy_loss(logprobs, old_logprobs, grid[:, 2], config)
    loss.token_loss.sum().backward()
    for tensor in (loss.token_loss, loss.gate, loss.ratio, logprobs.grad):
        assert tensor is not None and tensor.isfinite().all()
    assert ((loss.gate >= 0) & (loss.gate <= 1)).all()


@settings(deadline=None)
@given(
    log_ratio=st.floats(-40, 40),
    old_logprob=st.floats(-1e4, 0),
    advantage=st.floats(-50, 50),
    config=st.sampled_from(CONFIGS),
)
def test_policy_loss_any_token_opens_its_gate_towards_the_old_policy(
    log_ratio: float, old_logprob: float, advantage: float, config: Any
) -> None:
    old_logprobs = torch.tensor([old_logprob], dtype=torch.float64)
    loss = policy_loss(old_logprobs + log_ratio, old_logprobs, torch.tensor([advantage], dtype=torch.float64), config)
    gate, ratio = loss.gate.item(), loss.ratio.item()
    assert 0 <= gate <= 1
    capped = config.ratio_cap is not None and advantage < 0 and ratio > config.ratio_cap
    moving_away = (advantage > 0 and ratio > 1) or (advantage < 0 and ratio < 1)
    if not moving_away and not capped:
        assert gate == 1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("given_dtype", "returned_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_policy_loss_dtype_is_float32_unless_logprobs_are_float64(
    config: Any, given_dtype: torch.dtype, returned_dtype: torch.dtype
) -> None:
    logprobs, old_logprobs, advantages = (tensor.to(given_dtype) for tensor in _random_tokens(8))
    loss = policy_loss(logprobs, old_logprobs, advantages, config)
    assert {loss.token_loss.dtype, loss.gate.dtype, loss.ratio.dtype} == {returned_dtype}
    # Neither a float64 advantage (numpy's default) nor a half-precision old log-prob changes that.
    mixed = policy_loss(logprobs, old_logprobs.to(torch.float16), advantages.to(torch.float64), config)
    assert mixed.token_loss.dtype == returned_dtype
    # Widened before the subtraction: the difference of two half-precision numbers is not rounded to half precision.
    expected = torch.exp(logprobs.to(returned_dtype) - old_logprobs.to(returned_dtype))
    torch.testing.assert_close(loss.ratio, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_policy_loss_no_tokens_sums_to_a_zero_with_a_gradient(config: Any) -> None:
    logprobs = torch.empty(0, requires_grad=True)
    loss = policy_loss(logprobs, torch.empty(0), torch.empty(0), config)
    assert loss.token_loss.shape == loss.gate.shape == loss.ratio.shape == (0,)
    loss.token_loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.shape == (0,)


@pytest.mark.parametrize("config", CONFIGS)
def test_policy_loss_is_per_token_so_a_split_changes_nothing(config: Any) -> None:
    logprobs, old_logprobs, advantages = _random_tokens(50)
    whole = policy_loss(logprobs, old_logprobs, advantages, config, cu_seqlens=torch.tensor([0, 20, 50]))
    cuts = (slice(0, 13), slice(13, 50))
    parts = [policy_loss(logprobs[cut], old_logprobs[cut], advantages[cut], config) for cut in cuts]
    assert torch.equal(whole.token_loss, torch.cat([part.token_loss for part in parts]))
    assert torch.equal(whole.gate, torch.cat([part.gate for part in parts]))


@pytest.mark.parametrize("wrong", ["old_logprobs", "advantages"])
def test_policy_loss_shape_that_would_broadcast_raises_and_names_it(wrong: str) -> None:
    arguments = {"logprobs": torch.zeros(4), "old_logprobs": torch.zeros(4), "advantages": torch.zeros(4)}
    arguments[wrong] = torch.zeros(4, 1)
    with pytest.raises(ConfigError, match=rf"{wrong} is of shape \(4, 1\)"):
        policy_loss(**arguments, config=MaspoConfig())


def test_policy_loss_config_without_a_gate_raises_and_names_the_choices() -> None:
    with pytest.raises(ConfigError, match="objective is a dict; it must be one of MaspoConfig, GrpoConfig"):
        policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), {})  # type: ignore[arg-type]


def test_gates_every_objective_of_the_config_has_one() -> None:
    union, _ = get_args(ObjectiveConfig)
    assert set(GATES) == set(get_args(union))


def _described_tokens() -> tuple[PolicyLoss, Tensor]:
    ratio = torch.tensor([1.0, 3.5, 4.0, 0.5, 1.1, 0.9])
    gate = torch.tensor([1.0, 0.6, 0.95, 0.05, 0.4, 0.8])
    return PolicyLoss(-gate * ratio, gate, ratio.requires_grad_()), torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0])


def test_objective_sums_hand_worked_tokens_give_sums_and_counts() -> None:
    loss, advantages = _described_tokens()
    sums = objective_sums(loss, advantages, torch.tensor([True, True, True, True, True, False]))
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())
    assert {name: round(value.item(), 5) for name, value in sums.items()} == {
        "tokens": 5,
        "gate_sum": 3.0,  # 1 + 0.6 + 0.95 + 0.05 + 0.4
        "gate_below_0.9": 3,  # 0.6, 0.05, 0.4
        "gate_below_0.5": 2,
        "gate_below_0.1": 1,
        "ratio_sum": 10.1,  # 1 + 3.5 + 4 + 0.5 + 1.1
        "ratio_max": 4.0,
        "abs_log_ratio_sum": 3.42751,  # 0 + log 3.5 + log 4 + log 2 + log 1.1 = 1.252763 + 3 · 0.693147 + 0.095310
        "clip_0.2": 2,  # Â 1 at ρ 3.5, Â −1 at ρ 0.5; not Â −1 at ρ 4
        "cap_3": 1,  # Â −1 at ρ 4; not Â 1 at ρ 3.5
    }


def test_objective_sums_add_up_over_a_split() -> None:
    loss, advantages = _described_tokens()
    mask = torch.tensor([True, False, True, True, True, True])
    whole = objective_sums(loss, advantages, mask)
    parts = [
        objective_sums(PolicyLoss(loss.token_loss[cut], loss.gate[cut], loss.ratio[cut]), advantages[cut], mask[cut])
        for cut in (slice(0, 2), slice(2, 6))
    ]
    for name, value in whole.items():
        combined = max(part[name] for part in parts) if name == "ratio_max" else sum(part[name] for part in parts)
        torch.testing.assert_close(combined, value)


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_objective_sums_nothing_selected_is_all_zeros(num_tokens: int) -> None:
    loss, advantages = _described_tokens()
    cut = slice(0, num_tokens)
    part = PolicyLoss(loss.token_loss[cut], loss.gate[cut], loss.ratio[cut])
    sums = objective_sums(part, advantages[cut], torch.zeros(num_tokens, dtype=torch.bool))
    assert {value.item() for value in sums.values()} == {0.0}


def test_importance_weights_are_capped_and_carry_no_gradient() -> None:
    old = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([-1.0, -3.0, -2.5], dtype=torch.float64)
    weights = importance_weights(old, behaviour, 2.0)
    # e^0 = 1; e^1 = 2.718 is capped at 2; e^-0.5 = 0.6065.
    assert weights.tolist() == pytest.approx([1.0, 2.0, math.exp(-0.5)])
    assert not weights.requires_grad
