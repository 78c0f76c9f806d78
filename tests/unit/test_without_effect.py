"""Keys that a run accepts and does not heed are said, each with its cause; those that it heeds are not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from maspo_ray.cli import main
from maspo_ray.config import RunConfig, load_config
from maspo_ray.config.without_effect import without_effect

EVAL = {"eval": {"kind": "reasoning_gym", "task": "gcd"}}


def _config(**sections: Any) -> RunConfig:
    data = {"train": {"kind": "reasoning_gym", "task": "gcd"}, **sections.pop("data", {})}
    return RunConfig.model_validate({"model": {"path": "org/model", "dtype": "float32"}, "data": data, **sections})


# What is set, the keys that are said, and what makes each of them count.
CASES: dict[str, tuple[dict[str, Any], list[str], dict[str, Any]]] = {
    "a GPU's KV cache": ({"rollout": {"kv_cache_gib": 1}}, ["rollout.kv_cache_gib"], {}),
    "updates of one actor": ({"rollout": {"update": "rolling"}}, ["rollout.update"], {"rollout": {"replicas": 2}}),
    "updates of actors on each node": ({"rollout": {"update": "rolling", "per_node": 1}}, [], {}),
    "reference without KL": (
        {"reference": {"cpus": 0.1, "timeout_s": 9}, "kl": {"estimator": "k1"}},
        ["reference.cpus", "reference.timeout_s", "kl.estimator"],
        {"kl": {"coef": 0.1}},
    ),
    "importance of the behaviour policy": (
        {"objective": {"kind": "grpo", "importance_cap": 3}},
        ["objective.importance_cap"],
        {"objective": {"old_policy": "recompute"}},
    ),
    "evaluation of nothing": ({"eval": {"every": 5, "name": "x"}}, ["eval.every", "eval.name"], {"data": EVAL}),
    "greedy truncation": (
        {"data": EVAL, "eval": {"temperature": 0, "top_p": 0.9, "min_p": 0.1}},
        ["eval.top_p", "eval.min_p"],
        {"eval": {"temperature": 0.5}},
    ),
    "evaluation after the end": (
        {"data": EVAL, "eval": {"every": 30}, "pipeline": {"steps": 30}},
        ["eval.every"],
        {"pipeline": {"steps": 31}},
    ),
    "checkpoint after the end": (
        {"checkpoint": {"every": 31}, "pipeline": {"steps": 30}},
        ["checkpoint.every"],
        {"pipeline": {"steps": 31}},
    ),
    "deadline of no checkpoint": (
        {"checkpoint": {"save_final": False, "timeout_s": 5}},
        ["checkpoint.timeout_s"],
        {"checkpoint": {"every": 5}},
    ),
    "warm-up past the last step": (
        {"learner": {"warmup_steps": 40, "lr": 1e-5, "schedule": "linear"}, "pipeline": {"steps": 30}},
        ["learner.schedule", "learner.warmup_steps"],
        {"pipeline": {"steps": 41}},
    ),
    "warm-up up to the last step": (
        {"learner": {"warmup_steps": 30, "lr": 1e-5, "schedule": "linear"}, "pipeline": {"steps": 30}},
        ["learner.schedule"],
        {"learner": {"warmup_steps": 29}},
    ),
    "staleness of a short run": (
        {"pipeline": {"steps": 3, "max_staleness": 3}},
        ["pipeline.max_staleness"],
        {"pipeline": {"max_staleness": 2}},
    ),
    "a cluster's object store": ({"placement": {"object_store_gib": 3, "address": "auto"}}, ["placement.object_store_gib"], {}),
    "ZeRO-3's keys": (
        {"learner": {"deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 5, "reduce_bucket_size": 9}}}},
        ["learner.deepspeed.zero_optimization.stage3_max_reuse_distance"],
        {"learner": {"zero_stage": 3}},
    ),
    "a GPU's memory": ({"rollout": {"engine": {"gpu_memory_utilization": 0.5}}}, ["rollout.engine.gpu_memory_utilization"], {"rollout": {"gpus": 1}}),
}  # fmt: skip
CASES["a GPU's KV cache"][0]["rollout"]["gpus"] = 1
CASES["a GPU's KV cache"][2]["rollout"] = {"gpus": 0}
CASES["a cluster's object store"][2]["placement"] = {"address": None}


def _over(sections: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return sections | {name: {**sections.get(name, {}), **keys} for name, keys in changes.items()}


@pytest.mark.parametrize("case", CASES)
def test_key_without_effect_is_said_and_no_other(case: str) -> None:
    sections, keys, change = CASES[case]
    lines = without_effect(_config(**sections))
    assert [line.split(" is ")[0] for line in lines] == keys
    assert all(line.endswith(".") for line in lines)
    if change:
        assert without_effect(_config(**_over(sections, change))) == []


def test_key_without_effect_names_its_value_and_the_cause() -> None:
    config = _config(learner={"warmup_steps": 200, "schedule": "linear"}, pipeline={"steps": 100})
    assert without_effect(config) == [
        "learner.schedule is linear; it has no effect, since learner.warmup_steps is 200 and the run ends at step 100.",
        "learner.warmup_steps is 200; the run ends at step 100, before learner.lr is reached.",
    ]


def test_address_of_the_environment_counts_as_the_configs() -> None:
    config = _config(placement={"object_store_gib": 3})
    assert without_effect(config) == []
    assert len(without_effect(config, "10.0.0.1:6379")) == 1


def test_resolved_config_is_as_quiet_as_what_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(_config().model_dump(mode="json")))
    assert without_effect(load_config(file)) == []


@pytest.mark.parametrize("path", ["quickstart", "smollm2"])
def test_examples_set_no_key_that_is_without_effect(path: str) -> None:
    assert without_effect(load_config(f"examples/{path}/run.yaml")) == []


def test_check_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "maspo_ray"):
        main(["check", "examples/quickstart/run.yaml", "--kl.coef", "0", "--run_dir", str(tmp_path / "out")])
    assert "reference.cpus is 0.1; it has no effect, since no reference actor is started while kl.coef is 0." in (
        capsys.readouterr().err
    )
