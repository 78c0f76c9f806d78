"""The objective's figures by sign, probability and lag, worked by hand, and that they add up over a split."""

import math

import pytest
import torch

from maspo_ray.config import GrpoConfig
from maspo_ray.objectives import PolicyLoss, policy_loss
from maspo_ray.objectives.breakdown import Breakdown, ScoredTokens

CPU = torch.device("cpu")
RATIO = torch.tensor([1.5, 1.0, 0.5, 1.1, 3.0], dtype=torch.float64)
OLD = torch.tensor([0.05, 0.95, 0.95, 1.0, 0.5], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([1.0, 1.0, -1.0, 0.0, -1.0], dtype=torch.float64)
LOGPROBS = OLD + RATIO.log()
# r = π/μ is 2, ½, 1, e and e²: the sampling policy is none that the ratio above is taken to.
BEHAVIOUR = LOGPROBS - torch.tensor([2.0, 0.5, 1.0, math.e, math.e**2], dtype=torch.float64).log()
ENTROPY = torch.tensor([0.5, 1.0, 2.0, 4.5, 9.0], dtype=torch.float64)
LAGS = torch.tensor([0, 1, 1, 1, 0])
MASK = torch.tensor([True, True, True, True, False])


def _loss() -> PolicyLoss:
    return policy_loss(LOGPROBS, OLD, ADVANTAGES, GrpoConfig())


def _add(breakdown: Breakdown, loss: PolicyLoss, cut: slice = slice(None)) -> None:
    breakdown.add(
        loss, ScoredTokens(LOGPROBS[cut], OLD[cut], BEHAVIOUR[cut], ENTROPY[cut], ADVANTAGES[cut], LAGS[cut], MASK[cut])
    )


def test_breakdown_hand_worked_tokens() -> None:
    breakdown = Breakdown(CPU)
    _add(breakdown, _loss())
    found = breakdown.metrics()
    # Positive: 1.5 (clipped at 1.2, gate 0) and 1.0 (gate 1). Negative: 0.5 (clipped at 0.8); the token of ratio 3 is masked.
    assert found["objective/gate_mean/positive"] == 0.5
    assert found["objective/clip_0.2_share/positive"] == 0.5
    assert found["objective/gate_below_0.1/negative"] == 1.0
    # π_old 0.05 lies in the first tenth; 0.95, 0.95 and 1.0 in the last: gates 1, 0 and 1.
    assert found["objective/gate_mean/prob_0.0"] == 0.0
    assert found["objective/gate_mean/prob_0.9"] == pytest.approx(2 / 3)
    assert math.isnan(found["objective/gate_mean/prob_0.5"])
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
    # r − 1 − log r. Lag 0: 2 − 1 − log 2. Lag 1: (½ − 1 + log 2), 0 and (e − 1 − 1), of three tokens.
    assert found["objective/behaviour_kl/lag_0"] == pytest.approx(1 - math.log(2))
    assert found["objective/behaviour_kl/lag_1"] == pytest.approx((-0.5 + math.log(2) + math.e - 2) / 3)
    # All four: the logarithms of 2 cancel, ½ + e − 2 is left.
    assert found["objective/behaviour_kl"] == pytest.approx((math.e - 1.5) / 4)
    assert "objective/behaviour_kl/positive" not in found


def test_breakdown_behaviour_kl_of_every_token_by_its_probability_is_the_exact_one() -> None:
    # μ samples three tokens with ½, ¼, ¼, so the first stands twice for one each of the others; π is ¼, ⅝, ⅛. The other way round
    # the KL would be ¼ log ½ + ⅝ log 2.5 + ⅛ log ½ = 0.31; this way it is 0.29.
    behaviour = torch.tensor([0.5, 0.5, 0.25, 0.25], dtype=torch.float64)
    policy = torch.tensor([0.25, 0.25, 0.625, 0.125], dtype=torch.float64)
    breakdown, loss = Breakdown(CPU), policy_loss(policy.log(), behaviour.log(), torch.ones(4), GrpoConfig())
    zeros, mask = torch.zeros(4), torch.ones(4, dtype=torch.bool)
    breakdown.add(
        loss, ScoredTokens(policy.log(), behaviour.log(), behaviour.log(), zeros, torch.ones(4), zeros.long(), mask)
    )
    exact = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.625) + 0.25 * math.log(0.25 / 0.125)
    assert breakdown.metrics()["objective/behaviour_kl"] == pytest.approx(exact)


def test_breakdown_adds_up_over_a_split() -> None:
    whole, parts = Breakdown(CPU), Breakdown(CPU)
    _add(whole, _loss())
    loss = _loss()
    for cut in (slice(0, 2), slice(2, 5)):
        part = PolicyLoss(loss.token_loss[cut], loss.gate[cut], loss.ratio[cut])
        _add(parts, part, cut)
    found = parts.metrics()
    assert found == pytest.approx(whole.metrics(), rel=0, abs=0, nan_ok=True)
    assert found["objective/behaviour_kl/lag_1"] > 0


def test_breakdown_has_the_same_names_whatever_it_was_given() -> None:
    breakdown = Breakdown(CPU)
    nothing = breakdown.metrics()
    assert all(math.isnan(value) for value in nothing.values())
    _add(breakdown, _loss())
    found = breakdown.metrics()
    assert list(found) == list(nothing)
    # What has no tokens is undefined, its share of them is none.
    assert found["objective/token_share/lag_2"] == 0
    assert math.isnan(found["objective/ratio_mean/lag_2"]) and math.isnan(found["objective/ratio_p50/lag_2"])
    assert math.isnan(found["objective/effective_sample_share/lag_2"])


def test_breakdown_extremes_are_finite() -> None:
    breakdown = Breakdown(CPU)
    old = torch.tensor([-40.0, 0.0])
    ratio = torch.tensor([math.exp(20.0), math.exp(-20.0)])
    loss = PolicyLoss(torch.zeros(2), torch.ones(2), ratio)
    ones, mask = torch.ones(2), torch.ones(2, dtype=torch.bool)
    behaviour = torch.tensor([-1000.0, 0.0])
    policy = torch.tensor([0.0, -1000.0])
    breakdown.add(
        loss, ScoredTokens(policy, old, behaviour, ones, torch.tensor([1.0, -1.0]), torch.tensor([99, -1]), mask)
    )
    found = breakdown.metrics()
    assert all(math.isfinite(value) for name, value in found.items() if name.endswith(("lag_15", "lag_0", "positive")))
    # log r is bounded at ±20: e²⁰ − 1 − 20, and e⁻²⁰ − 1 + 20.
    assert found["objective/behaviour_kl/lag_15"] == pytest.approx(math.exp(20) - 21)
    assert found["objective/behaviour_kl/lag_0"] == pytest.approx(19 + math.exp(-20))
    assert found["objective/token_share/lag_15"] == found["objective/token_share/lag_0"] == 0.5
    assert found["objective/ratio_p99"] == pytest.approx(math.exp(2), rel=0.01)
