"""Reserves a plan's slots in a Ray cluster.

Promise: a `Reservation` holds every slot of its plan on the planned node, and a reservation that failed holds nothing; where a cluster does
not register enough nodes in time, the error says what had registered and what is needed. Starting the actors is `fleet`'s.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from maspo_ray.errors import ConfigError
from maspo_ray.fleet.placement import Node, Plan, RoleDemand, Slot, count_text, plan
from maspo_ray.threads import call_within

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_LOG_EVERY_S = 5.0
_RELEASE_S = 3.0


def cluster_nodes() -> tuple[Node, ...]:
    """Returns the living nodes of the Ray cluster with their total resources: the head first, then by address and node id."""

    alive = [info for info in ray.nodes() if info["Alive"]]
    alive.sort(key=lambda n: ("node:__internal_head__" not in n["Resources"], n["NodeManagerAddress"], n["NodeID"]))
    return tuple(Node(n["NodeID"], n["Resources"].get("GPU", 0.0), n["Resources"].get("CPU", 0.0)) for n in alive)


def wait_for_cluster(demands: Sequence[RoleDemand], wait_s: float) -> Plan:
    """Returns the first plan that fits the nodes registered by then.

    Raises:
        ConfigError: no plan fits after `wait_s`; after a wait, it says what had registered and what is needed.
    """
    start, logged_at = time.monotonic(), -math.inf
    while True:
        waited_s = time.monotonic() - start
        nodes = cluster_nodes()
        try:
            return plan(demands, nodes)
        except ConfigError as error:
            fault = error
        if wait_s == 0:
            # This is a Ray of the run's own, which no further node joins.
            raise fault
        against = f"registered: {count_text(len(nodes), 'node')}, {_totals(nodes)}; needed: {_needed(demands)}"
        if waited_s >= wait_s:
            raise ConfigError(
                f"{fault}\nplacement.wait_s is {wait_s:g}; by then {against}. Raise it where nodes are still joining."
            ) from None
        if waited_s - logged_at >= _LOG_EVERY_S:
            logger.info("waiting for the cluster, %.0f of %g s: %s", waited_s, wait_s, against)
            logged_at = waited_s
        time.sleep(min(_POLL_S, wait_s - waited_s))


def _totals(parts: Sequence[Node | Slot]) -> str:
    cpus, gpus = sum(part.cpus for part in parts), sum(part.gpus for part in parts)
    return f"{count_text(cpus, 'CPU')}, {count_text(gpus, 'GPU')}"


def _needed(demands: Sequence[RoleDemand]) -> str:
    wanted = {d: Node(d.role, d.gpus * d.count, d.cpus * d.count) for d in demands}
    per_node = [node for d, node in wanted.items() if d.per_node]
    in_all = _totals([node for d, node in wanted.items() if not d.per_node])
    return f"{in_all} and {_totals(per_node)} on each GPU node" if per_node else in_all


@dataclass(slots=True)
class Reservation:
    """A plan's reserved slots: a placement group for each node in use, and each slot's bundle in its group."""

    groups: list[PlacementGroup] = field(default_factory=list)
    bundles: dict[Slot, tuple[PlacementGroup, int]] = field(default_factory=dict)

    def strategy(self, slot: Slot) -> PlacementGroupSchedulingStrategy:
        """Returns the scheduling strategy that starts an actor in a slot; the same one serves the actor that replaces it."""

        group, index = self.bundles[slot]
        return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)

    def release(self) -> None:
        """Frees all slots, which ends the actors in them; a second call does nothing. Where Ray's head is gone there is nothing to free."""

        groups, self.groups = self.groups, []
        with suppress(TimeoutError):
            call_within(_RELEASE_S, lambda: [remove_placement_group(group) for group in groups])


def reserve(plan: Plan, wait_s: float) -> Reservation:
    """Returns the plan's slots, reserved for this job on the planned nodes.

    Raises:
        ConfigError: a slot was not free within `wait_s`, since another job holds its node's resources or the node is gone.
    """

    reservation, waiting = Reservation(), {}
    try:
        for node in plan.nodes:
            slots = plan.on_node(node.name)
            if not slots:
                continue
            # By the node's id, since the nodes of a simulated cluster share one address.
            selector = [{"ray.io/node-id": node.name}] * len(slots)
            # Ray assigns GPUs to bundles in their order, so that bundles in the plan's order get the GPUs that the plan counted on.
            group = placement_group([_bundle(slot) for slot in slots], "STRICT_PACK", bundle_label_selector=selector)
            reservation.groups.append(group)
            reservation.bundles.update({slot: (group, index) for index, slot in enumerate(slots)})
            waiting[group.ready()] = slots
        for ref in ray.wait(list(waiting), num_returns=len(waiting), timeout=wait_s)[0]:
            del waiting[ref]
        if waiting:
            missing = [slot for slots in waiting.values() for slot in slots]
            raise ConfigError(
                f"placement.wait_s is {wait_s:g}; {len(missing)} of {count_text(len(plan.slots), 'actor')} found no place in "
                f"that time: {'; '.join(map(_describe, waiting.values()))}. Free what other jobs hold there, or raise it."
            )
    except BaseException:
        reservation.release()
        raise
    return reservation


def _bundle(slot: Slot) -> dict[str, float]:
    wanted = {"GPU": slot.gpus, "CPU": slot.cpus}
    # Ray refuses an empty bundle; an actor that asks for nothing reserves one byte of memory.
    return {name: amount for name, amount in wanted.items() if amount} or {"memory": 1}


def _describe(slots: Sequence[Slot]) -> str:
    return f"{', '.join(f'{s.role} {s.replica}' for s in slots)} on node {slots[0].node} ({_totals(slots)})"
