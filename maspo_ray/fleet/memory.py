"""What the actors of a plan take of each node's and each GPU's memory, by estimate, as a table and as warnings.

Promise: starts nothing and reads no weight. A model that is not on this machine is not estimated, which is said.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from maspo_ray.actor_memory import GIB, ActorMemory, Bytes, Part, actor_memory, element_bytes
from maspo_ray.config import RunConfig
from maspo_ray.fleet.placement import Plan, Slot
from maspo_ray.model_shape import ModelShape, model_folder, model_shape, read_config_json

_log = logging.getLogger(__name__)

_REMEDIES: dict[Part, str] = {
    "weights": "Take more ranks under learner.zero_stage 3, engines with more rollout.gpus, fewer actors of a node, or a smaller model",
    "gradients": "Set learner.zero_stage to 2 or 3 and take more ranks, or train adapters (learner.lora)",
    "optimizer": "Raise learner.zero_stage and take more ranks, train adapters (learner.lora), or offload the optimizer (docs/gpu.md)",
    "activations": "Lower learner.max_tokens_per_micro_batch, or set learner.gradient_checkpointing",
    "log-probs": "Take a model with a smaller vocabulary, or more ranks under learner.zero_stage 3",
    "KV cache": "Lower rollout.kv_cache_gib, of an engine on a GPU rollout.engine's gpu_memory_utilization, or rollout.max_model_tokens",
    "buckets": "Lower learner.deepspeed's zero_optimization.reduce_bucket_size, or gpu_memory_utilization",
    "object store": "Lower placement.object_store_gib",
    "process": "Take fewer actors, or larger nodes",
}


@dataclass(frozen=True, slots=True)
class EngineCache:
    """How many tokens' keys and values an engine holds, beside the longest sequence, in tokens, and how many it may have at once."""

    tokens: int
    longest: int
    places: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by role, by node and by GPU.

    Attributes:
        cache: None where an engine is on GPUs of an unknown size.
        actors: of each role, what one of its actors takes.
        nodes: what all actors of a node take of it, by the node's name; the driver and a Ray's own object store are on the first.
        gpus: what the actors of a GPU take of it, by node and the GPU's number.
        node_bytes: what a node has, infinite where that is not known; gpu_bytes, what a GPU has.
    """

    shape: ModelShape
    cache: EngineCache | None
    actors: Mapping[str, ActorMemory]
    nodes: Mapping[str, Bytes]
    gpus: Mapping[tuple[str, int], Bytes]
    node_bytes: float
    gpu_bytes: float

    def table(self) -> str:
        """Returns an aligned text table: what an actor of each role takes, then what the fullest node and GPU have to hold."""
        parts = get_args(Part)
        rows = [("GiB of an actor", "where", *parts, "sum")]
        for role, memory in self.actors.items():
            rows += [
                (role, where, *(_gib(taken[p]) if p in taken else "" for p in parts), _gib(sum(taken.values())))
                for where, taken in (("GPU", memory.gpu), ("node", memory.node))
                if taken
            ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        how = "counted in its files" if self.shape.counted else "derived from its config.json"
        lines = [f"memory, estimated for a model of {self.shape.num_parameters:,} parameters ({how}); docs/memory.md"]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if self.cache is None:
            lines.append("KV cache of an engine: what is left of its GPUs; placement.gpu_memory_gib is not set")
        else:
            lines.append(
                f"KV cache of an engine: {self.cache.tokens:,} tokens, {self.cache.tokens // self.cache.longest:,} sequences of the longest, "
                f"of {self.cache.places:,} at once"
            )
        for what, name, taken, there in self._fullest():
            lines.append(f"fullest {what}: {name}, {_gib(sum(taken.values()))} of {_gib(there)} GiB")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """Returns a line for the fullest node, and for the fullest GPU, that does not hold what it has to."""
        lines = []
        for _, name, taken, there in self._fullest():
            if sum(taken.values()) > there:
                part = max(taken, key=lambda p: taken[p])
                lines.append(
                    f"{name} has {_gib(there)} GiB of memory; its actors take about {_gib(sum(taken.values()))}, of which {part} "
                    f"{_gib(taken[part])}. {_REMEDIES[part]}."
                )
        return lines

    def _fullest(self) -> Iterator[tuple[str, str, Bytes, float]]:
        nodes = {f"node {name[:12]}": taken for name, taken in self.nodes.items()}
        gpus = {f"GPU {number} of node {node[:12]}": taken for (node, number), taken in self.gpus.items()}
        for what, found, there in (("node", nodes, self.node_bytes), ("GPU", gpus, self.gpu_bytes)):
            if found:
                name = max(found, key=lambda n: sum(found[n].values()))
                yield what, name, found[name], there


def estimate_memory(config: RunConfig, plan: Plan) -> MemoryEstimate | None:
    """Returns what the plan's actors take; None where the model is not on this machine, or its config.json does not say its sizes."""
    folder = model_folder(config.model.path)
    if folder is None or not (folder / "config.json").is_file():
        return None
    shape = model_shape(folder, read_config_json(folder, f"model.path is {config.model.path}"))
    if shape is None:
        return None
    ranks = len(plan.of_role("learner"))
    roles = dict.fromkeys(slot.role for slot in plan.slots)
    actors = {role: actor_memory(role, config, shape, ranks) for role in roles}
    placement = config.placement
    own_ray = placement.nodes is None and not (placement.address or os.environ.get("RAY_ADDRESS"))
    driver = actor_memory("driver", config, shape, ranks).node
    if own_ray:
        # In shared memory, which counts as the node's.
        driver["object store"] = placement.object_store_gib * GIB
    actors["driver"] = ActorMemory(node=driver)
    nodes: dict[str, Bytes] = {node.name: {} for node in plan.nodes}
    gpus: dict[tuple[str, int], Bytes] = {}
    for name in nodes:
        for slot, numbers in _numbered(plan.on_node(name)):
            _add(nodes[name], actors[slot.role].node)
            for number in numbers:
                _add(gpus.setdefault((name, number), {}), actors[slot.role].gpu, 1 / len(numbers))
    _add(nodes[plan.nodes[0].name], actors["driver"].node)
    there = placement.memory_gib_per_node or (local_memory_gib() if own_ray else math.inf)
    cache = _engine_cache(config, shape, actors["rollout"])
    return MemoryEstimate(shape, cache, actors, nodes, gpus, there * GIB, (placement.gpu_memory_gib or math.inf) * GIB)


