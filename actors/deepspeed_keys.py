"""Which keys of `learner.deepspeed` may go to DeepSpeed, known without importing it.

Promise: a key that DeepSpeed does not read (it would be dropped in silence), that would fail at the learner's set-up, or that would change
what is trained is refused with its reason before anything starts. What the sections themselves set is refused by `LearnerConfig`. A test
holds the lists against the installed DeepSpeed.
"""

import difflib
from collections.abc import Mapping, Set
from typing import Any

from maspo_ray.config import LearnerConfig
from maspo_ray.errors import ConfigError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DTYPE = "learner, reference and engines compute in model.dtype"
_BATCH = "batches come from the pipeline, which DeepSpeed's own loader has no part in"
_MODEL = "it trains another model than the engines sample from"
_RANKS = "the learner's ranks are data-parallel, sharded by learner.zero_stage"
_WHOLE = "a checkpoint must be whole when the learner says that it is saved"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("amp", "torch_autocast"), _DTYPE),
    **dict.fromkeys(
        ("curriculum_learning", "data_efficiency", "dataloader_drop_last", "elasticity", "autotuning"), _BATCH
    ),
    **dict.fromkeys(("progressive_layer_drop", "quantize_training", "compression_training"), _MODEL),
    **dict.fromkeys(("weight_quantization", "sparse_attention", "eigenvalue"), _MODEL),
    **dict.fromkeys(
        ("pipeline", "tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism", "hybrid_engine"),
        _RANKS,
    ),
    **dict.fromkeys(("nebula", "datastates_ckpt"), _WHOLE),
    "activation_checkpointing": "it is for models that call DeepSpeed's own function; learner.gradient_checkpointing is for all",
    "compile": "the learner ends its own updates, which DeepSpeed's compiler cannot do",
    "gradient_allreduce_op": "the learner counts on the mean over its ranks",
}
"""Of DeepSpeed 0.19.8, each with its reason."""

PASSED: Set[str] = _names(
    "aio checkpoint comet comms_logger communication_data_type csv_monitor data_types disable_allgather disable_python_gc dump_state "
    "flops_profiler gradient_predivide_factor graph_harvesting log_level memory_breakdown prescale_gradients "
    "seq_parallel_communication_data_type sparse_gradients steps_per_print tensorboard timers vocabulary_size wall_clock_breakdown wandb "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"
)
"""The others that it reads, but for those that `LearnerConfig` owns."""

ZERO_REFUSED: dict[str, str] = {
    "compute_grad_norm": "whether an update is applied is decided by the gradient's norm",
    "zenflow": "it applies part of an update steps later, so that a version would hold less than its step says",
}

ZERO_PASSED: Set[str] = _names(
    "allgather_bucket_size allgather_partitions allgather_sequential contiguous_gradients cpu_offload cpu_offload_param "
    "cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks gather_16bit_weights_on_model_save ignore_unused_parameters "
    "leaf_module legacy_stage1 load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance "
    "memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer offload_param overlap_comm "
    "override_module_apply param_persistence_threshold parameter_alignment pipeline_loading_checkpoint prefetch_bucket_size "
    "reduce_bucket_size reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage3_allgather_sequential "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters "
    "stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold "
    "stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size "
    "use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zero_hpz_partition_size zero_quantized_gradients "
    "zero_quantized_nontrainable_weights zero_quantized_weights"
)

OFFLOAD_PASSED: dict[str, Set[str]] = {
    "offload_param": _names("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
    "offload_optimizer": _names(
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload cpuadam_cores_perc"
    ),
}


def check_deepspeed_keys(learner: LearnerConfig) -> None:
    """Checks `learner.deepspeed`.

    Raises:
        ConfigError: a key is not one of DeepSpeed's, or is one that may not be passed; one line for each.
    """
    field = "learner.deepspeed"
    faults = _faults(field, learner.deepspeed, PASSED, REFUSED)
    zero = learner.deepspeed.get("zero_optimization", {})
    faults += _faults(f"{field}.zero_optimization", zero, ZERO_PASSED, ZERO_REFUSED)
    for name, passed in OFFLOAD_PASSED.items():
        if isinstance(section := zero.get(name), dict):
            faults += _faults(f"{field}.zero_optimization.{name}", section, passed, {})
    # Given a zero_optimization, the learner's stage is at least 1.
    if zero.get("overlap_comm") and (learner.zero_stage or 1) < 2:
        faults.append(
            f"{field}.zero_optimization.overlap_comm is {zero['overlap_comm']!r}; DeepSpeed overlaps only with gradients that are sharded. "
            "Set learner.zero_stage to 2, or remove it."
        )
    if faults:
        raise ConfigError("\n".join(faults))


def _faults(field: str, given: Mapping[str, Any], passed: Set[str], refused: Mapping[str, str]) -> list[str]:
    faults = []
    for name, value in given.items():
        where = f"{field}.{name} is {value!r}"
        if name in refused:
            faults.append(f"{where}; {refused[name]}. Remove it.")
        elif name not in passed:
            near = difflib.get_close_matches(name, passed, n=1)
            faults.append(
                f"{where}; DeepSpeed reads no such key. {f'Did you mean {near[0]}?' if near else 'Remove it.'}"
            )
    return faults
