"""The routers of a mixture of experts: frozen where the config says so, and the load-balancing loss that the model trains them with.

Promise: both are the model's own, found by what it declares to transformers (`router_logits`), not from a list of architectures; a model that
does not declare enough is refused by name.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from maspo_ray.errors import ConfigError

_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Of transformers' `load_balancing_loss_func`, which each family has its own copy of."""


def routers_of(model: PreTrainedModel) -> dict[str, tuple[torch.nn.Module, int]]:
    """Returns the modules that choose experts, by name, and where in their output the logits of the choice are; none of a dense model."""
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    # An adapted module speaks for those inside it.
    inside = {part for layer in adapted for part in layer.modules() if part is not layer}
    found = {}
    for prefix, part in model.named_modules():
        for recorder in _recorders_of(part):
            place = f".{recorder.layer_name}." if recorder.layer_name else "."
            for name, module in part.named_modules(prefix=prefix):
                plain = module.get_base_layer() if isinstance(module, LoraLayer) else module
                if isinstance(plain, recorder.target_class) and place in f".{name}." and module not in inside:
                    found[name] = (module, recorder.index)
    return found


def _recorders_of(part: torch.nn.Module) -> list[OutputRecorder]:
    """Returns what a model, or a model in it, declares of its routers."""
    declared = (part._can_record_outputs or {}) if isinstance(part, PreTrainedModel) else {}
    recorders = declared.get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    # transformers' own reading of a class alone.
    return [each if isinstance(each, OutputRecorder) else OutputRecorder(each, index=1) for each in recorders]


def freeze_routers(model: PreTrainedModel) -> None:
    """Makes the routers' weights not trainable.

    Raises:
        ConfigError: the model has no router, or none that is apart from its experts.
    """
    routers = [module for module, _ in routers_of(model).values()]
    kind = type(model).__name__
    if not routers:
        raise ConfigError(f"learner.router is frozen; {kind} has no router that chooses experts. Remove it.")
    for module in routers:
        # Experts are matrices side by side, or rows to look up.
        if any(isinstance(part, torch.nn.Embedding) for part in module.modules()) or any(
            weight.ndim > 2 for weight in module.parameters()
        ):
            raise ConfigError(
                f"learner.router is frozen; the routers of {kind} are one module with its experts. Set it to trained."
            )
        module.requires_grad_(False)


def balance_coefficient(model: PreTrainedModel, setting: float | None) -> float:
    """Returns what the load-balancing loss is multiplied by.

    Args:
        setting: `learner.router_aux_loss_coef`; None for the model's own coefficient where its config has `output_router_logits`, which is
            when transformers adds the loss to that of labels.
    """
    if setting is not None:
        return setting
    text = model.config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    return float(getattr(model, "router_aux_loss_coef", 0.0))


class LoadBalance:
    """The model's load-balancing loss of the forward passes that it records.

    Args:
        coefficient: what the loss is multiplied by, above 0.

    Raises:
        ConfigError: the model has no routers, or no such loss.
    """

    def __init__(self, model: PreTrainedModel, coefficient: float) -> None:
        self.coefficient = coefficient
        self._model: Any = model
        self._logits: list[torch.Tensor] | None = None
        routers = routers_of(model)
        self._loss = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
        if not routers or self._loss is None or list(inspect.signature(self._loss).parameters) != _ARGUMENTS:
            raise ConfigError(
                f"learner.router_aux_loss_coef is {coefficient:g}; {type(model).__name__} has no load-balancing loss that is known "
                "here. Set it to 0."
            )
        for module, index in routers.values():
            module.register_forward_hook(lambda _, __, output, index=index: self._note(output, index))

    def _note(self, output: Any, index: int) -> None:
        if self._logits is not None:
            logits = output[index] if isinstance(output, tuple) else output
            self._logits.append(logits.flatten(0, -2))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Takes up what the routers say inside; outside, as when a backward pass computes a layer again, they are not listened to."""
        self._logits = []
        try:
            yield
        finally:
            self._kept, self._logits = tuple(self._logits), None

    def loss(self) -> torch.Tensor:
        """Returns the loss of what was recorded last, a scalar: over all tokens that went through the model, prompts included, a shared
        prompt once."""
        model = self._model
        found: torch.Tensor = self._loss(self._kept, model.num_experts, model.num_experts_per_tok, None)  # type: ignore[misc]
        return found
