"""What the engines are started with: the config's values under the engines' own names, and what a user may add to them."""

import dataclasses
import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from actors.completion_text import CompletionText
from actors.vllm_rollout import completion_of, cpu_environment, engine_arguments
from maspo_ray.config import LearnerConfig, ModelConfig, RolloutConfig
from maspo_ray.experience import VersionSpan

MODEL = ModelConfig(path="org/model", dtype="float32", trust_remote_code=True)


def _arguments(rollout: RolloutConfig) -> dict[str, Any]:
    return engine_arguments(MODEL, rollout, max_model_tokens=32, seed=5)


def test_engine_arguments_on_cpu() -> None:
    assert _arguments(RolloutConfig(max_concurrent_requests=64, kv_cache_gib=0.25)) == {
        "model": "org/model",
        "dtype": "float32",
        "trust_remote_code": True,
        "seed": 5,
        "max_model_len": 32,
        "max_num_seqs": 64,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": "gloo"},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "worker_extension_cls": "actors.vllm_worker.CpuWorkerExtension",
        "kv_cache_memory_bytes": 268435456,  # 0.25 · 2^30
        "enforce_eager": True,
        "block_size": 32,
    }


def test_engine_arguments_on_gpu_leave_the_cpu_engines_out() -> None:
    cpu, gpu = _arguments(RolloutConfig()), _arguments(RolloutConfig(gpus=1))
    assert gpu.keys() - cpu.keys() == {"tensor_parallel_size"}
    assert cpu.keys() - gpu.keys() == {"kv_cache_memory_bytes", "enforce_eager", "block_size"}
    assert gpu["worker_extension_cls"] == "actors.vllm_worker.GpuWorkerExtension"
    assert gpu["weight_transfer_config"] == {"backend": "nccl"}


@pytest.mark.parametrize(("gpus", "parallel"), [(0.5, 1), (1, 1), (4, 4)])
def test_engine_arguments_split_the_model_over_the_actors_gpus(gpus: float, parallel: int) -> None:
    assert _arguments(RolloutConfig(gpus=gpus))["tensor_parallel_size"] == parallel


@pytest.mark.parametrize("gpus", [0, 1])
def test_engine_arguments_of_the_user_have_the_last_word(gpus: float) -> None:
    engine = {"enforce_eager": False, "max_num_batched_tokens": 64, "gpu_memory_utilization": 0.5}
    arguments = _arguments(RolloutConfig(gpus=gpus, engine=engine))
    assert {name: arguments[name] for name in engine} == engine


@pytest.mark.parametrize(("requests", "batched"), [(2048, None), (2049, 2049), (5000, 5000)])
def test_engine_computes_a_token_of_each_request_at_once_however_many_there_are(
    requests: int, batched: int | None
) -> None:
    assert _arguments(RolloutConfig(max_concurrent_requests=requests)).get("max_num_batched_tokens") == batched
    own = {"max_num_batched_tokens": 8192}
    assert _arguments(RolloutConfig(max_concurrent_requests=requests, engine=own))["max_num_batched_tokens"] == 8192


@pytest.mark.engine
def test_engines_default_of_tokens_at_once_is_as_known() -> None:
    from vllm.config.scheduler import SchedulerConfig

    from actors.vllm_rollout import _BATCHED_TOKENS

    assert SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS == _BATCHED_TOKENS


def test_cpu_environment_gives_the_engine_its_threads_only() -> None:
    assert cpu_environment(2) == {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


@pytest.mark.engine
@pytest.mark.parametrize("gpus", [0, 2])
def test_engine_arguments_are_ones_that_vllm_has(gpus: float) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    assert _arguments(RolloutConfig(gpus=gpus)).keys() <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


@pytest.mark.engine
@pytest.mark.parametrize("gpus", [0, 1])
def test_worker_extension_is_where_the_arguments_say_and_gives_the_checksum(gpus: float) -> None:
    module, _, name = _arguments(RolloutConfig(gpus=gpus))["worker_extension_cls"].rpartition(".")
    extension = getattr(importlib.import_module(module), name)
    assert callable(extension.weight_checksum)
    # What a CPU engine receives by is on the same worker.
    assert hasattr(extension, "stage_weights") == (gpus == 0)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dtype", "zero_stage", "ranks", "stage"),
    [
        ("float32", 2, 1, 2),
        # With nothing to shard and the weights in float32 as they are, ZeRO would only copy.
        ("float32", None, 1, 0),
        ("float32", None, 2, 1),
        ("bfloat16", None, 1, 1),
    ],
)
def test_deepspeed_config_follows_from_the_sections(dtype: Any, zero_stage: Any, ranks: int, stage: int) -> None:
    from actors.deepspeed_engine import deepspeed_config

    model = ModelConfig(path="org/model", dtype=dtype)
    assert deepspeed_config(LearnerConfig(max_grad_norm=0.5, zero_stage=zero_stage), model, ranks) == {
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.5 if stage else 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": stage},
    }


@pytest.mark.engine
def test_deepspeed_config_of_the_user_is_added_and_leaves_the_stage() -> None:
    from actors.deepspeed_engine import deepspeed_config

    added = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    config = deepspeed_config(LearnerConfig(zero_stage=3, deepspeed=added), MODEL, 2)
    assert config["zero_optimization"] == {"overlap_comm": True, "stage": 3}
    assert config["wall_clock_breakdown"] is True
    # The config is frozen; what it holds must not be written into.
    assert added == {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}


