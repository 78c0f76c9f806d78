"""Gates of the objectives that MASPO is compared with, one small pure function each.

Promise: each is the `F` of its own source, cited beside it, under the surrogate of `base`.
"""

from torch import Tensor

from maspo_ray.config import GrpoConfig


def within_clip(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """Returns [tokens] bool: whether PPO's clipped surrogate has a gradient at the token; True where Â = 0.

    1[ρ ≤ 1 + ε_high] where Â > 0, 1[ρ ≥ 1 − ε_low] where Â < 0.
    """
    too_high = (advantages > 0) & (ratio > 1 + epsilon_high)
    too_low = (advantages < 0) & (ratio < 1 - epsilon_low)
    return ~(too_high | too_low)


def grpo_gate(
    ratio: Tensor, old_logprobs: Tensor, advantages: Tensor, config: GrpoConfig, cu_seqlens: Tensor | None
) -> Tensor:
    """Returns GRPO's hard clip as F in {0, 1}, [tokens]; arXiv:2402.03300, equation 3."""
    return within_clip(ratio, advantages, config.epsilon, config.epsilon).to(ratio.dtype)
