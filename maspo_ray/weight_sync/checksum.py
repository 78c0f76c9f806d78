"""Did an update change an engine's weights, and do replicas hold the same?

Promise: a checksum differs where the values that it looks at differ, and is the same for the same weights laid out alike. It looks at up to
4,096 values of each tensor, so that it costs next to nothing: an update that never arrived leaves all of them as they were. vLLM's own
`compute_weight_checksums` takes SHA-256 of every byte on the host, which for a few billion parameters takes longer than the transfer.
"""

from hashlib import blake2b

import torch

_VALUES_PER_TENSOR = 4096


@torch.no_grad()
def weight_checksum(model: torch.nn.Module) -> str:
    """Returns the checksum of a module's parameters, in hexadecimal."""
    digest = blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        step = max(1, len(values) // _VALUES_PER_TENSOR)
        sample = values[::step].contiguous().cpu()
        digest.update(name.encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ChecksumWorkerExtension:
    """Named as vLLM's `worker_extension_cls`: its methods become the worker's."""

    def weight_checksum(self) -> str:
        return weight_checksum(self.model_runner.get_model())  # type: ignore[attr-defined]
