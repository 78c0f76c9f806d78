"""The plan: what lands where, that nothing is over-committed, and what a user reads when it does not fit."""

import math
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maspo_ray.config import PlacementConfig, RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.fleet.placement import Node, Plan, RoleDemand, config_nodes, demands, plan

TWO_NODES = (Node("a", 8, 64), Node("b", 8, 64))


def replicas(role: str, count: int | None, gpus: float = 1, cpus: float = 1) -> RoleDemand:
    return RoleDemand(role, count, None, gpus, cpus)


def per_node(role: str, count: int, gpus: float = 1, cpus: float = 1) -> RoleDemand:
    return RoleDemand(role, None, count, gpus, cpus)


def counts(made: Plan) -> Counter[tuple[str, str]]:
    return Counter((slot.node, slot.role) for slot in made.slots)


def nodes_of(made: Plan, role: str) -> list[str]:
    return [slot.node for slot in made.of_role(role)]


def run_config(**sections: object) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"train": {"kind": "jsonl", "path": "d"}}, **sections},
    )


def test_plan_six_rollouts_and_two_ranks_per_node_fill_both_nodes() -> None:
    made = plan([per_node("learner", 2), per_node("rollout", 6)], TWO_NODES)

    assert counts(made) == {(node, role): n for node in "ab" for role, n in (("learner", 2), ("rollout", 6))}
    assert nodes_of(made, "learner") == ["a", "a", "b", "b"]
    assert [slot.replica for slot in made.of_role("rollout")] == list(range(12))


def test_plan_per_node_with_gpu_nodes_leaves_cpu_nodes_out() -> None:
    made = plan([per_node("reward", 2, gpus=0)], (Node("head", 0, 64), *TWO_NODES))

    assert counts(made) == {("a", "reward"): 2, ("b", "reward"): 2}


def test_plan_per_node_without_gpu_nodes_goes_on_every_node() -> None:
    made = plan([per_node("reward", 2, gpus=0)], (Node("a", 0, 2), Node("b", 0, 2)))

    assert counts(made) == {("a", "reward"): 2, ("b", "reward"): 2}


def test_plan_learner_before_a_per_node_role_leaves_it_its_share() -> None:
    # Two ranks packed on node a first would leave 6 GPUs there for 7 rollouts.
    made = plan([replicas("learner", 2), per_node("rollout", 7)], TWO_NODES)

    assert counts(made) == {("a", "learner"): 1, ("b", "learner"): 1, ("a", "rollout"): 7, ("b", "rollout"): 7}


def test_plan_learner_ranks_that_fit_one_node_share_it_and_rollouts_spread() -> None:
    made = plan([replicas("learner", 4), replicas("rollout", 8)], TWO_NODES)

    assert nodes_of(made, "learner") == ["a"] * 4
    # 4 of 8 are left on a, so that b takes 4 before the two take turns.
    assert nodes_of(made, "rollout") == ["b"] * 4 + ["a", "b"] * 2


def test_plan_learner_takes_the_one_node_that_holds_all_its_ranks() -> None:
    made = plan([replicas("learner", 8)], (Node("small", 4, 64), Node("large", 8, 64)))

    assert nodes_of(made, "learner") == ["large"] * 8


def test_plan_learner_larger_than_a_node_keeps_its_ranks_contiguous() -> None:
    made = plan([replicas("learner", 12)], TWO_NODES)

    assert nodes_of(made, "learner") == ["a"] * 8 + ["b"] * 4


def test_plan_fractions_of_more_than_half_share_no_gpu() -> None:
    one, two = (Node("a", 1, 8),), (Node("a", 2, 8),)

    assert len(plan([replicas("rollout", 2, gpus=0.6)], two).slots) == 2
    with pytest.raises(ConfigError) as error:
        plan([replicas("rollout", 2, gpus=0.4), replicas("reference", 1, gpus=0.3)], one)
    assert str(error.value) == (
        "reference.gpus is 0.3; 1 actor needs 0.3 GPUs and the cluster has 1, of which rollout takes 0.8. "
        "Lower reference.gpus or rollout.replicas, or add nodes."
    )
    with pytest.raises(ConfigError) as error:
        plan([replicas("rollout", 3, gpus=0.6)], two)
    assert str(error.value) == (
        "rollout.gpus is 0.6; each actor needs 0.6 GPUs of one GPU, and only 2 of 3 find that; the cluster has 2. "
        "Lower rollout.replicas, or add nodes."
    )


