"""The section that says what the nodes have, and how a run finds them.

Promise: as in `sections`, it is consistent with itself. Imports neither torch, ray nor vllm.
"""

from pydantic import Field

from maspo_ray.config.section import Section


class PlacementConfig(Section):
    nodes: int | None = Field(None, ge=1)
    """Nodes that `maspo check` plans for; by default this machine. A run plans for the cluster that it finds."""
    gpus_per_node: float = Field(0.0, ge=0)
    """Of the nodes that `maspo check` plans for."""
    cpus_per_node: float | None = Field(None, gt=0)
    """Of the nodes that `maspo check` plans for; by default this machine's, and of `nodes` as many as are asked for."""
    gpu_memory_gib: float | None = Field(None, gt=0)
    """Memory of one GPU, which `maspo check` holds its estimate against; by default what this machine's say, where `nodes` is left out."""
    memory_gib_per_node: float | None = Field(None, gt=0)
    """Memory of a node, likewise."""
    address: str | None = None
    """Ray address; by default RAY_ADDRESS (a submitted job has it), else a Ray of the run's own."""
    wait_s: float = Field(10.0, gt=0)
    """How long to wait for the cluster to register what the plan needs."""
    object_store_gib: float = Field(0.5, gt=0)
    """Object store of a Ray of the run's own."""
