"""What each kind of actor takes of memory, estimated from the config and the model's sizes: pure arithmetic.

Promise: an estimate for the built-in actors at their fullest, not a bound. Weights, gradients, optimizer and caches are exact up to padding;
activations are those of a Llama-like layer, by what PyTorch keeps of it for the backward pass (`tests/engine/test_activation_memory.py` holds the
two together). Not counted: CUDA contexts, NCCL's own buffers, fragmentation, what vLLM's CUDA graphs take.
"""

from dataclasses import dataclass, field
from typing import Literal

from maspo_ray.config import LoraConfig, RunConfig
from maspo_ray.model_shape import ModelShape
from maspo_ray.zero_stage import zero_stage_of

Part = Literal[
    "weights", "gradients", "optimizer", "activations", "log-probs", "KV cache", "buckets", "object store", "process"
]
Bytes = dict[Part, float]

GIB = 2**30
LOGIT_CHUNK_TOKENS = 512
"""Of `objectives.tensor_ops.chunked_logprobs`."""
REFERENCE_ROW_TOKENS = 8192
"""Of a forward pass of `actors.hf_reference`."""
_NCCL_BUCKETS_BYTES = 2 * GIB
"""vLLM's packed sender and receiver hold two buckets of 1 GiB."""
_GPU_UTILIZATION = 0.92
"""vLLM 0.32's `gpu_memory_utilization`."""
_ZERO_BUCKET, _ZERO_LIVE = 5e8, 1e9
"""DeepSpeed 0.19's `reduce_bucket_size` and `stage3_max_live_parameters`, in elements."""
_QUERY_TENSORS, _INNER_TENSORS = 6.75, 4.0
"""Tensors that a layer keeps of each token for the backward pass: as wide as all query heads (keys and values repeated to these, before and
after the rotation), and as wide as the feed-forward part."""
_PROCESS_GIB = {"learner": 0.5, "rollout": 1.1, "reference": 0.35, "reward": 0.1, "driver": 0.5}
"""Of an interpreter with its libraries: round figures, after a look at a quickstart's processes on a CPU. An engine is two processes."""


@dataclass(frozen=True, slots=True)
class ActorMemory:
    """Bytes that one actor takes, by what for: of its GPUs, all together, and of its node."""

    gpu: Bytes = field(default_factory=dict)
    node: Bytes = field(default_factory=dict)


def actor_memory(role: str, config: RunConfig, shape: ModelShape, ranks: int) -> ActorMemory:
    """Returns what an actor of a role takes.

    Args:
        ranks: of the learner.
    """
    process: Bytes = {"process": _PROCESS_GIB[role] * GIB}
    if role in ("driver", "reward"):
        return ActorMemory(node=process)
    if role == "rollout":
        return _rollout_memory(config, shape, process)
    device = _learner_bytes(config, shape, ranks) if role == "learner" else _reference_bytes(config, shape)
    offloaded = _offloaded(config, device) if role == "learner" else {}
    kept = {part: amount for part, amount in device.items() if part not in offloaded}
    if getattr(config, role).gpus == 0:
        return ActorMemory(node=device | process)
    # Loaded on the CPU first, whole, by every rank.
    loading: Bytes = {"weights": shape.num_parameters * element_bytes(config)}
    return ActorMemory(gpu=kept, node=loading | offloaded | process)


def element_bytes(config: RunConfig) -> int:
    return 4 if config.model.dtype == "float32" else 2


def activation_bytes(config: RunConfig, shape: ModelShape, tokens: int) -> float:
    """Returns what a forward pass of so many tokens keeps for its backward pass."""
    bytes_each, single = element_bytes(config), config.model.dtype == "float32"
    # In bfloat16 the norms keep a float32 copy of what they are given.
    layer = float((6 if single else 8) * shape.hidden_size)
    layer += _QUERY_TENSORS * shape.num_heads * shape.head_dim + _INNER_TENSORS * shape.intermediate_size
    if config.model.attn_implementation == "eager":
        # Attention weights, one for each pair of tokens; their softmax is in float32.
        layer += (1 if single else 3) * shape.num_heads * tokens
    kept = shape.num_layers * layer
    if config.learner.gradient_checkpointing:
        kept = shape.num_layers * shape.hidden_size + layer
    return tokens * bytes_each * (kept + 4 * shape.hidden_size)