def test_plan_fractions_that_add_up_to_one_share_a_gpu() -> None:
    # In floating point 1 - 0.65 - 0.3 is below 0.05.
    asked = [replicas("rollout", 1, 0.65), replicas("reference", 1, 0.3), replicas("reward", 1, 0.05)]
    made = plan(asked, (Node("a", 1, 8),))

    assert len(made.slots) == 3


def test_plan_fractions_fit_the_fullest_gpu() -> None:
    # 0.5 + 0.5 and 0.4 + 0.3 + 0.3; a second 0.5 on the empty GPU would leave no 0.3 free in the end.
    asked = [replicas("learner", 2, gpus=0.5), replicas("rollout", 1, gpus=0.4), replicas("reference", 2, gpus=0.3)]

    assert len(plan(asked, (Node("a", 2, 8),)).slots) == 5


def test_plan_whole_gpu_actor_takes_no_gpu_that_is_shared() -> None:
    # 0.4 + 0.4 on one GPU and 0.4 on the other: 0.8 are free, none of them whole.
    with pytest.raises(ConfigError) as error:
        plan([replicas("rollout", 3, gpus=0.4), replicas("reference", 1, gpus=1)], (Node("a", 2, 8),))
    assert "reference.gpus is 1; 1 actor needs 1 GPU and the cluster has 2, of which rollout takes 1.2." in str(
        error.value
    )


def test_plan_actor_of_several_gpus_never_spans_nodes() -> None:
    with pytest.raises(ConfigError) as error:
        plan([replicas("rollout", 1, gpus=4)], (Node("a", 2, 8), Node("b", 2, 8)))
    assert str(error.value) == (
        "rollout.gpus is 4; each actor needs 4 GPUs of one node, and only 0 of 1 find that; the cluster has 4. "
        "Lower rollout.gpus, or add nodes."
    )


def test_plan_small_actors_in_the_way_of_a_large_one_make_room() -> None:
    # In the roles' own order the rollouts spread over both nodes and no node has 8 GPUs left.
    made = plan([replicas("rollout", 2, gpus=1), replicas("reference", 1, gpus=8)], TWO_NODES)

    assert len(set(nodes_of(made, "rollout"))) == 1
    assert nodes_of(made, "reference") != nodes_of(made, "rollout")[:1]


def test_plan_cpu_roles_go_where_most_cpus_are_free() -> None:
    made = plan(
        [replicas("rollout", 1, 1, cpus=4), replicas("reward", 5, 0, cpus=2)], (Node("a", 2, 8), Node("b", 0, 10))
    )

    # Free CPUs of a, b: 4, 10 → 4, 8 → 4, 6 → 4, 4 → 2, 4 → 2, 2.
    assert nodes_of(made, "reward") == ["b", "b", "b", "a", "b"]


def test_plan_gpu_roles_go_where_most_gpus_are_free_whatever_the_cpus() -> None:
    made = plan([replicas("rollout", 3, gpus=2)], (Node("a", 6, 64), Node("b", 9, 32)))

    # Free GPUs of a, b: 6, 9 → 6, 7 → 6, 5 → 4, 5.
    assert nodes_of(made, "rollout") == ["b", "b", "a"]


def test_plan_roles_without_a_choice_of_node_go_before_those_with_one() -> None:
    with pytest.raises(
        ConfigError, match=r"learner.gpus is 1; 3 actors need 3 GPUs .* 16, of which rollout takes 14\."
    ):
        plan([replicas("learner", 3), per_node("rollout", 7)], TWO_NODES)
    with pytest.raises(
        ConfigError, match=r"learner.cpus is 12; 1 actor needs 12 CPUs .* 16, of which rollout takes 8\."
    ):
        plan([replicas("learner", 1, 0, 12), replicas("rollout", 1, 1, 8)], (Node("a", 1, 16),))


