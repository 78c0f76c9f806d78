"""Masked sums, KL estimates, and token log-probs from hidden states.

Promise: sums and per-token values only, which the caller divides; half-precision inputs are computed in float32, float64 in float64;
a masked value, even a NaN, reaches neither a result nor a gradient; `[tokens, vocab]` logits never exist whole, neither in the
forward nor in the backward pass.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maspo_ray.errors import ConfigError

KLEstimator = Literal["k1", "k2", "k3"]

LogitTransform = Callable[[Tensor], Tensor]
"""[tokens, rows] products of the output embedding → [tokens, vocab] logits, each token's of its own alone: a soft cap, a scale."""

MAX_LOG_RATIO = 20.0
"""Bound of log-ratios before `exp`: e^20 is 4.9e8, whose square still fits float32."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that logarithms and exponentials of `tensor` are taken in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the sum of `values` where `mask` holds, a scalar of at least float32.

    Values are selected, not multiplied by 0 or 1, so that a masked NaN does not leak. Where nothing is selected the sum is a 0 that
    has a gradient, so that a rank without tokens still takes part in the backward pass.

    Args:
        values: [tokens].
        mask: [tokens] bool.
    """
    return torch.where(mask, values, 0).sum(dtype=compute_dtype(values))


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Returns [tokens] estimates of KL(policy || reference) from tokens that the policy sampled.

    With r = π_ref / π (Schulman, "Approximating KL divergence", 2020):
    k1 = −log r (unbiased, can be negative), k2 = ½ (log r)² (biased, at least 0), k3 = r − 1 − log r (unbiased, at least 0).
    As terms of a loss on policy, k2's expected gradient is that of this KL, k3's that of KL(reference || policy), k1's is 0.

    k3 clamps log r from above, since `exp` would overflow, in both places where it occurs: clamped in `exp` alone, the remaining −log r
    would have a gradient that pushes the policy away from the reference.

    Args:
        logprobs: [tokens], of the current policy; carries the gradient.
        reference_logprobs: [tokens], treated as constant.
    """
    dtype = compute_dtype(logprobs)
    log_ratio = reference_logprobs.detach().to(dtype) - logprobs.to(dtype)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(bounded) - bounded
    raise ConfigError(f"kl.estimator is {estimator}; it must be k1, k2 or k3. Set one of them.")


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int = 512,
    bias: Tensor | None = None,
    transform: LogitTransform | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the log-probs of `targets` and the entropy of each token's distribution, both [tokens] float32.

    Logits are computed for `chunk_tokens` tokens at a time, in the dtype of `weight` as the rollout engine does, and once more in the
    backward pass. Log-probs carry gradients to `hidden`, `weight` and `bias`; the entropy is a metric and carries none.

    Args:
        hidden: [tokens, d], the model's last hidden states, each at the position that predicts its target.
        weight: [vocab, d], of the output embedding.
        targets: [tokens] int64.
        temperature: divides the logits, as in sampling.
        bias: [vocab], of the output embedding.
        transform: what the architecture makes of the output embedding's products; None where these are the logits.

    Raises:
        ConfigError: the temperature is not above 0, or the chunk has no tokens.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; log-probs need one above 0. Set rollout.temperature to 1.0.")
    if chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens is {chunk_tokens}; it must be at least 1. Raise it.")
    found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(
        hidden, weight, bias, targets, temperature, chunk_tokens, transform
    )
    return found


class _ChunkedLogprobs(torch.autograd.Function):
    """`chunked_logprobs`: one chunk's logits at a time, overwritten in place by probabilities and gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        transform: LogitTransform | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, log_norm = (hidden.new_empty(len(targets), dtype=compute_dtype(hidden)) for _ in range(3))
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias, temperature, transform)
            log_norm[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(-1, targets[part, None])[:, 0] - log_norm[part]
            # A logit of -inf has probability 0; `entr` takes 0 log 0 as 0 where a product would be NaN.
            entropy[part] = torch.special.entr(logits.sub_(log_norm[part, None]).exp_()).sum(dim=-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm)
        ctx.temperature, ctx.chunk_tokens, ctx.transform = temperature, chunk_tokens, transform
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_norm = ctx.saved_tensors
        grad_logprobs = gradients[0] / ctx.temperature
        grad_hidden = torch.empty_like(hidden)
        # None for a frozen output embedding, as with LoRA.
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for start in range(0, len(targets), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            grad_logits, pull_back = _linked_logits(hidden[part], weight, bias, ctx.temperature, ctx.transform)
            # ∂ log π(target) / ∂ logits = (1[target] − π) / temperature
            grad_logits.sub_(log_norm[part, None]).exp_().mul_(-grad_logprobs[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad_logits = pull_back(grad_logits).to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform | None
) -> Tensor:
    """Returns [tokens, vocab] logits at the temperature, of at least float32."""
    product = F.linear(hidden, weight, bias)
    logits = product if transform is None else transform(product)
    return logits.to(compute_dtype(logits)).div_(temperature)


def _linked_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform | None
) -> tuple[Tensor, LogitTransform]:
    """Returns `_logits`, and what turns a gradient of the architecture's logits into one of the output embedding's products."""
    if transform is None:
        return _logits(hidden, weight, bias, temperature, None), lambda gradient: gradient
    # Autograd knows of this chunk, and of the transform alone.
    product = F.linear(hidden, weight, bias).requires_grad_()
    with torch.enable_grad():
        logits = transform(product)

    def pull_back(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(logits, product, gradient.to(logits.dtype))[0]

    return logits.detach().to(compute_dtype(logits)) / temperature, pull_back