def micro_batch_tokens(config: RunConfig, ranks: int) -> int:
    """Returns the tokens of a full micro-batch: the limit, or all that an update can have for a rank."""
    groups = -(-config.pipeline.groups_per_step // config.learner.updates_per_batch)
    most = -(-groups * config.rollout.group_size // ranks) * config.max_model_tokens
    return min(config.learner.max_tokens_per_micro_batch, most)


def adapter_parameters(lora: LoraConfig, shape: ModelShape) -> int:
    """Returns the parameters of the adapters: rank · (inputs + outputs) of each module of a Llama-like layer that has one."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    named = sizes if lora.targets == ("all-linear",) else lora.targets
    return shape.num_layers * lora.rank * sum(sizes.get(name.rpartition(".")[2], hidden + inner) for name in named)


def _learner_bytes(config: RunConfig, shape: ModelShape, ranks: int) -> Bytes:
    learner, bytes_each = config.learner, element_bytes(config)
    stage = zero_stage_of(learner, config.model, ranks)
    trained = adapter_parameters(learner.lora, shape) if learner.lora else shape.num_parameters
    weights = float(shape.num_parameters * bytes_each)
    # AdamW's two moments in float32, and ZeRO's own float32 copy, which under stage 3 float32 weights are themselves.
    per_parameter = 8 if stage == 0 or (stage == 3 and bytes_each == 4) else 12
    if stage == 3 and ranks > 1:
        live = min(shape.num_parameters, _ZERO_LIVE) * bytes_each
        weights = weights / ranks + live * (1 - 1 / ranks)
    buckets = 0.0
    if stage > 0:
        zero = learner.deepspeed.get("zero_optimization", {})
        size = float(zero.get("reduce_bucket_size", _ZERO_BUCKET))
        # On a CPU what is not touched takes nothing.
        buckets = (size if learner.gpus > 0 else min(size, trained)) * (bytes_each if stage == 2 else 4)
    if learner.gpus > 0:
        buckets += _NCCL_BUCKETS_BYTES
    tokens = micro_batch_tokens(config, ranks)
    return {
        "weights": weights,
        # Summed in float32, whatever the weights' dtype.
        "gradients": 4.0 * trained / (ranks if stage >= 2 else 1),
        "optimizer": float(per_parameter * trained) / (ranks if stage >= 1 else 1),
        "activations": activation_bytes(config, shape, tokens),
        "log-probs": _logit_bytes(config, shape, tokens) + shape.vocab_size * shape.hidden_size * bytes_each,
        "buckets": buckets,
    }


def _offloaded(config: RunConfig, device: Bytes) -> Bytes:
    """Returns what ZeRO-Offload keeps on the node: the optimizer with the gradients that it takes, or the weights too."""
    zero = config.learner.deepspeed.get("zero_optimization", {})
    moved: Bytes = {}
    for key, parts in (("offload_optimizer", ("optimizer", "gradients")), ("offload_param", ("weights",))):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "cpu":
            moved |= {part: amount for part, amount in device.items() if part in parts}
    return moved


def _reference_bytes(config: RunConfig, shape: ModelShape) -> Bytes:
    tokens = max(REFERENCE_ROW_TOKENS, config.max_model_tokens)
    # Nothing is kept for a backward pass: one layer's tensors at a time.
    layer = 4 * shape.hidden_size + 2 * shape.num_heads * shape.head_dim + 2 * shape.intermediate_size
    return {
        "weights": float(shape.num_parameters * element_bytes(config)),
        "activations": float(tokens * element_bytes(config) * layer),
        "log-probs": _logit_bytes(config, shape, tokens),
    }


def _logit_bytes(config: RunConfig, shape: ModelShape, tokens: int) -> float:
    """Returns what a chunk's logits take at most: two copies in float32, of which one is their gradient or their entropy."""
    return 2.0 * 4 * min(tokens, LOGIT_CHUNK_TOKENS) * shape.vocab_size


def _rollout_memory(config: RunConfig, shape: ModelShape, process: Bytes) -> ActorMemory:
    rollout, weights = config.rollout, float(shape.num_parameters * element_bytes(config))
    if rollout.gpus == 0:
        # The buckets of a Gloo update hold the whole next version.
        cache = rollout.kv_cache_gib * GIB
        return ActorMemory(node={"weights": weights, "KV cache": cache, "buckets": weights, **process})
    workers = max(1, int(rollout.gpus))
    gpu: Bytes = {"weights": weights, "buckets": float(_NCCL_BUCKETS_BYTES * workers)}
    sequence = shape.kv_bytes_per_token(element_bytes(config)) * config.max_model_tokens
    # What vLLM takes for itself, and without the GPU's size what one sequence needs of it.
    memory = config.placement.gpu_memory_gib
    taken = float(rollout.engine.get("gpu_memory_utilization", _GPU_UTILIZATION)) * (memory or 0) * GIB * workers
    gpu["KV cache"] = max(float(sequence), taken - weights)
    return ActorMemory(gpu=gpu, node=process)
