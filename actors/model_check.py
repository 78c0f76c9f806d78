"""The learner's log-probs and gradient of a few tokens against the model's own plain forward pass, before anything is generated.

Promise: on a slice of the model, in float32 wherever the attention's kernels have it, what learner or reference compute is what
transformers computes for each sequence by itself, with its eager attention and without packing, sharing or chunks; else the run
ends, with what differs and the setting that avoids it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.attention_choice import choose_attention, probe_bundles, set_attention, try_dtype
from actors.model_slice import slice_of
from actors.packed_model import Attention, TokenModel
from actors.token_batch import Bundled, apart, lay_out
from maspo_ray.config import LearnerConfig, ModelConfig
from maspo_ray.errors import ConfigError

_TEMPERATURE = 0.7
"""Not 1, which would hide one that is left out."""
_FLOAT32_LOGPROB, _FLOAT32_GRADIENT = 1e-3, 1e-2
_HALF_LOGPROB, _HALF_GRADIENT = 0.25, 0.3
_SMALL_GRADIENT = 1e-3
"""A parameter's gradient counts as at least so much of the whole gradient's norm: below, it is rounding."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a forward and backward pass is from the plain one.

    Attributes:
        logprob: the largest |Δ log-prob|.
        gradient: the largest ‖Δ‖ / ‖gradient‖ of a parameter; 0 where none was computed.
        parameter: whose it is.
    """

    logprob: float
    gradient: float
    parameter: str

    def fault(self, dtype: torch.dtype) -> str | None:
        """Returns what differs by more than rounding in a dtype, None where nothing does."""
        whole = dtype == torch.float32
        most_logprob, most_gradient = (
            (_FLOAT32_LOGPROB if whole else _HALF_LOGPROB),
            (_FLOAT32_GRADIENT if whole else _HALF_GRADIENT),
        )
        if not self.logprob <= most_logprob:
            return f"log-probs differ by up to {self.logprob:.3g}, above {most_logprob:g}"
        if not self.gradient <= most_gradient:
            return f"gradient of {self.parameter} differs by {self.gradient:.3g} of its norm, above {most_gradient:g}"
        return None


@dataclass(frozen=True, slots=True)
class _Way:
    """How the slice computes: its attention, whether a prompt is shared, whether activations are recomputed."""

    implementation: str
    attention: Attention
    shares: bool
    recomputes: bool


def check_model(model: TokenModel, config: ModelConfig, learner: LearnerConfig | None, device: torch.device) -> None:
    """Compares the model as it is loaded with transformers' own forward pass.

    Args:
        learner: whose gradient is compared too; None for the reference, which has none.
        device: where the slice computes.

    Raises:
        ConfigError: they differ.
    """
    dtype = try_dtype(config.attn_implementation, model.model.dtype)
    tried = slice_of(model.model, dtype, device)
    shares = model.shares_prompts and (learner is None or learner.share_prompts)
    recomputes = learner is not None and learner.gradient_checkpointing
    way = _Way(config.attn_implementation, model.attention, shares, recomputes)
    trial = _Trial(
        tried, "eager" if dtype == torch.float32 else config.attn_implementation, device, learner is not None
    )
    fault = trial.difference(way).fault(dtype)
    if fault is None:
        return
    remedy = next(
        (
            setting
            for setting, other in _others(way, learner, tried, device)
            if not trial.difference(other).fault(dtype)
        ),
        None,
    )
    who = "reference" if learner is None else "learner"
    raise ConfigError(
        f"model.path is {config.path}; the {who}'s {fault}, from transformers' own forward pass of {type(model.model).__name__}, on a "
        f"few tokens in {str(dtype).removeprefix('torch.')}. "
        + (
            f"Set {remedy}, which avoids it."
            if remedy
            else "No setting avoids it: take a model of another architecture."
        )
    )


def _others(
    way: _Way, learner: LearnerConfig | None, tried: PreTrainedModel, device: torch.device
) -> Iterator[tuple[str, _Way]]:
    """Yields settings that change how the slice computes, with how it does then, those first that cost least."""
    if learner is not None and way.shares:
        yield "learner.share_prompts: false", replace(way, shares=False)
    if way.recomputes:
        yield "learner.gradient_checkpointing: false", replace(way, recomputes=False)
    if way.implementation != "eager":
        attention = choose_attention(tried, "eager", device)
        yield (
            "model.attn_implementation: eager",
            replace(way, implementation="eager", attention=attention, shares=False),
        )


class _Trial:
    """A slice, and what its plain forward and backward pass give.

    Args:
        plain_implementation: of the plain pass's attention.
    """

    def __init__(
        self, tried: PreTrainedModel, plain_implementation: str, device: torch.device, has_gradient: bool
    ) -> None:
        self._tried = tried
        self._device = device
        self._trained = {name: p for name, p in tried.named_parameters() if p.requires_grad} if has_gradient else {}
        self._bundles = probe_bundles(tried)
        set_attention(tried, "alone", plain_implementation)
        with torch.set_grad_enabled(has_gradient):
            self._plain = plain_logprobs(tried, self._bundles, _TEMPERATURE, device)
        self._gradient = self._gradient_of(self._plain)

    def difference(self, way: _Way) -> Difference:
        """Returns how far a way's pass is from the plain one."""
        set_attention(self._tried, way.attention, way.implementation)
        if way.recomputes:
            self._tried.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = TokenModel(self._tried, way.attention).train()
        bundles = self._bundles if way.shares else apart(self._bundles)
        with torch.set_grad_enabled(bool(self._trained)):
            logprobs, _ = model(lay_out(bundles, self._device), _TEMPERATURE)
        found = self._gradient_of(logprobs)
        if way.recomputes:
            self._tried.gradient_checkpointing_disable()
        largest = float((logprobs - self._plain).detach().abs().max())
        return Difference(largest, *largest_distance(found, self._gradient))

    def _gradient_of(self, logprobs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the trained parameters' gradients of a weighted sum of log-probs."""
        if not self._trained:
            return {}
        weights = torch.linspace(-1, 2, len(logprobs), device=logprobs.device)
        gradients = torch.autograd.grad(
            (logprobs * weights).sum(), list(self._trained.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(self._trained, gradients, strict=True))


def plain_logprobs(
    model: PreTrainedModel, bundles: Sequence[Bundled], temperature: float, device: torch.device
) -> torch.Tensor:
    """Returns [targets] float32, the completions' log-probs by the model's own forward pass, one sequence after the other."""
    found = []
    for prompt, [completion] in apart(bundles):
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(found)


def largest_distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Returns the largest ‖found − expected‖ / ‖expected‖ of a parameter, and its name; 0 where there are none."""
    if not expected:
        return 0.0, ""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    distances = {
        name: float((found[name] - gradient).norm() / gradient.norm().clamp(min=_SMALL_GRADIENT * whole))
        for name, gradient in expected.items()
    }
    # A NaN is larger than any number.
    name = max(distances, key=lambda name: (distances[name] != distances[name], distances[name]))
    return distances[name], name
