"""What an actor takes of memory, by hand, and what a plan's nodes and GPUs have to hold."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from maspo_ray.actor_memory import GIB, actor_memory, adapter_parameters, micro_batch_tokens
from maspo_ray.config import LoraConfig, RunConfig
from maspo_ray.fleet.memory import estimate_memory, say_what_they_take
from maspo_ray.fleet.placement import config_nodes, demands, plan
from maspo_ray.model_shape import ModelShape

# 10^9 parameters; 2 layers of 4 query and 2 key heads of 16, inner width 128.
SHAPE = ModelShape(1000, 64, 2, 4, 2, 16, 128, 10**9, True, 2)
CONFIG_JSON = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
}


def _config(**sections: Any) -> RunConfig:
    data = {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "max_prompt_tokens": 24}
    tree = {"model": {"path": "org/model"}, "data": data, "rollout": {"max_new_tokens": 40}}
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return RunConfig.model_validate(tree)


def _learner(ranks: int, dtype: str = "bfloat16", **keys: Any) -> dict[Any, float]:
    """Returns what a learner's rank takes of its GPU."""
    config = _config(model={"dtype": dtype}, learner={"gpus": 1, **keys})
    return actor_memory("learner", config, SHAPE, ranks).gpu


@pytest.mark.parametrize(
    ("dtype", "stage", "ranks", "weights", "gradients", "optimizer"),
    [
        # Bytes a parameter: 2 of bfloat16, 4 of the gradient, 12 of AdamW's moments and the float32 copy.
        ("bfloat16", 1, 4, 2, 4, 12 / 4),
        ("bfloat16", 2, 4, 2, 4 / 4, 12 / 4),
        # Its quarter, and of the layers that are gathered the other three.
        ("bfloat16", 3, 4, 2 / 4 + 2 * 3 / 4, 4 / 4, 12 / 4),
        ("bfloat16", None, 1, 2, 4, 12),
        # Nothing is copied where nothing is sharded; ZeRO 3 shards float32 weights as they are.
        ("float32", None, 1, 4, 4, 8),
        ("float32", None, 2, 4, 4, 12 / 2),
        ("float32", 3, 2, 4 / 2 + 4 / 2, 4 / 2, 8 / 2),
    ],
)
def test_learner_holds_weights_gradients_and_optimizer_by_the_stage(
    dtype: str, stage: int | None, ranks: int, weights: float, gradients: float, optimizer: float
) -> None:
    taken = _learner(ranks, dtype, zero_stage=stage)
    parts = [taken["weights"], taken["gradients"], taken["optimizer"]]
    assert [part / 1e9 for part in parts] == pytest.approx([weights, gradients, optimizer])


def test_learner_with_adapters_trains_those_alone() -> None:
    lora = LoraConfig(rank=8, targets=("q_proj", "v_proj"))
    # 2 layers · 8 · (64 + 64 and 64 + 32).
    assert adapter_parameters(lora, SHAPE) == 2 * 8 * (128 + 96)
    taken = _learner(1, lora=lora.model_dump())
    assert (taken["weights"], taken["gradients"], taken["optimizer"]) == (2e9, 4 * 3584, 12 * 3584)
    # Query, key, value, output, and the three of the feed-forward part.
    assert adapter_parameters(LoraConfig(rank=1), SHAPE) == 2 * (128 + 96 + 96 + 128 + 3 * 192)


def test_learner_s_optimizer_is_the_node_s_where_it_is_offloaded() -> None:
    config = _config(learner={"gpus": 1, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}})
    taken = actor_memory("learner", config, SHAPE, 1)
    assert taken.gpu.keys() & {"optimizer", "gradients"} == set()
    # The weights are loaded there first.
    assert (taken.node["optimizer"], taken.node["gradients"], taken.node["weights"]) == (12e9, 4e9, 2e9)


def test_activations_are_a_layer_s_tensors_times_layers_and_tokens() -> None:
    # Of a token and a layer: 8 · 64 + 6.75 · 4 · 16 + 4 · 128 = 1456 elements; 4 · 64 = 256 outside of the layers.
    assert _learner(1, max_tokens_per_micro_batch=100)["activations"] == 100 * 2 * (2 * 1456 + 256)
    # A layer's input of each, and one layer at a time.
    checkpointed = _learner(1, max_tokens_per_micro_batch=100, gradient_checkpointing=True)
    assert checkpointed["activations"] == 100 * 2 * (2 * 64 + 1456 + 256)
    # In float32 the norms keep no copy: 6 · 64.
    assert _learner(1, "float32", max_tokens_per_micro_batch=100)["activations"] == 100 * 4 * (2 * (1456 - 128) + 256)