def test_plan_roles_that_take_nothing_countable_are_spread_by_number() -> None:
    made = plan([replicas("reward", 4, 0, 0.1)], (Node("a", 0, math.inf), Node("b", 0, math.inf)))

    assert counts(made) == {("a", "reward"): 2, ("b", "reward"): 2}


def test_plan_too_few_gpus_names_the_role_the_need_and_the_cluster() -> None:
    with pytest.raises(ConfigError) as error:
        plan([replicas("rollout", 9)], (Node("a", 8, 64),))
    assert str(error.value) == (
        "rollout.gpus is 1; 9 actors need 9 GPUs and the cluster has 8. Lower rollout.replicas, or add nodes."
    )


def test_plan_gpus_taken_by_another_role_names_its_knob_too() -> None:
    with pytest.raises(ConfigError) as error:
        plan([replicas("learner", 4), replicas("rollout", 5), replicas("reward", 4, gpus=0)], (Node("a", 8, 64),))
    assert str(error.value) == (
        "rollout.gpus is 1; 5 actors need 5 GPUs and the cluster has 8, of which learner takes 4. "
        "Lower rollout.replicas or learner.replicas, or add nodes."
    )


def test_plan_too_few_cpus_names_the_role_the_need_and_the_cluster() -> None:
    with pytest.raises(ConfigError) as error:
        plan([replicas("learner", 1, 0), replicas("rollout", 3, 0), replicas("reward", 2, 0, 0.5)], (Node("a", 0, 2),))
    assert str(error.value) == (
        "rollout.cpus is 1; 3 actors need 3 CPUs and the cluster has 2, of which learner takes 1. "
        "Lower rollout.replicas, learner.cpus or reward.replicas, or add nodes."
    )


def test_plan_cpus_only_where_there_are_no_gpus_says_so() -> None:
    with pytest.raises(
        ConfigError, match=r"each actor needs 4 CPUs of one node beside its GPUs, and only 2 of 3 find that"
    ):
        plan([replicas("rollout", 3, 1, cpus=4)], (Node("a", 8, 8), Node("b", 0, 64)))


def test_plan_per_node_that_does_not_fit_names_the_node() -> None:
    with pytest.raises(ConfigError) as error:
        plan([per_node("learner", 2), per_node("rollout", 7)], (TWO_NODES[0], Node("b", 9, 64)))
    assert str(error.value) == (
        "rollout.gpus is 1; 7 actors on each node need 7 GPUs and a has 8, of which learner takes 2. "
        "Lower rollout.per_node or learner.per_node, or use larger nodes."
    )


@pytest.mark.parametrize("demand", [replicas("rollout", 1), per_node("rollout", 1)])
def test_plan_without_nodes_is_refused(demand: RoleDemand) -> None:
    with pytest.raises(ConfigError, match="there is no node to place the actor on"):
        plan([demand], [])


ROLES = ("learner", "rollout", "reference", "reward")
AMOUNTS = st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 0.6, 1, 2])
DEMANDS = st.lists(st.tuples(st.booleans(), st.integers(1, 4), AMOUNTS, AMOUNTS), min_size=1, max_size=4).map(
    lambda rows: [
        (per_node if each else replicas)(role, n, g, c) for role, (each, n, g, c) in zip(ROLES, rows, strict=False)
    ]
)
NODES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8)), min_size=1, max_size=3).map(
    lambda rows: [Node(f"n{i}", gpus, cpus) for i, (gpus, cpus) in enumerate(rows)]
)


def fits_gpus(parts: list[Fraction], free: list[Fraction]) -> bool:
    """Whether some assignment of parts to GPUs exists, by trying all; a part of several GPUs is given as several of 1."""
    if not parts:
        return True
    return any(
        parts[0] <= room and fits_gpus(parts[1:], [*free[:i], room - parts[0], *free[i + 1 :]])
        for i, room in enumerate(free)
        if room not in free[:i]
    )


