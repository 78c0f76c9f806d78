"""A model's first layers in float32, to try on a few tokens what the whole is to do.

Promise: the slice has a layer of every kind that the model has, all of its other modules, and its adapters; a small model's slice is all of it.
It shares no memory with the model, and costs little beside it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Embedding, Module, ModuleList, Parameter
from transformers import PreTrainedModel

_WHOLE_PARAMETERS = 50_000_000
"""A model of at most so many is not cut: a pass of a few tokens takes it about as long as its loading's last moments."""
_ROWS = 512
"""Tokens that are left of the vocabulary, where the model is cut."""


def slice_of(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device, whole_parameters: int = _WHOLE_PARAMETERS
) -> PreTrainedModel:
    """Returns the slice, in evaluation mode.

    Args:
        dtype: float32, except where the attention's kernels have it not.
        whole_parameters: a model of at most so many parameters is not cut.
    """
    cut = sum(p.numel() for p in model.parameters()) > whole_parameters
    prefixes = {id(layers): list(layers)[: _prefix(layers)] for layers in _layer_lists(model)} if cut else {}
    # Parameters and buffers are copied first, each as it is to be, so that no whole copy ever exists; what is tied stays so.
    memo: dict[int, Any] = {}
    rows = len(model.get_output_embeddings().weight)
    for module in _kept(model, prefixes):
        is_vocabulary = module is model.get_output_embeddings() or (
            isinstance(module, Embedding) and module.num_embeddings == rows
        )
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in memo:
                memo[id(parameter)] = _copied(parameter, _ROWS if cut and is_vocabulary else None, dtype, device)
        for buffer in module.buffers(recurse=False):
            # Tables of positions and the like are in float32 whatever the dtype of the model.
            kept = dtype if buffer.dtype == model.dtype else buffer.dtype
            memo[id(buffer)] = buffer.detach().to(device, kept, copy=True)
    for address, layers in prefixes.items():
        memo[address] = ModuleList(copy.deepcopy(layers, memo))
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        if cut and isinstance(module, Embedding) and (module.padding_idx or 0) >= len(module.weight):
            module.padding_idx = None
    return copied


def _kept(module: Module, prefixes: Mapping[int, Sequence[Module]]) -> Iterator[Module]:
    """Yields a module and those in it, of the lists by whose `id` a prefix is given, the prefix alone."""
    yield module
    for child in prefixes.get(id(module), list(module.children())):
        yield from _kept(child, prefixes)


def _copied(parameter: Parameter, rows: int | None, dtype: torch.dtype, device: torch.device) -> Parameter:
    kept = parameter.detach() if rows is None else parameter.detach()[:rows]
    return Parameter(kept.to(device, dtype, copy=True), requires_grad=parameter.requires_grad)


def _layer_lists(model: PreTrainedModel) -> list[ModuleList]:
    """Returns the lists of the model's layers: as many as the config says."""
    count = model.config.get_text_config().num_hidden_layers
    return [module for module in model.modules() if isinstance(module, ModuleList) and len(module) == count]


def _prefix(layers: ModuleList) -> int:
    """Returns how many of the first layers have one of every kind, told by the names and shapes of their parameters; two at least."""
    kinds = [
        (type(layer), *((name, p.shape) for name, p in layer.named_parameters()), getattr(layer, "layer_type", None))
        for layer in layers
    ]
    return max(2, *(kinds.index(kind) + 1 for kind in kinds))