def _engine_cache(config: RunConfig, shape: ModelShape, rollout: ActorMemory) -> EngineCache | None:
    if rollout.gpu and config.placement.gpu_memory_gib is None:
        return None
    tokens = (rollout.gpu or rollout.node)["KV cache"] / max(1, shape.kv_bytes_per_token(element_bytes(config)))
    return EngineCache(int(tokens), config.max_model_tokens, config.rollout.max_concurrent_requests)


def say_what_they_take(config: RunConfig, plan: Plan) -> None:
    """Prints the estimate of a plan, and warns of what does not fit; says so where there is none."""
    estimate = estimate_memory(config, plan)
    if estimate is None:
        print(
            f"memory: not estimated; model.path is {config.model.path}, of which no config.json with a transformer's sizes is on this machine."
        )
        return
    print(estimate.table())
    warn_of_what_does_not_fit(estimate)


def warn_of_what_does_not_fit(estimate: MemoryEstimate | None) -> None:
    for line in estimate.warnings() if estimate is not None else []:
        _log.warning("%s", line)


def local_memory_gib() -> float:
    """Returns the memory of this machine, or of the container that this process is in, where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()) / GIB)
    except (OSError, ValueError):
        return total


def _numbered(slots: Sequence[Slot]) -> Iterator[tuple[Slot, range]]:
    """Yields each slot of a node with the numbers of its GPUs: whole ones first, then fractions, each where it fits first."""
    first = 0
    for slot in slots:
        if slot.gpus >= 1 or slot.gpus == 0:
            yield slot, range(first, first + int(slot.gpus))
            first += int(slot.gpus)
    shares: list[float] = []
    for slot in slots:
        if 0 < slot.gpus < 1:
            fitting = [i for i, taken in enumerate(shares) if round(taken + slot.gpus, 4) <= 1]
            number = fitting[0] if fitting else len(shares)
            shares[number:] = shares[number:] or [0.0]
            shares[number] += slot.gpus
            yield slot, range(first + number, first + number + 1)


def _add(total: Bytes, taken: Bytes, share: float = 1.0) -> None:
    for part, amount in taken.items():
        total[part] = total.get(part, 0.0) + amount * share


def _gib(amount: float) -> str:
    return "?" if math.isinf(amount) else f"{amount / GIB:.2f}"
