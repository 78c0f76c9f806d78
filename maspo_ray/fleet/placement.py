"""The placement of actors on nodes, as a pure plan.

Promise: a `Plan` places every actor that the config asks for and over-commits no node and no single GPU. Reserving the places in Ray is
`reservation`'s; this module does not import Ray, so that `maspo check` answers at once.
"""

import copy
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from maspo_ray.config import PlacementConfig, RunConfig
from maspo_ray.errors import ConfigError

Resource = Literal["gpus", "cpus"]
_DIGITS = 4
"""Ray counts resources in ten-thousandths. Rounding to as many digits lets 0.1 + 0.2 CPUs fit into 0.3."""


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A node that the plan may use, with all its resources. On a cluster `name` is Ray's node id; `cpus` is infinite if unknown."""

    name: str
    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True)
class RoleDemand:
    """A role's demand: `replicas` actors in all, or `per_node` on each GPU node; 1 in all if both are None.

    `gpus` and `cpus` are those of one actor. Below 1, `gpus` is a share of one physical GPU; from 1 on, whole GPUs of one node.
    """

    role: str
    replicas: int | None
    per_node: int | None
    gpus: float
    cpus: float

    def amount(self, resource: Resource) -> float:
        return round(getattr(self, resource), _DIGITS)

    @property
    def count(self) -> int:
        """The number of actors: in all, or on each GPU node where `per_node` is set."""
        return self.replicas or self.per_node or 1

    def knob(self, resource: Resource) -> str:
        """Returns the config key that a user can lower so that the role takes less of the resource."""
        key = resource if self.count == 1 else "replicas" if self.per_node is None else "per_node"
        return f"{self.role}.{key}"


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one actor on a node. `replica` counts from 0 within the role; a learner's is its rank."""

    role: str
    replica: int
    node: str
    gpus: float
    cpus: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A slot for every actor. `slots` are in the order of placement, and those of one role in the order of their replicas."""

    slots: tuple[Slot, ...]
    nodes: tuple[Node, ...]

    def of_role(self, role: str) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.role == role)

    def on_node(self, name: str) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.node == name)

    def table(self) -> str:
        """Returns an aligned text table: a line for each actor, then a line for each node with its used / available resources."""
        rows = [("node", "role", "replica", "gpus", "cpus")]
        totals = []
        for node in self.nodes:
            name, slots = node.name[:12], self.on_node(node.name)
            rows += [(name, s.role, str(s.replica), _number(s.gpus), _number(s.cpus)) for s in slots]
            gpus, cpus = sum(s.gpus for s in slots), sum(s.cpus for s in slots)
            used = (f"{_number(gpus)}/{_number(node.gpus)}", f"{_number(cpus)}/{_number(node.cpus)}")
            totals.append((name, "used/available", str(len(slots)), *used))
        rows += totals
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def demands(config: RunConfig) -> tuple[RoleDemand, ...]:
    """Returns the demand of each role that the run starts; the reference is one only if its KL is in the loss."""
    sections = {"learner": config.learner, "rollout": config.rollout}
    if config.kl.coef > 0:
        sections["reference"] = config.reference
    sections["reward"] = config.reward
    return tuple(
        RoleDemand(role, s.replicas or (None if s.per_node else 1), s.per_node, s.gpus, s.cpus)
        for role, s in sections.items()
    )


def config_nodes(placement: PlacementConfig) -> tuple[Node, ...]:
    """Returns the nodes that `maspo check` plans for: the config's `placement.nodes`, else this machine.

    Without `placement.cpus_per_node` a cluster's nodes have infinitely many CPUs (shown as `-`), since this machine's count says nothing
    about them.
    """
    if placement.nodes is None:
        # The affinity counts the CPUs that a container or a batch system allows this process; only Linux has it.
        local_cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return (Node("local", placement.gpus_per_node, placement.cpus_per_node or local_cpus),)
    cpus = placement.cpus_per_node or math.inf
    return tuple(Node(f"node-{i}", placement.gpus_per_node, cpus) for i in range(placement.nodes))


def plan(demands: Sequence[RoleDemand], nodes: Sequence[Node]) -> Plan:
    """Returns a place for every actor.

    `per_node` actors go first, since they have no choice of node; then the roles with GPUs; then the others. The learner's
    ranks are packed onto as few nodes as possible, in order; actors of other roles go where most is left. Where that
    finds no place, roles with larger actors are tried before those with smaller ones.

    Raises:
        ConfigError: the nodes do not hold them.
    """
    by_kind = sorted(demands, key=lambda d: (d.per_node is None, d.gpus == 0))
    larger_first = sorted(by_kind, key=lambda d: (d.per_node is None, d.gpus == 0, -d.gpus, -d.cpus))
    try:
        return Plan(_slots(by_kind, nodes), tuple(nodes))
    except ConfigError as fault:
        try:
            return Plan(_slots(larger_first, nodes), tuple(nodes))
        except ConfigError:
            raise fault from None


class _Room:
    """A node's free resources. GPUs are assigned as Ray does: a fraction to the GPU that it fits best, whole GPUs only if unused."""

    def __init__(self, node: Node) -> None:
        self.node = node
        part = round(node.gpus % 1, _DIGITS)
        self.free_gpus = [1.0] * int(node.gpus) + ([part] if part else [])
        self.free_cpus = node.cpus
        self.actors = 0

    def gpus_for(self, gpus: float) -> list[int] | None:
        """Returns the indices of the GPUs that an actor would get; None if too few are free."""
        if gpus >= 1:
            untouched = [i for i, free in enumerate(self.free_gpus) if free == 1]
            return untouched[: int(gpus)] if len(untouched) >= gpus else None
        fitting = [i for i, free in enumerate(self.free_gpus) if free >= gpus]
        return sorted(fitting, key=self.free_gpus.__getitem__)[:1] or None if gpus else []

    def lacks(self, demand: RoleDemand) -> Resource | None:
        """Returns the resource of which too little is free for an actor, None if there is room for it."""
        if self.gpus_for(demand.amount("gpus")) is None:
            return "gpus"
        return "cpus" if self.free_cpus < demand.amount("cpus") else None

    def take(self, demand: RoleDemand) -> bool:
        """Places one actor; returns whether there was room."""
        if self.lacks(demand):
            return False
        gpus = demand.amount("gpus")
        for i in self.gpus_for(gpus) or []:
            self.free_gpus[i] = round(self.free_gpus[i] - min(gpus, 1), _DIGITS)
        self.free_cpus = round(self.free_cpus - demand.amount("cpus"), _DIGITS)
        self.actors += 1
        return True

    def capacity(self, demand: RoleDemand) -> int:
        """Returns for how many of the demand's actors there is room."""
        scratch = copy.deepcopy(self)
        return sum(scratch.take(demand) for _ in range(demand.count))


