"""The one surrogate loss that all objectives share; objectives differ in their gate F alone.

Promise: with ρ = π_θ / π_old = exp(clamp(log π_θ − log π_old, −20, 20)) and a detached gate F,

    token_loss = −stop_gradient(F) · ρ · Â,      ∇ token_loss = −F · ρ · Â · ∇ log π_θ

which is the form that arXiv:2602.17550, section 3, gives all objectives of the GRPO family. Beyond the clamp the gradient
is 0. Everything is finite for finite input. Masks, normalisation and KL are the caller's.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from maspo_ray.config import ObjectiveConfig
from maspo_ray.errors import ConfigError
from maspo_ray.objectives.tensor_ops import MAX_LOG_RATIO, compute_dtype

ConfigT_contra = TypeVar("ConfigT_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """An objective's loss, gate and ratio for packed tokens; float32, or float64 where the log-probs were.

    Attributes:
        token_loss: [tokens], the only field with a gradient.
        gate: [tokens], F.
        ratio: [tokens], ρ.
    """

    token_loss: Tensor
    gate: Tensor
    ratio: Tensor


class Gate(Protocol[ConfigT_contra]):
    """A pure function that returns F, [tokens]. Its arguments carry no gradient, and `ratio_cap` is applied to its result afterwards.

    Args:
        ratio: [tokens], ρ.
        old_logprobs: [tokens], log π_old.
        advantages: [tokens], Â.
        config: the objective's own section.
        cu_seqlens: [sequences + 1] int, where the packed sequences start and end; for sequence-level gates.
    """

    def __call__(
        self, ratio: Tensor, old_logprobs: Tensor, advantages: Tensor, config: ConfigT_contra, cu_seqlens: Tensor | None
    ) -> Tensor: ...


def gated_loss(
    gate_function: Gate[ObjectiveConfig],
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    config: ObjectiveConfig,
    cu_seqlens: Tensor | None,
) -> PolicyLoss:
    """Returns the surrogate loss under one gate.

    Raises:
        ConfigError: the shapes differ; broadcasting would give tokens the advantages of others.
    """
    for name, tensor in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        if tensor.shape != logprobs.shape:
            raise ConfigError(
                f"{name} is of shape {tuple(tensor.shape)}; it needs one value for each of logprobs' "
                f"{tuple(logprobs.shape)} tokens. Expand it to that shape."
            )
    dtype = compute_dtype(logprobs)
    old_logprobs, advantages = old_logprobs.detach().to(dtype), advantages.detach().to(dtype)
    ratio = torch.exp((logprobs.to(dtype) - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    constant_ratio = ratio.detach()
    gate = gate_function(constant_ratio, old_logprobs, advantages, config, cu_seqlens)
    if config.ratio_cap is not None:
        gate = gate.masked_fill((advantages < 0) & (constant_ratio > config.ratio_cap), 0.0)
    return PolicyLoss(token_loss=-gate * ratio * advantages, gate=gate, ratio=constant_ratio)


def importance_weights(old_logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Returns the truncated importance weights min(π_old / μ, cap), [tokens], detached; the caller multiplies the loss by them.

    Only for `old_policy: recompute`, where ρ = π_θ / π_old says nothing of μ. With ρ = π_θ / μ the ratio is the correction already, and
    the weight would apply it twice.
    """
    dtype = compute_dtype(old_logprobs)
    log_weight = old_logprobs.detach().to(dtype) - behaviour_logprobs.detach().to(dtype)
    return torch.exp(log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)).clamp(max=cap)
