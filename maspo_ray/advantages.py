"""Rewards of a group → advantages.

Promise: pure; a completion that could not be scored (reward NaN) counts in no baseline and its advantage is exactly 0; a group with fewer
than two scored rewards, or with all of them equal, has advantages of exactly 0 and `has_signal` False. Never a NaN. What becomes of a
group without a signal is the pipeline's to decide, which filters and refills it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from maspo_ray.config import AdvantageConfig
from maspo_ray.errors import ConfigError

STD_EPSILON = 1e-6

EQUAL_REWARDS_TOLERANCE = 1e-12
"""Relative. Rewards that are sums of parts may differ by rounding (0.1 + 0.2 and 0.3), which is no signal."""


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """The advantages of one group.

    Attributes:
        values: one for each completion, in order; 0 where it could not be scored.
        num_scored: completions with a reward.
        has_signal: whether any value differs from 0.
    """

    values: tuple[float, ...]
    num_scored: int
    has_signal: bool


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> GroupAdvantages:
    """Returns the advantages of one group's completions.

    `grpo`     (r − mean) / (std + 1e-6), arXiv:2402.03300, section 4.1.2. The paper writes only std(r); this is the sample
               standard deviation (divided by n − 1), as in TRL's GRPOTrainer and verl, both through `torch.std`, so
               that hyperparameters carry over. The population's would make advantages √(n / (n − 1)) larger.
    `dr_grpo`  r − mean, arXiv:2503.20783: the division by std would give very easy and very hard prompts more weight.
    `rloo`     r − mean of the other completions' rewards, arXiv:2402.14740.

    Args:
        rewards: of the group's completions; NaN for one that could not be scored.

    Raises:
        ConfigError: a reward is infinite.
    """
    scored = [float(reward) for reward in rewards if not math.isnan(reward)]
    for reward in scored:
        if math.isinf(reward):
            raise ConfigError(
                f"reward is {reward}; it must be finite. Mend the reward, or raise in it where it cannot score."
            )
    if len(scored) < 2 or math.isclose(min(scored), max(scored), rel_tol=EQUAL_REWARDS_TOLERANCE):
        return GroupAdvantages((0.0,) * len(rewards), len(scored), has_signal=False)
    mean = math.fsum(scored) / len(scored)
    scale = _SCALES[config.kind](scored, mean)
    values = tuple(0.0 if math.isnan(reward) else (float(reward) - mean) * scale for reward in rewards)
    return GroupAdvantages(values, len(scored), has_signal=True)


def _grpo_scale(scored: Sequence[float], mean: float) -> float:
    variance = math.fsum((reward - mean) ** 2 for reward in scored) / (len(scored) - 1)
    return 1.0 / (math.sqrt(variance) + STD_EPSILON)


def _dr_grpo_scale(scored: Sequence[float], mean: float) -> float:
    return 1.0


def _rloo_scale(scored: Sequence[float], mean: float) -> float:
    # r − (n·mean − r) / (n − 1) = (r − mean) · n / (n − 1)
    return len(scored) / (len(scored) - 1)


_SCALES: dict[str, Callable[[Sequence[float], float], float]] = {
    "grpo": _grpo_scale,
    "dr_grpo": _dr_grpo_scale,
    "rloo": _rloo_scale,
}
"""The factor of r − mean, for each kind."""
