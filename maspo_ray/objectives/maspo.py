"""The MASPO gate: Mass-Adaptive Soft Policy Optimization, arXiv:2602.17550, section 3.

    m      = clamp(σ_base / π_old^α, σ_base, σ_max)                 mass-adaptive limiter
    σ_pos  = m · clamp(1 + β_pos · Â,        risk_min, risk_max)    asymmetric risk controller
    σ_neg  = m · clamp(1 / (1 − β_neg · Â),  risk_min, risk_max)
    F      = exp(−(ρ − 1)² / (2 σ_pos²))   where Â > 0 and ρ > 1    soft Gaussian gate
             exp(−(ρ − 1)² / (2 σ_neg²))   where Â < 0 and ρ < 1
             1                             elsewhere (the gate is unilateral)

Where this departs from the paper's text: the clamps are those of the authors' released implementation; the text has none.
The risk controller assumes binary, verified rewards: a group-normalised Â then says how surprising a right or a wrong answer was. With
a graded reward it says how the group's values are spread, and the gates' widths follow that instead.
As in the paper, the gate does not bound tokens with Â < 0 and ρ > 1; `ratio_cap` does, for every objective alike.
"""

import torch
from torch import Tensor

from maspo_ray.config import MaspoConfig


def maspo_gate(
    ratio: Tensor, old_logprobs: Tensor, advantages: Tensor, config: MaspoConfig, cu_seqlens: Tensor | None
) -> Tensor:
    """Returns F in [0, 1], [tokens]."""
    sigma = _mass_limit(old_logprobs, config) * _risk(advantages, config)
    moving_away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    gaussian = torch.exp(-0.5 * ((ratio - 1) / sigma).square())
    return torch.where(moving_away, gaussian, torch.ones_like(ratio))


def _mass_limit(old_logprobs: Tensor, config: MaspoConfig) -> Tensor:
    """Returns m, [tokens]: the rarer the token under π_old, the wider its gate."""
    # From the log-prob, since π_old itself underflows to 0; where this overflows, the clamp makes it σ_max.
    return (config.sigma_base * torch.exp(-config.alpha * old_logprobs)).clamp(config.sigma_base, config.sigma_max)


def _risk(advantages: Tensor, config: MaspoConfig) -> Tensor:
    """Returns the factor of m, [tokens]: above 1 for positive advantages, which widens the gate, and below 1 for negative ones."""
    positive = 1 + config.beta_pos * advantages
    # Used where Â ≤ 0, where the denominator is at least 1. Elsewhere it can be 0 (at Â = 1/β_neg), but `where` drops the infinity, and
    # there is no backward pass through which it would come back as a NaN.
    negative = 1 / (1 - config.beta_neg * advantages)
    return torch.where(advantages > 0, positive, negative).clamp(config.risk_min, config.risk_max)
