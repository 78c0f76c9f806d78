"""Did an update change an engine's weights, and do replicas hold the same?

Promise: a checksum differs where the values that it looks at differ, and is the same for the same weights laid out alike. It looks at up to
4,096 values of each tensor, so that it costs next to nothing: an update that never arrived leaves all of them as they were. vLLM's own
`compute_weight_checksums` takes SHA-256 of every byte on the host, which for a few billion parameters takes longer than the transfer; and
on a CPU (vLLM 0.32) it sees no linear layer, whose weights are packed and their parameters emptied.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

import torch

_VALUES_PER_TENSOR = 4096


class WeightDigest:
    """Takes up named weights, one after the other."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=16)

    @torch.no_grad()
    def add(self, name: str, weight: torch.Tensor) -> None:
        values = weight.detach().flatten()
        sample = values[:: max(1, -(-len(values) // _VALUES_PER_TENSOR))].contiguous().cpu()
        self._digest.update(name.encode())
        self._digest.update(sample.view(torch.uint8).numpy().tobytes())

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights as they come, each once it was taken up."""
        for name, weight in weights:
            self.add(name, weight)
            yield name, weight

    def hex(self) -> str:
        return self._digest.hexdigest()


def weight_checksum(model: torch.nn.Module) -> str:
    """Returns the checksum of a module's parameters, in hexadecimal."""
    digest = WeightDigest()
    for name, parameter in model.named_parameters():
        digest.add(name, parameter)
    return digest.hex()


class ChecksumWorkerExtension:
    """Named as vLLM's `worker_extension_cls`: its methods become the worker's."""

    def weight_checksum(self) -> str:
        return weight_checksum(self.model_runner.get_model())  # type: ignore[attr-defined]