def test_eager_attention_keeps_a_weight_for_each_pair_of_tokens() -> None:
    sizes = [
        actor_memory(
            "learner",
            _config(model={"attn_implementation": name}, learner={"gpus": 1, "max_tokens_per_micro_batch": 100}),
            SHAPE,
            1,
        ).gpu["activations"]
        for name in ("sdpa", "eager")
    ]
    # 2 layers · 4 heads · 100 · 100, of 2 bytes and, in the softmax, 4.
    assert sizes[1] - sizes[0] == 2 * 4 * 100 * 100 * (2 + 4)


def test_micro_batch_is_no_larger_than_an_update_s_share() -> None:
    config = _config(pipeline={"groups_per_step": 4}, learner={"updates_per_batch": 2}, rollout={"group_size": 6})
    # 2 groups · 6 completions over 4 ranks, of 24 + 40 tokens each.
    assert micro_batch_tokens(config, 4) == 3 * 64
    assert micro_batch_tokens(config, 1) == 12 * 64


def test_engine_on_a_cpu_holds_its_weights_the_next_and_its_cache() -> None:
    taken = actor_memory("rollout", _config(model={"dtype": "float32"}, rollout={"kv_cache_gib": 0.5}), SHAPE, 1)
    assert (taken.node["weights"], taken.node["buckets"], taken.node["KV cache"]) == (4e9, 4e9, 0.5 * GIB)
    assert taken.gpu == {}


def test_engine_on_gpus_takes_its_share_of_them_and_two_buckets_each() -> None:
    rollout = {"gpus": 2, "engine": {"gpu_memory_utilization": 0.5}}
    known = actor_memory("rollout", _config(rollout=rollout, placement={"gpu_memory_gib": 40}), SHAPE, 1).gpu
    assert (known["weights"] + known["KV cache"], known["buckets"]) == (2 * 20 * GIB, 2 * 2 * GIB)
    # Of GPUs of an unknown size at least one sequence: 2 · 2 layers · 2 heads · 16 · 2 bytes of 64 tokens.
    assert actor_memory("rollout", _config(rollout=rollout), SHAPE, 1).gpu["KV cache"] == 256 * 64


# The plan.


def _model(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    return {"path": str(tmp_path), "dtype": "float32"}


def _estimate(config: RunConfig) -> Any:
    return estimate_memory(config, plan(demands(config), config_nodes(config.placement)))


def test_node_holds_all_its_actors_and_the_first_the_driver_too(tmp_path: Path) -> None:
    config = _config(
        model=_model(tmp_path),
        rollout={"replicas": 2, "kv_cache_gib": 0.25},
        placement={"nodes": 1, "cpus_per_node": 8, "memory_gib_per_node": 64},
    )
    estimate = _estimate(config)
    [taken] = estimate.nodes.values()
    actors = estimate.actors
    parts = [sum(actors[role].node.values()) for role in ("learner", "rollout", "rollout", "reward", "driver")]
    assert sum(taken.values()) == pytest.approx(sum(parts))
    assert taken["KV cache"] == 2 * 0.25 * GIB
    assert estimate.warnings() == []
    # 2 · 2 layers · 2 heads · 16 · 4 bytes: 0.25 GiB are 524,288 tokens.
    assert "KV cache of an engine: 524,288 tokens, 8,192 sequences of the longest, of 128 at once" in estimate.table()


def test_actors_with_shares_of_a_gpu_are_together_on_it_and_whole_ones_apart(tmp_path: Path) -> None:
    config = _config(
        model=_model(tmp_path),
        learner={"gpus": 1},
        rollout={"replicas": 2, "gpus": 0.5, "engine": {"gpu_memory_utilization": 0.4}},
        placement={"nodes": 1, "gpus_per_node": 2, "gpu_memory_gib": 16},
    )
    estimate = _estimate(config)
    learner, rollout = estimate.actors["learner"].gpu, estimate.actors["rollout"].gpu
    assert sorted(sum(taken.values()) for taken in estimate.gpus.values()) == pytest.approx(
        sorted([sum(learner.values()), 2 * sum(rollout.values())])
    )


def test_what_does_not_fit_is_one_line_with_the_largest_part_and_its_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(
        model=_model(tmp_path),
        rollout={"kv_cache_gib": 30},
        placement={"nodes": 1, "cpus_per_node": 8, "memory_gib_per_node": 16},
    )
    caplog.set_level(logging.WARNING, "maspo_ray")
    say_what_they_take(config, plan(demands(config), config_nodes(config.placement)))
    [line] = caplog.messages
    assert line.startswith("node node-0 has 16.00 GiB of memory; its actors take about 3")
    assert "of which KV cache 30.00. Lower rollout.kv_cache_gib" in line
    assert "fullest node: node node-0, 3" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_said_not_to_be_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = _config(placement={"nodes": 1})
    say_what_they_take(config, plan(demands(config), config_nodes(config.placement)))
    assert capsys.readouterr().out.startswith("memory: not estimated; model.path is org/model")
