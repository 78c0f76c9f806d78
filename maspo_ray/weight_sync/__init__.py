"""Versioned publishing of the learner's weights to the rollout engines, on vLLM's own weight-transfer API."""

import socket
from typing import Literal

Backend = Literal["nccl", "gloo"]


def backend_for(gpus: float) -> Backend:
    """Returns the transfer backend of actors with so many GPUs each; the only place that chooses by device."""
    return "nccl" if gpus > 0 else "gloo"


def free_port() -> int:
    """Returns a TCP port of this node that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
