"""The plan on a cluster: actors land where it says, what does not fit is refused in time and nothing stays reserved."""

import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from maspo_ray.errors import ConfigError
from maspo_ray.fleet.placement import Node, Plan, RoleDemand, Slot, plan
from maspo_ray.fleet.reservation import Reservation, cluster_nodes, reserve, wait_for_cluster

pytestmark = pytest.mark.ray

# Workers cannot import a test module by its name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

OBJECT_STORE_BYTES = 78643200  # the least that Ray takes


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs and two nodes that say they have 8 each; the made-up GPUs are only ever counted."""
    # Unix sockets under it have paths of at most 107 characters.
    folder = tempfile.mkdtemp(prefix="maspo", dir="/tmp")
    # Ray writes the address of a simulated cluster into its default folder, where another session would find it.
    (Path(folder) / "ray").mkdir()
    simulated = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        try:
            simulated = Cluster()
            simulated.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False)
            for _ in range(2):
                simulated.add_node(num_cpus=4, num_gpus=8, object_store_memory=OBJECT_STORE_BYTES)
            ray.init(address=simulated.address, log_to_driver=False)
            yield simulated
        finally:
            ray.shutdown()
            if simulated is not None:
                simulated.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


class Placeholder:
    """Stands in its slot and says where that is."""

    def where(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [int(index) for index in ray.get_gpu_ids()]


def start(slot: Slot, reservation: Reservation) -> Any:
    options = {"num_gpus": slot.gpus, "num_cpus": slot.cpus, "scheduling_strategy": reservation.strategy(slot)}
    return ray.remote(Placeholder).options(**options).remote()


def where(made: Plan, reservation: Reservation) -> dict[Slot, tuple[str, list[int]]]:
    """Returns the node and the GPUs of an actor started in each slot."""
    actors = [start(slot, reservation) for slot in made.slots]
    return dict(zip(made.slots, ray.get([actor.where.remote() for actor in actors], timeout=120), strict=True))


def eventually(holds: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.1)
    return holds()


def all_is_free() -> bool:
    free, total = ray.available_resources(), ray.cluster_resources()
    return all(free.get(name) == total[name] for name in ("CPU", "GPU"))


def per_node(role: str, count: int, gpus: float = 1, cpus: float = 0.25) -> RoleDemand:
    return RoleDemand(role, None, count, gpus, cpus)


def replicas(role: str, count: int, gpus: float = 1, cpus: float = 0.25) -> RoleDemand:
    return RoleDemand(role, count, None, gpus, cpus)


def test_cluster_nodes_lists_the_head_first_with_totals(cluster: Cluster) -> None:
    head, *others = cluster_nodes()

    assert (head.gpus, head.cpus) == (0, 1)
    assert others == sorted(Node(node.node_id, 8, 4) for node in cluster.worker_nodes)


def test_reserve_per_node_plan_puts_each_actor_on_its_node_with_its_own_gpu(cluster: Cluster) -> None:
    asked = [per_node("learner", 1), per_node("rollout", 2), replicas("reward", 2, gpus=0), replicas("judge", 1, 0, 0)]
    made = wait_for_cluster(asked, wait_s=10)
    reservation = reserve(made, wait_s=20)
    try:
        found = where(made, reservation)
    finally:
        reservation.release()

    assert {slot: node for slot, (node, _) in found.items()} == {slot: slot.node for slot in made.slots}
    assert len(made.of_role("rollout")) == 4
    gpus = [(node, gpu) for node, indices in found.values() for gpu in indices]
    assert len(set(gpus)) == len(gpus) == 6
    assert eventually(all_is_free)


def test_reserve_while_others_hold_slots_lands_on_the_planned_node(cluster: Cluster) -> None:
    first, last = cluster_nodes()[1:]
    held: list[Reservation] = []
    landed = []
    planned = [first, first, last, last, first, last]
    try:
        # Neither packing nor spreading of Ray's own would choose this sequence.
        for node in planned:
            made = plan([replicas("rollout", 1)], [node])
            held.append(reserve(made, wait_s=20))
            landed += [place for place, _ in where(made, held[-1]).values()]
    finally:
        for reservation in held:
            reservation.release()
    assert landed == [node.name for node in planned]
    assert eventually(all_is_free)


def test_reserve_fractions_share_gpus_as_planned(cluster: Cluster) -> None:
    node = cluster_nodes()[1]
    asked = [
        replicas("learner", 7),
        replicas("rollout", 1, 0.5),
        replicas("reference", 1, 0.3),
        replicas("reward", 1, 0.2),
    ]
    made = plan(asked, [node])
    reservation = reserve(made, wait_s=20)
    try:
        shared = {tuple(gpus) for slot, (_, gpus) in where(made, reservation).items() if slot.role != "learner"}
    finally:
        reservation.release()

    assert len(shared) == 1
    assert eventually(all_is_free)


def test_reservation_slot_of_a_dead_actor_takes_the_next(cluster: Cluster) -> None:
    made = plan([replicas("rollout", 8)], [cluster_nodes()[1]])
    reservation = reserve(made, wait_s=20)
    try:
        slot = made.slots[3]
        first = start(slot, reservation)
        place = ray.get(first.where.remote(), timeout=60)
        ray.kill(first)
        assert ray.get(start(slot, reservation).where.remote(), timeout=60) == place
    finally:
        reservation.release()
        reservation.release()
    assert eventually(all_is_free)


def test_wait_for_cluster_demand_beyond_it_ends_in_time_with_registered_against_needed(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    start_s = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError) as error:
        wait_for_cluster([per_node("learner", 1), replicas("rollout", 17)], wait_s=1.5)

    assert 1.5 <= time.monotonic() - start_s < 4
    assert str(error.value) == (
        "rollout.gpus is 1; 17 actors need 17 GPUs and the cluster has 16, of which learner takes 2. "
        "Lower rollout.replicas or learner.gpus, or add nodes.\n"
        "placement.wait_s is 1.5; by then registered: 3 nodes, 9 CPUs, 16 GPUs; "
        "needed: 4.25 CPUs, 17 GPUs and 0.25 CPUs, 1 GPU on each GPU node. Raise it where nodes are still joining."
    )
    assert [record.message for record in caplog.records if "waiting for the cluster" in record.message]
    assert all_is_free()


def test_reserve_held_by_another_names_the_actors_and_releases_what_it_got(cluster: Cluster) -> None:
    first, last = cluster_nodes()[1:]
    others = reserve(plan([replicas("rollout", 1)], [last]), wait_s=20)
    try:
        made = plan([per_node("learner", 2), per_node("rollout", 6)], [first, last])
        with pytest.raises(ConfigError) as error:
            reserve(made, wait_s=1.5)
        assert str(error.value) == (
            "placement.wait_s is 1.5; 8 of 16 actors found no place in that time: learner 2, learner 3, "
            f"{', '.join(f'rollout {i}' for i in range(6, 12))} on node {last.name} (2 CPUs, 8 GPUs). "
            "Free what other jobs hold there, or raise it."
        )
        assert eventually(lambda: ray.available_resources().get("GPU") == 15)
    finally:
        others.release()
    assert eventually(all_is_free)


def test_wait_for_cluster_node_that_joins_meanwhile_is_found(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_cluster, [replicas("rollout", 24, cpus=0.1)], wait_s=60)
        time.sleep(0.5)
        assert not waiting.done()
        joined = cluster.add_node(num_cpus=4, num_gpus=8, object_store_memory=OBJECT_STORE_BYTES)
        try:
            made = waiting.result(timeout=60)
        finally:
            cluster.remove_node(joined)

    assert Counter(slot.node for slot in made.slots)[joined.node_id] == 8
    assert eventually(lambda: joined.node_id not in {node.name for node in cluster_nodes()})
