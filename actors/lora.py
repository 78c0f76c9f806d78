"""LoRA through peft: adapters beside frozen weights, and the weights that both make together.

Promise: a model's weights have the names and shapes that they have without adapters, so that whoever receives them need not know;
merging leaves the model as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch.nn import Parameter
from transformers import PreTrainedModel

from maspo_ray.config import LoraConfig
from maspo_ray.errors import ConfigError

_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Weight:
    """One of a model's weights.

    Attributes:
        parts: the parameters that it is made of; it has the shape and the dtype of the first.
        value: returns it, detached; the parts must be whole.
    """

    parts: tuple[Parameter, ...]
    value: Callable[[], torch.Tensor]


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freezes the model's parameters and puts adapters beside the weights that the config names, in place.

    Raises:
        ConfigError: the targets name nothing that can have an adapter, or the embeddings, whose weights are read as they are.
    """
    targets = "all-linear" if "all-linear" in lora.targets else list(lora.targets)
    config = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        base_model_name_or_path=model.name_or_path,
    )
    try:
        # Marks the adapters alone as trainable.
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ConfigError(f"learner.lora.targets is {targets}; {error}") from None
    if any(isinstance(m, LoraLayer) for m in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise ConfigError(
            f"learner.lora.targets is {targets}; the embeddings cannot have adapters. Name modules of the layers alone."
        )


def weights_of(model: PreTrainedModel) -> dict[str, Weight]:
    """Returns the model's weights under their Hugging Face names, adapters merged in; tied ones once, as the embedding."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        layer = adapted.get(path.removesuffix(".base_layer"))
        if layer is None:
            if not any(path.startswith(f"{other}.") for other in adapted):
                found[name] = Weight((parameter,), parameter.detach)
        elif leaf == "weight":
            found[f"{path.removesuffix('.base_layer')}.weight"] = _merged(parameter, layer)
        else:
            found[f"{path.removesuffix('.base_layer')}.{leaf}"] = Weight((parameter,), parameter.detach)
    return found


def _merged(base: Parameter, layer: Any) -> Weight:
    """Returns the weight of an adapted layer, peft's `LoraLayer`."""

    def value() -> torch.Tensor:
        merged: torch.Tensor = base.detach() + layer.get_delta_weight(_ADAPTER).detach()
        return merged

    return Weight((base, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight), value)


def save_adapter(model: PreTrainedModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes what `peft.PeftModel.from_pretrained` reads.

    Args:
        state: the trainable parameters by their names in the model, whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_ADAPTER].save_pretrained(folder)
    named = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=_ADAPTER)
    # As a PeftModel around the model names them.
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in named.items()}, folder / "adapter_model.safetensors"
    )
