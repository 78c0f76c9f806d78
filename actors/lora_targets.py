"""Which modules of a model can have a LoRA adapter."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from actors.model_slice import slice_of


@torch.no_grad()
def linear_modules(model: PreTrainedModel) -> list[str]:
    """Returns the names of the modules, the output layer not among them, whose output is the product of their weight and their input, found in
    a forward pass of a slice.

    Not among them are routers that are linear by inheritance alone, and modules whose weight is read without them, where an adapter would
    not count.
    """
    tried = slice_of(model, torch.float32, model.device)
    if tried.config._attn_implementation != "eager":
        tried.set_attn_implementation("eager")
    linear: set[str] = set()

    def note(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if isinstance(output, torch.Tensor) and torch.allclose(
                output, torch.nn.functional.linear(inputs[0], weight, module.bias), rtol=1e-3, atol=1e-4
            ):
                linear.add(_without_numbers(name))

        return hook

    for name, module in tried.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_hook(note(name))
    ids = torch.arange(32, device=model.device) % len(tried.get_output_embeddings().weight)
    tried(input_ids=ids[None], use_cache=False)
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head and isinstance(module, torch.nn.Linear | Conv1D) and _without_numbers(name) in linear
    ]


def _without_numbers(name: str) -> str:
    """Returns a module's name that is the same in each layer, and of each expert."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def without_refused(names: Sequence[str], model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Returns the modules' names without those that peft 0.21 refuses, or takes for experts that a layer holds in one tensor.

    Its own "all-linear" names such experts too, which cannot be merged here.
    """
    refused = {leaf for leaf in {name.rpartition(".")[2] for name in names} if _refuses(model, config, leaf)}
    wanted = [name for name in names if name.rpartition(".")[2] not in refused]
    converted = replace(config, target_modules=wanted)
    convert_peft_config_for_transformers(converted, model, get_model_conversion_mapping(model))
    return [name for name in wanted if name in (converted.target_modules or ())]


def _refuses(model: PreTrainedModel, config: LoraConfig, leaf: str) -> bool:
    try:
        _check_lora_target_modules_mamba(config, model, leaf)
    except ValueError:
        return True
    return False
