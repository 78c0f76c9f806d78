"""The objective's figures by sign, probability and lag, worked by hand, and that they add up over a split."""

import math

import pytest
import torch

from maspo_ray.config import GrpoConfig
from maspo_ray.objectives import PolicyLoss, policy_loss
from maspo_ray.objectives.breakdown import Breakdown

CPU = torch.device("cpu")
RATIO = torch.tensor([1.5, 1.0, 0.5, 1.1, 3.0], dtype=torch.float64)
OLD = torch.tensor([0.05, 0.95, 0.95, 1.0, 0.5], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, 0.0, -1.0], dtype=torch.float64)
ENTROPY = torch.tensor([0.5, 1.0, 2.0, 4.5, 9.0], dtype=torch.float64)
LAGS = torch.tensor([0, 1, 1, 1, 0])
MASK = torch.tensor([True, True, True, True, False])


def _loss() -> PolicyLoss:
    return policy_loss(OLD + RATIO.log(), OLD, ADVANTAGES, GrpoConfig())


def test_breakdown_hand_worked_tokens() -> None:
    breakdown = Breakdown(CPU)
    breakdown.add(_loss(), OLD, ENTROPY, ADVANTAGES, LAGS, MASK)
    found = breakdown.metrics()
    # Positive: 1.5 (clipped at 1.2, gate 0) and 1.0 (gate 1). Negative: 0.5 (clipped at 0.8); the token of ratio 3 is masked.
    assert found["objective/gate_mean/positive"] == 0.5
    assert found["objective/clip_0.2_share/positive"] == 0.5
    assert found["objective/gate_below_0.1/negative"] == 1.0
    # π_old 0.05 lies in the first tenth; 0.95, 0.95 and 1.0 in the last: gates 1, 0 and 1.
    assert found["objective/gate_mean/prob_0.0"] == 0.0
    assert found["objective/gate_mean/prob_0.9"] == pytest.approx(2 / 3)
    assert "objective/gate_mean/prob_0.5" not in found
    # Lag 0 has the first token alone; lag 1 has ratios 1.0, 0.5, 1.1: sum 2.6, squares 1 + 0.25 + 1.21 = 2.46.
    assert found["objective/token_share/lag_0"] == 0.25
    assert found["objective/ratio_mean/lag_1"] == pytest.approx(2.6 / 3)
    assert found["objective/entropy/lag_0"] == 0.5
    assert found["objective/entropy/lag_1"] == 2.5
    assert found["objective/entropy/positive"] == 0.75
    assert found["objective/effective_sample_share/lag_0"] == pytest.approx(1.0)
    assert found["objective/effective_sample_share/lag_1"] == pytest.approx(2.6**2 / (3 * 2.46))
    # All: sum 4.1, squares 2.46 + 2.25 = 4.71.
    assert found["objective/effective_sample_share"] == pytest.approx(4.1**2 / (4 * 4.71))
    # Sorted 0.5, 1.0, 1.1, 1.5: the median is the second, the 90 % quantile the fourth.
    assert found["objective/ratio_p50"] == pytest.approx(1.0, rel=0.01)
    assert found["objective/ratio_p90"] == pytest.approx(1.5, rel=0.01)
    # Lag 1 alone: 0.5, 1.0, 1.1.
    assert found["objective/ratio_p10/lag_1"] == pytest.approx(0.5, rel=0.01)
    assert found["objective/ratio_p90/lag_1"] == pytest.approx(1.1, rel=0.01)
    assert found["objective/ratio_p50/lag_0"] == pytest.approx(1.5, rel=0.01)


def test_breakdown_adds_up_over_a_split() -> None:
    whole, parts = Breakdown(CPU), Breakdown(CPU)
    whole.add(_loss(), OLD, ENTROPY, ADVANTAGES, LAGS, MASK)
    loss = _loss()
    for cut in (slice(0, 2), slice(2, 5)):
        part = PolicyLoss(loss.token_loss[cut], loss.gate[cut], loss.ratio[cut])
        parts.add(part, OLD[cut], ENTROPY[cut], ADVANTAGES[cut], LAGS[cut], MASK[cut])
    assert parts.metrics() == whole.metrics()


def test_breakdown_of_nothing_is_empty_and_extremes_are_finite() -> None:
    assert Breakdown(CPU).metrics() == {}
    breakdown = Breakdown(CPU)
    old = torch.tensor([-40.0, 0.0])
    ratio = torch.tensor([math.exp(20.0), math.exp(-20.0)])
    loss = PolicyLoss(torch.zeros(2), torch.ones(2), ratio)
    breakdown.add(
        loss, old, torch.ones(2), torch.tensor([1.0, -1.0]), torch.tensor([99, -1]), torch.ones(2, dtype=torch.bool)
    )
    found = breakdown.metrics()
    assert all(math.isfinite(value) for value in found.values())
    assert found["objective/token_share/lag_15"] == found["objective/token_share/lag_0"] == 0.5
    assert found["objective/ratio_p99"] == pytest.approx(math.exp(2), rel=0.01)
