"""What actors are made with follows from the config, and how long a reward actor may be silent."""

import pytest

from maspo_ray.config import RewardConfig, RunConfig
from maspo_ray.fleet.blueprint import constructor_arguments
from maspo_ray.fleet.fleet import score_deadline_s

CONFIG = RunConfig.model_validate(
    {
        "model": {"path": "org/model", "dtype": "float32"},
        "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "max_prompt_tokens": 10},
        "rollout": {"max_new_tokens": 20, "temperature": 0.7},
        "learner": {"updates_per_batch": 2},
        "pipeline": {"steps": 5, "groups_per_step": 4},
        "seed": 7,
    }
)


def test_engines_have_seeds_of_their_own_and_the_longest_sequence() -> None:
    first, third = (constructor_arguments(CONFIG, "rollout", replica, threads=2) for replica in (0, 2))
    assert (first["seed"], third["seed"]) == (7, 9)
    assert (first["max_model_tokens"], first["threads"]) == (10 + 20, 2)


def test_learner_ranks_share_a_seed_and_know_the_schedules_length() -> None:
    ranks = [constructor_arguments(CONFIG, "learner", rank, world_size=3) for rank in range(3)]
    assert [(r["rank"], r["world_size"], r["seed"]) for r in ranks] == [(0, 3, 7), (1, 3, 7), (2, 3, 7)]
    assert ranks[0]["total_updates"] == 5 * 2
    assert ranks[0]["temperature"] == constructor_arguments(CONFIG, "reference")["temperature"] == 0.7


def test_reward_is_given_its_args_alone() -> None:
    assert constructor_arguments(CONFIG, "reward") == {}


@pytest.mark.parametrize(("timeout_s", "group_size", "deadline_s"), [(30.0, 8, 280.0), (2.0, 4, 20.0)])
def test_reward_actor_may_be_silent_while_a_group_is_scored_together_and_then_one_by_one(
    timeout_s: float, group_size: int, deadline_s: float
) -> None:
    # (group_size + 1) calls, and 10 s of grace.
    assert score_deadline_s(RewardConfig(timeout_s=timeout_s), group_size) == deadline_s
