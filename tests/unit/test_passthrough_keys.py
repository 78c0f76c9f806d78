"""What may be passed through to vLLM and DeepSpeed: their own keys, but for those that fail late or change what is trained."""

from typing import Any

import pytest

from actors.deepspeed_keys import OFFLOAD_PASSED, PASSED, REFUSED, ZERO_PASSED, ZERO_REFUSED
from actors.deepspeed_learner import DeepSpeedLearner
from actors.vllm_keys import REFUSED as ENGINE_REFUSED
from actors.vllm_keys import engine_keys
from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import LearnerConfig, RolloutConfig
from maspo_ray.errors import ConfigError


def _engine_fault(engine: dict[str, Any], **rollout: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        VLLMRollout.check_config(RolloutConfig(engine=engine, **rollout))
    return str(caught.value)


def _deepspeed_fault(deepspeed: dict[str, Any], **learner: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        DeepSpeedLearner.check_config(LearnerConfig(deepspeed=deepspeed, **learner))
    return str(caught.value)


# vLLM.


def test_engine_key_that_vllm_has_not_is_told_the_right_one() -> None:
    assert _engine_fault({"gpu_memory_utilisation": 0.8}) == (
        "rollout.engine.gpu_memory_utilisation is 0.8; vLLM's engine takes no such argument. Did you mean gpu_memory_utilization?"
    )
    assert _engine_fault({"zzzzzz": 1}).endswith("takes no such argument. Remove it.")


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"skip_tokenizer_init": True}, "rollout.engine.skip_tokenizer_init is True; a completion would have no text, which rewards score. Remove it."),
        ({"quantization": "fp8"}, "rollout.engine.quantization is 'fp8'; the engine must run model.path as the learner trains it"),
        ({"override_generation_config": {"top_k": 5}}, "rollout.engine.override_generation_config is {'top_k': 5}; tokens would be sampled from a distribution"),
        ({"device_ids": [1]}, "rollout.engine.device_ids is [1]; an engine runs on the GPUs that placement gives its actor"),
        ({"load_format": "dummy"}, "rollout.engine.load_format is 'dummy'; version 0 is the model's own weights"),
        ({"kv_cache_memory_bytes": 2**30}, "rollout.engine.kv_cache_memory_bytes is given; on a CPU it follows from rollout.kv_cache_gib."),
        ({"max_num_batched_tokens": 127}, "rollout.engine.max_num_batched_tokens is 127; an engine computes at least a token of each request at once"),
    ],
)  # fmt: skip
def test_engine_key_that_would_fail_or_change_the_policy_is_refused_with_its_reason(
    engine: dict[str, Any], reason: str
) -> None:
    fault = _engine_fault(engine)
    assert fault.startswith(reason)
    assert len(fault.splitlines()) == 1


def test_engine_keys_at_fault_have_a_line_each() -> None:
    lines = _engine_fault({"tokens_only": True, "blok_size": 16}).splitlines()
    assert [line.split(" is ")[0] for line in lines] == ["rollout.engine.tokens_only", "rollout.engine.blok_size"]


@pytest.mark.parametrize(
    ("engine", "gpus"),
    [
        ({"max_num_batched_tokens": 128, "block_size": 16, "enforce_eager": True}, 0),
        ({"gpu_memory_utilization": 0.5, "kv_cache_memory_bytes": 2**30, "enable_log_requests": True}, 1),
        # As if they were not there.
        ({"skip_tokenizer_init": False, "quantization": None}, 0),
        ({"load_format": "safetensors"}, 0),
    ],
)
def test_engine_key_that_tunes_the_engine_passes(engine: dict[str, Any], gpus: float) -> None:
    VLLMRollout.check_config(RolloutConfig(engine=engine, gpus=gpus))


def test_engine_keys_that_are_refused_are_vllms_and_no_sections() -> None:
    known = engine_keys()
    assert known is not None and ENGINE_REFUSED.keys() <= known
    assert not ENGINE_REFUSED.keys() & RolloutConfig.owned_engine_keys
    assert RolloutConfig.owned_engine_keys <= known