@pytest.mark.engine
def test_deepspeed_config_is_understood_by_deepspeed_as_it_is_meant() -> None:
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig

    from actors.deepspeed_engine import deepspeed_config

    learner = LearnerConfig(max_grad_norm=0.25, zero_stage=3, deepspeed={"zero_optimization": {"overlap_comm": False}})
    read = DeepSpeedConfig(deepspeed_config(learner, ModelConfig(path="org/model", dtype="bfloat16"), 1))
    assert (read.zero_optimization_stage, read.gradient_clipping) == (3, 0.25)
    assert (read.bfloat16_config.enabled, read.gradient_accumulation_steps) == (True, 1)
    assert read.zero_config.overlap_comm is False
    assert (read.grad_accum_dtype, read.communication_data_type) == ("fp32", torch.float32)


@pytest.mark.engine
def test_deepspeed_config_overrides_only_what_a_user_is_refused() -> None:
    from actors.deepspeed_engine import deepspeed_config

    own = deepspeed_config(LearnerConfig(), MODEL, 1).keys()
    given: dict[str, Any] = dict.fromkeys(own - LearnerConfig.owned_deepspeed_keys, "the user's")
    given["zero_optimization"] = {}
    config = deepspeed_config(LearnerConfig(deepspeed=given), MODEL, 1)
    assert {name for name in given if config[name] != given[name]} == {"zero_optimization"}
    # What says how ZeRO is to work turns it on.
    assert config["zero_optimization"] == {"stage": 1}


@pytest.mark.engine
def test_norms_and_biases_do_not_decay_and_frozen_weights_are_in_no_group() -> None:
    import torch

    from actors.deepspeed_engine import parameter_groups

    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
    embedding, scale, shift, matrix, bias = model.parameters()
    decaying, others = parameter_groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [id(embedding), id(matrix)]
    assert [id(p) for p in others["params"]] == [id(scale), id(shift), id(bias)]
    for frozen in (scale, shift, bias, embedding):
        frozen.requires_grad_(False)
    [only] = parameter_groups(model, 0.1)
    assert [id(p) for p in only["params"]] == [id(matrix)]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("schedule", "updates", "expected"),
    [
        # Two steps of warm-up, then down to 0 at an update after the last.
        ("linear", 1, [1 / 2, 1.0, 2 / 3, 1 / 3]),
        ("constant", 1, [1 / 2, 1.0, 1.0, 1.0]),
        # (1 + cos(π · k / 3)) / 2 for k = 0, 1, 2.
        ("cosine", 1, [1 / 2, 1.0, 0.75, 0.25]),
        # Two updates to a step make four of warm-up.
        ("constant", 2, [1 / 4, 2 / 4, 3 / 4, 1.0]),
    ],
)
def test_learning_rate_rises_in_the_warm_up_and_is_never_zero(
    schedule: Any, updates: int, expected: list[float]
) -> None:
    import torch

    from actors.deepspeed_engine import learning_rate_schedule

    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.1)
    learner = LearnerConfig(lr=0.1, schedule=schedule, warmup_steps=2, updates_per_batch=updates)
    rates = learning_rate_schedule(optimizer, learner, total_updates=4)
    seen = []
    for _ in range(4):
        seen.append(rates.get_last_lr()[0] / 0.1)
        optimizer.step()
        rates.step()
    assert seen == pytest.approx(expected)


READER = CompletionText(
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({str(i): i for i in range(10)}))), 10
)


def _output(**changed: Any) -> Any:
    """Returns what vLLM's `CompletionOutput` has of two tokens, whose log-probs are -0.5 and -2."""
    stamps = [SimpleNamespace(version="3", start=0, end=1), SimpleNamespace(version="4", start=1, end=2)]
    logprobs = [
        {7: SimpleNamespace(logprob=-0.5)},
        {9: SimpleNamespace(logprob=-2.0), 8: SimpleNamespace(logprob=-0.1)},
    ]
    given = {
        "token_ids": [7, 9],
        "logprobs": logprobs,
        "weight_versions": stamps,
        "finish_reason": "stop",
        "text": "ab",
    }
    return SimpleNamespace(**given | changed)


def test_completion_has_the_sampled_tokens_own_logprobs_and_the_engines_stamps() -> None:
    completion = completion_of(_output(), READER)
    assert (completion.token_ids.tolist(), completion.token_ids.dtype) == ([7, 9], np.int32)
    assert (completion.logprobs.tolist(), completion.logprobs.dtype) == ([-0.5, -2.0], np.float32)
    assert completion.spans == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))
    assert (completion.finish_reason, completion.text) == ("stop", "ab")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"logprobs": None}, "a token has no log-prob"),
        ({"logprobs": [{7: SimpleNamespace(logprob=-0.5)}]}, "a token has no log-prob"),
        ({"weight_versions": None}, "stamped no weight version"),
    ],
)
def test_completion_without_logprobs_or_stamps_is_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        completion_of(_output(**changed), READER)