def _slots(demands: Sequence[RoleDemand], nodes: Sequence[Node]) -> tuple[Slot, ...]:
    """Returns the slots of the demands, placed in the order given."""
    rooms = [_Room(node) for node in nodes]
    gpu_rooms = [room for room in rooms if room.free_gpus] or rooms
    slots: list[Slot] = []
    for demand in demands:
        if not rooms:
            raise ConfigError(f"{demand.knob('cpus')} is set; there is no node to place the actor on. Add nodes.")
        names: list[str] = []
        for scope in [rooms] if demand.per_node is None else [[room] for room in gpu_rooms]:
            chosen = _choose(demand, scope)
            if len(chosen) < demand.count:
                raise _shortage(demand, len(chosen), scope, slots, demands)
            names += [room.node.name for room in chosen]
        slots += [Slot(demand.role, i, name, demand.gpus, demand.cpus) for i, name in enumerate(names)]
    return tuple(slots)


def _choose(demand: RoleDemand, scope: Sequence[_Room]) -> list[_Room]:
    """Places a demand's actors; returns the room of each, fewer than the demand asks for where no more fit."""
    if demand.role == "learner":
        by_capacity = sorted(scope, key=lambda room: -room.capacity(demand))
        places = (room for room in by_capacity for _ in range(demand.count) if room.take(demand))
        return list(itertools.islice(places, demand.count))
    chosen: list[_Room] = []
    while len(chosen) < demand.count:
        free = [room for room in scope if room.lacks(demand) is None]
        if not free:
            break
        chosen.append(max(free, key=lambda r: (sum(r.free_gpus) if demand.gpus else 0, r.free_cpus, -r.actors)))
        chosen[-1].take(demand)
    return chosen


def _shortage(
    demand: RoleDemand, placed: int, scope: Sequence[_Room], slots: Sequence[Slot], demands: Sequence[RoleDemand]
) -> ConfigError:
    """Returns the error that says what a role needs of the resource that ran out, and what the nodes have of it."""
    resource: Resource = "gpus" if all(room.lacks(demand) == "gpus" for room in scope) else "cpus"
    unit, amount, count = resource[:-1].upper(), demand.amount(resource), demand.count
    names, total = {room.node.name for room in scope}, sum(getattr(room.node, resource) for room in scope)
    held = [slot for slot in slots if slot.node in names and getattr(slot, resource)]
    taken, holders = sum(getattr(slot, resource) for slot in held), list(dict.fromkeys(slot.role for slot in held))
    has = f"{'the cluster' if demand.per_node is None else scope[0].node.name[:12]} has {_number(total)}"
    if held:
        has += f", of which {_join(holders, 'and')} {'takes' if len(holders) == 1 else 'take'} {_number(taken)}"
    if amount * count > total - taken:
        where = "" if demand.per_node is None else " on each node"
        rule = (
            f"{count_text(count, 'actor')}{where} need{'s' * (count == 1)} {count_text(amount * count, unit)} and {has}"
        )
    else:
        of = "one GPU" if resource == "gpus" and amount < 1 else "one node"
        beside = " beside its GPUs" if resource == "cpus" and demand.gpus else ""
        rule = f"each actor needs {count_text(amount, unit)} of {of}{beside}, and only {placed} of {count} find that; {has}"
    knobs = [d.knob(resource) for d in sorted(demands, key=lambda d: d.role != demand.role) if d.amount(resource)]
    remedy = f"Lower {_join(knobs, 'or')}, or {'add' if demand.per_node is None else 'use larger'} nodes."
    return ConfigError(f"{demand.role}.{resource} is {_number(amount)}; {rule}. {remedy}")


def _number(value: float) -> str:
    return "-" if math.isinf(value) else f"{round(value, _DIGITS):.12g}"


def count_text(value: float, noun: str) -> str:
    """Returns an amount with its noun: `1 GPU`, `2 GPUs`."""
    return f"{_number(value)} {noun}{'' if value == 1 else 's'}"


def _join(names: Sequence[str], word: str) -> str:
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
