"""An objective's metrics of a micro-batch: sums and counts of its gate and ratio.

Promise: detached scalars that add up over micro-batches and ranks (`ratio_max` by maximum), however the batch was split. The caller divides
them, and decides when to wait for the device.
"""

import torch
from torch import Tensor

from maspo_ray.objectives.base import PolicyLoss
from maspo_ray.objectives.peers import within_clip
from maspo_ray.objectives.tensor_ops import masked_sum

REFERENCE_CLIP = 0.2
"""GRPO's usual ε. The metrics count the tokens whose gradient a hard clip at 1 ± ε would have dropped."""

REFERENCE_CAP = 3.0
"""Dual-clip PPO's constant c, arXiv:1912.09729: where Â < 0, it drops the gradient of ratios above c."""


@torch.no_grad()
def objective_sums(loss: PolicyLoss, advantages: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Returns float64 scalars over the tokens that `mask` selects.

    tokens                 how many
    gate_sum               Σ F
    gate_below_0.9 (0.5, 0.1)  tokens whose F is below that
    ratio_sum, ratio_max   Σ ρ and the largest ρ, 0 without tokens
    abs_log_ratio_sum      Σ |log ρ|
    clip_0.2               tokens that a clip at 1 ± 0.2 would have given no gradient
    cap_3                  tokens with Â < 0 that a ratio_cap of 3 would have given no gradient

    Args:
        advantages: [tokens].
        mask: [tokens] bool.
    """
    gate, ratio = loss.gate, loss.ratio
    per_token = {
        "tokens": torch.ones_like(gate),
        "gate_sum": gate,
        "gate_below_0.9": gate < 0.9,
        "gate_below_0.5": gate < 0.5,
        "gate_below_0.1": gate < 0.1,
        "ratio_sum": ratio,
        "abs_log_ratio_sum": ratio.log().abs(),
        "clip_0.2": ~within_clip(ratio, advantages, REFERENCE_CLIP, REFERENCE_CLIP),
        "cap_3": (advantages < 0) & (ratio > REFERENCE_CAP),
    }
    # Selected by `where`, not by indexing, which would wait for the device.
    sums = {name: masked_sum(values.to(torch.float64), mask) for name, values in per_token.items()}
    # Ratios are positive, so that the extra 0 is the maximum only where no token is selected.
    selected = torch.where(mask, ratio, 0)
    sums["ratio_max"] = torch.cat([selected, selected.new_zeros(1)]).max().to(torch.float64)
    return sums
