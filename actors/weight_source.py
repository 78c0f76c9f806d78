"""The learner's weights as the `WeightSource` that vLLM's trainer side sends.

Promise: each weight once, under its Hugging Face name, adapters merged. A file of its own, since it imports vLLM, which takes seconds and
which a learner needs only to publish.
"""

from collections.abc import Iterator

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.deepspeed_engine import EngineWeights


class EngineWeightSource(WeightSource):
    """Streams a DeepSpeed engine's weights, under ZeRO-3 gathered one layer at a time. Iterating is a collective among the ranks."""

    def __init__(self, weights: EngineWeights) -> None:
        self._weights = weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, dtype, shape) for name, (shape, dtype) in self._weights.shapes.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names in self.groups():
            yield from self._weights.read(names)
