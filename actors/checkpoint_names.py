"""A model's weights as its checkpoint has them, computed a piece at a time from those in memory.

Promise: all pieces together are what `save_pretrained` writes, name by name and value by value. transformers 5 changes weights as it loads
them, the experts of a layer become one tensor, for example, and changes them back as it saves; engines read the checkpoint's names. The way
back is transformers' own (`revert_weight_conversion`), which takes the whole model at once; here each piece is converted by itself, so that
no more than a piece is copied, or gathered, at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

Shape = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """Weights in memory that make weights of the checkpoint, and need no others for it.

    Attributes:
        sources: their names in memory.
        shapes: shape and dtype of each weight of the checkpoint, by its name.
        convert: returns the checkpoint's weights, given those in memory in the order of `sources`; where nothing is to be computed they
            are views of these.
    """

    sources: tuple[str, ...]
    shapes: Mapping[str, Shape]
    convert: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]


def pieces_of(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> list[Piece]:
    """Returns the pieces of a model, in the order of their first weights in memory.

    Args:
        shapes: shape and dtype of each weight in memory, by its name.
    """
    backwards = [transform.reverse_transform() for transform in reversed(_conversions_of(model))]
    renamings = [transform for transform in backwards if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in backwards if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    members: dict[str, list[tuple[str, str | None]]] = {}
    # transformers' order: some renamings apply only after others were seen to.
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
        members.setdefault(renamed, []).append((name, pattern))
    pieces = []
    for renamed, parts in members.items():
        sources, patterns = tuple(name for name, _ in parts), [pattern for _, pattern in parts]
        convert = _conversion(model, renamed, sources, patterns, by_pattern)
        results = convert([torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in map(shapes.get, sources)])  # type: ignore[misc]
        found = {name: (tuple(weight.shape), weight.dtype) for name, weight in results.items()}
        pieces.append(Piece(sources, found, convert))
    place = {name: i for i, name in enumerate(shapes)}
    return sorted(pieces, key=lambda piece: min(place[name] for name in piece.sources))


def _conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """Returns the conversions by which the model was loaded; those of its architecture where it was not loaded from a checkpoint."""
    loaded: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    if loaded is not None:
        return loaded
    known: list[WeightTransform] = get_model_conversion_mapping(model, add_legacy=False)
    # Whether the checkpoint has the prefix is known only from one.
    return [transform for transform in known if not isinstance(transform, PrefixChange)]


def _conversion(
    model: PreTrainedModel,
    renamed: str,
    sources: tuple[str, ...],
    patterns: Sequence[str | None],
    by_pattern: Mapping[str, WeightConverter],
) -> Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]:
    first = patterns[0]
    if first is None:
        return lambda weights: {renamed: weights[0]}
    # One of the piece's own: it collects what it converts.
    converter = deepcopy(by_pattern[first])

    def convert(weights: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, pattern, weight in zip(sources, patterns, weights, strict=True):
            converter.add_tensor(renamed, name, pattern or name, weight)  # type: ignore[arg-type]
        found: dict[str, Any] = converter.convert(renamed, model=model, config=model.config)
        return {name: weight[0] if isinstance(weight, list) else weight for name, weight in found.items()}

    return convert
