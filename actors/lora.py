"""LoRA by peft: adapters beside frozen weights, and the merged weights that engines and checkpoints get.

Promise: merged weights have the names and shapes of the model without adapters, so that their receivers need not know of LoRA; merging
computes copies and leaves the model as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch.nn import Parameter
from transformers import PreTrainedModel

from actors.lora_targets import linear_modules, without_refused
from maspo_ray.config import LoraConfig
from maspo_ray.errors import ConfigError

_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Weight:
    """One of a model's weights, merged with its adapter where it has one.

    Attributes:
        parts: the parameters that the weight is computed from, whose first has its shape and dtype; none for a buffer.
        value: returns the weight, detached; under ZeRO-3 the parts must be gathered.
    """

    parts: tuple[Parameter, ...]
    value: Callable[[], torch.Tensor]


def add_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freezes the model's parameters and adds adapters to the modules that `lora.targets` names, in place.

    Raises:
        ConfigError: a target names no module, or one that is no linear module of the layers and cannot be merged here.
    """
    where = f"learner.lora.targets is {list(lora.targets)}"
    remedy = "Name linear modules of the layers, such as q_proj"
    everything = lora.targets == ("all-linear",)
    config = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        base_model_name_or_path=model.name_or_path,
    )
    linear = linear_modules(model)
    if everything:
        config = replace(config, target_modules=without_refused(linear, model, config))
    try:
        # Leaves only the adapters trainable.
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ConfigError(f"{where}; {error} {remedy}.") from None
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    missed = (
        [] if everything else [t for t in lora.targets if not any(f".{name}".endswith(f".{t}") for name in adapted)]
    )
    if missed:
        raise ConfigError(f"{where}; no module is called {' or '.join(missed)}. {remedy}.")
    unfit = [name for name in adapted if name not in linear or not isinstance(model.get_submodule(name), Linear)]
    if unfit:
        raise ConfigError(
            f"{where}; {', '.join(unfit[:3])} cannot have an adapter that is merged for the engines. {remedy}."
        )


def weights_of(model: PreTrainedModel) -> dict[str, Weight]:
    """Returns the model's weights by their names in memory, persistent buffers included, adapters merged in; tied ones once, as the
    embedding."""
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    found: dict[str, Weight] = {}
    own = set(model._keys_to_ignore_on_save or ())
    seen: set[int] = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        if id(parameter) in seen or name in own:
            continue
        seen.add(id(parameter))
        # peft wraps an adapted module and keeps the original as its `base_layer`.
        own_name = name.replace(".base_layer.", ".")
        place, _, leaf = own_name.rpartition(".")
        if any(place.startswith(f"{other}.") for other in adapted):
            # A parameter of an adapter, which its weight's merged value holds.
            continue
        if place in adapted and leaf == "weight":
            found[own_name] = _merged(parameter, adapted[place])
        else:
            found[own_name] = Weight((parameter,) if isinstance(parameter, Parameter) else (), parameter.detach)
    return found


def adapters_of(model: PreTrainedModel) -> dict[str, Parameter]:
    """Returns the adapters' own parameters by their names in the model; empty where the model has no adapters."""
    paths = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and any(name.startswith(f"{path}.") for path in paths)
    }


def _merged(base: Parameter, layer: Any) -> Weight:
    """Returns the merged weight of an adapted layer.

    Args:
        layer: peft's `LoraLayer` around the base weight.
    """

    def value() -> torch.Tensor:
        merged: torch.Tensor = base.detach() + layer.get_delta_weight(_ADAPTER).detach()
        return merged

    return Weight((base, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight), value)


def save_adapter(model: PreTrainedModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes the adapter's config and weights, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        state: the adapters' parameters by their names in the model, gathered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[_ADAPTER].save_pretrained(folder)
    # No embedding has an adapter; "auto" would ask the hub about it.
    named = get_peft_model_state_dict(model, dict(state), adapter_name=_ADAPTER, save_embedding_layers=False)
    # The names that the weights have in a PeftModel around the model.
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in named.items()}, folder / "adapter_model.safetensors"
    )
