"""Objectives: `policy_loss` under the gate that the config names.

Promise: pure, element-wise over packed tokens; no `.item()`, no collectives. A new objective is a config class, a gate
function and one line of `GATES`.
"""

from typing import Any

from torch import Tensor

from maspo_ray.config import GrpoConfig, MaspoConfig, ObjectiveConfig
from maspo_ray.errors import ConfigError
from maspo_ray.objectives.base import Gate, PolicyLoss, gated_loss, importance_weights
from maspo_ray.objectives.maspo import maspo_gate
from maspo_ray.objectives.metrics import objective_sums
from maspo_ray.objectives.peers import grpo_gate

__all__ = ["GATES", "Gate", "PolicyLoss", "importance_weights", "objective_sums", "policy_loss"]

# `Any`, since each gate takes the config class that is its key here, which the type of a dict cannot express.
GATES: dict[type, Gate[Any]] = {
    MaspoConfig: maspo_gate,
    GrpoConfig: grpo_gate,
}


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """Returns each token's loss, gate and ratio, [tokens] float32 (float64 where `logprobs` is float64).

    Args:
        logprobs: [tokens], log π_θ; the only argument that gets a gradient.
        old_logprobs: [tokens], log π_old, the denominator of the ratio.
        advantages: [tokens], Â.
        cu_seqlens: [sequences + 1] int, bounds of the packed sequences; only sequence-level gates read it.

    Raises:
        ConfigError: no gate is registered for the config's class, or the shapes differ.
    """
    gate = GATES.get(type(config))
    if gate is None:
        known = ", ".join(known_config.__name__ for known_config in GATES)
        raise ConfigError(f"objective is a {type(config).__name__}; it must be one of {known}. Pass one of them.")
    return gated_loss(gate, logprobs, old_logprobs, advantages, config, cu_seqlens)
