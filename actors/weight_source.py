"""The learner's weights as the `WeightSource` that vLLM's trainer side sends.

Promise: each weight once, under its checkpoint's name, adapters merged. A file of its own, since it imports vLLM, which takes seconds and
which a learner needs only to publish.
"""

from collections.abc import Iterator

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups

from actors.deepspeed_engine import EngineWeights


class EngineWeightSource(WeightSource):
    """Streams a DeepSpeed engine's weights a layer at a time, gathered under ZeRO-3. Iterating is a collective among the ranks."""

    def __init__(self, weights: EngineWeights) -> None:
        self._weights = weights
        pieces = {piece.sources[0]: piece for piece in weights.pieces}
        self._layers = [[pieces[name] for name in names] for names in layerwise_groups(list(pieces))]

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, dtype, shape)
            for pieces in self._layers
            for piece in pieces
            for name, (shape, dtype) in piece.shapes.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for pieces in self._layers:
            yield from self._weights.read(pieces)