@settings(max_examples=150, deadline=None)
@given(DEMANDS, NODES)
def test_plan_of_anything_places_all_and_overcommits_nothing_or_refuses(
    asked: list[RoleDemand], nodes: list[Node]
) -> None:
    try:
        made = plan(asked, nodes)
    except ConfigError:
        return
    gpu_nodes = sum(node.gpus > 0 for node in nodes) or len(nodes)
    for demand in asked:
        slots = made.of_role(demand.role)
        wanted = demand.replicas or (demand.per_node or 0) * gpu_nodes
        assert [slot.replica for slot in slots] == list(range(wanted))
        assert all((slot.gpus, slot.cpus) == (demand.gpus, demand.cpus) for slot in slots)
    for node in nodes:
        slots = made.on_node(node.name)
        assert sum(Fraction(str(slot.cpus)) for slot in slots) <= node.cpus
        parts = [Fraction(str(min(slot.gpus, 1))) for slot in slots for _ in range(math.ceil(slot.gpus))]
        assert fits_gpus(sorted(parts, reverse=True), [Fraction(1)] * int(node.gpus))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_plan_of_single_gpu_actors_is_refused_only_beyond_the_total(wanted: list[int], gpus: list[int]) -> None:
    asked = [replicas(role, count, 1, 0) for role, count in zip(ROLES, wanted, strict=False)]
    nodes = [Node(f"n{i}", count, 1) for i, count in enumerate(gpus)]
    if sum(wanted) <= sum(gpus):
        assert len(plan(asked, nodes).slots) == sum(wanted)
    else:
        with pytest.raises(ConfigError, match="GPU"):
            plan(asked, nodes)


def test_plan_table_shows_each_actor_and_what_each_node_has_left() -> None:
    made = plan(
        [replicas("learner", 1), replicas("rollout", 2, 0.5, 1.5)], (Node("node-0", 2, 8), Node("node-1", 0, math.inf))
    )

    assert made.table().splitlines() == [
        "node    role            replica  gpus  cpus",
        "node-0  learner         0        1     1",
        "node-0  rollout         0        0.5   1.5",
        "node-0  rollout         1        0.5   1.5",
        "node-0  used/available  3        2/2   4/8",
        "node-1  used/available  0        0/0   0/-",
    ]


def test_demands_without_counts_are_one_replica_and_no_reference() -> None:
    config = run_config(rollout={"per_node": 6, "gpus": 1}, learner={"gpus": 1})

    assert demands(config) == (
        RoleDemand("learner", 1, None, 1, 1),
        RoleDemand("rollout", None, 6, 1, 1),
        RoleDemand("reward", 1, None, 0, 0.1),
    )


def test_demands_with_kl_include_the_reference() -> None:
    config = run_config(kl={"coef": 0.1}, reference={"replicas": 3})

    assert [(d.role, d.replicas) for d in demands(config)] == [
        ("learner", 1),
        ("rollout", 1),
        ("reference", 3),
        ("reward", 1),
    ]


def test_config_nodes_by_default_are_this_machine() -> None:
    local_cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()

    assert config_nodes(PlacementConfig(gpus_per_node=2)) == (Node("local", 2, local_cpus or 1),)
    assert config_nodes(PlacementConfig(cpus_per_node=3)) == (Node("local", 0, 3),)


def test_config_nodes_of_a_cluster_have_its_counts_and_unbounded_cpus_if_not_given() -> None:
    assert config_nodes(PlacementConfig(nodes=2, gpus_per_node=8, cpus_per_node=64)) == (
        Node("node-0", 8, 64),
        Node("node-1", 8, 64),
    )
    assert config_nodes(PlacementConfig(nodes=1, gpus_per_node=8)) == (Node("node-0", 8, math.inf),)


def test_placement_import_leaves_ray_and_torch_unloaded() -> None:
    code = "import sys, maspo_ray.fleet.placement; sys.exit(bool({'ray', 'torch'} & sys.modules.keys()))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