@pytest.mark.engine
def test_engine_keys_are_the_fields_of_vllms_arguments() -> None:
    import dataclasses

    from vllm.engine.arg_utils import AsyncEngineArgs

    assert engine_keys() == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


# DeepSpeed.


def test_deepspeed_key_that_it_does_not_read_is_told_the_right_one() -> None:
    assert _deepspeed_fault({"wall_clock_brakdown": True}) == (
        "learner.deepspeed.wall_clock_brakdown is True; DeepSpeed reads no such key. Did you mean wall_clock_breakdown?"
    )
    zero = {"zero_optimization": {"offload_optimiser": {"device": "cpu"}}}
    assert _deepspeed_fault(zero).startswith("learner.deepspeed.zero_optimization.offload_optimiser is {'device'")
    assert _deepspeed_fault(zero).endswith("Did you mean offload_optimizer?")
    offload = {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}
    assert _deepspeed_fault(offload) == (
        "learner.deepspeed.zero_optimization.offload_optimizer.devise is 'cpu'; DeepSpeed reads no such key. Did you mean device?"
    )


@pytest.mark.parametrize(
    ("deepspeed", "reason"),
    [
        ({"torch_autocast": {"enabled": True}}, "learner.deepspeed.torch_autocast is {'enabled': True}; learner, reference and engines compute in model.dtype."),
        ({"gradient_allreduce_op": "sum"}, "learner.deepspeed.gradient_allreduce_op is 'sum'; the learner counts on the mean over its ranks."),
        ({"compile": {"deepcompile": True}}, "learner.deepspeed.compile is {'deepcompile': True}; the learner ends its own updates"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "learner.deepspeed.zero_optimization.compute_grad_norm is False; whether an update is applied"),
    ],
)  # fmt: skip
def test_deepspeed_key_that_would_fail_or_change_the_training_is_refused_with_its_reason(
    deepspeed: dict[str, Any], reason: str
) -> None:
    fault = _deepspeed_fault(deepspeed)
    assert fault.startswith(reason)
    assert len(fault.splitlines()) == 1


@pytest.mark.parametrize(("stage", "refused"), [(None, True), (1, True), (2, False), (3, False)])
def test_deepspeed_overlaps_communication_only_where_gradients_are_sharded(stage: int | None, refused: bool) -> None:
    deepspeed = {"zero_optimization": {"overlap_comm": True}}
    if not refused:
        DeepSpeedLearner.check_config(LearnerConfig(deepspeed=deepspeed, zero_stage=stage))
        return
    assert _deepspeed_fault(deepspeed, zero_stage=stage) == (
        "learner.deepspeed.zero_optimization.overlap_comm is True; DeepSpeed overlaps only with gradients that are sharded. "
        "Set learner.zero_stage to 2, or remove it."
    )


def test_deepspeed_key_that_tunes_it_passes() -> None:
    zero = {
        "reduce_bucket_size": 1000,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu"},
        "stage3_max_reuse_distance": 5,
    }
    DeepSpeedLearner.check_config(LearnerConfig(deepspeed={"zero_optimization": zero, "wall_clock_breakdown": True}))


class _Read(dict[str, Any]):
    """A configuration that notes which of its keys are asked for, whether they are there or not."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self


@pytest.mark.engine
def test_deepspeed_keys_are_those_that_it_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = _Read({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}})
    DeepSpeedConfig(config)
    assert config.asked - LearnerConfig.owned_deepspeed_keys == PASSED | REFUSED.keys()
    names = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        aliases = getattr(field.validation_alias, "choices", [field.alias])
        names |= {name, *(alias for alias in aliases if alias)}
    assert names - {"stage"} == ZERO_PASSED | ZERO_REFUSED.keys()


@pytest.mark.engine
def test_deepspeed_offload_keys_are_its_own() -> None:
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as Optimizer
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as Param

    assert OFFLOAD_PASSED["offload_param"] == Param.model_fields.keys()
    assert OFFLOAD_PASSED["offload_optimizer"] == Optimizer.model_fields.keys()
