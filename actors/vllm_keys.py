"""Which keys of `rollout.engine` may go to vLLM, known without importing it.

Promise: a key that vLLM does not have, that would fail at the engine's start, or that would make the engine sample from another
distribution than the learner trains is refused with its reason before anything starts. What the sections themselves set is refused by
`RolloutConfig`. Values are vLLM's affair.
"""

import ast
import difflib
import importlib.util
from pathlib import Path

from maspo_ray.config import RolloutConfig
from maspo_ray.errors import ConfigError

_MODEL = "the engine must run model.path as the learner trains it, under the same names and in the same precision"
_POLICY = "tokens would be sampled from a distribution that the learner's log-probs leave out"
_PLACE = "an engine runs on the GPUs that placement gives its actor (rollout.gpus, replicas, per_node)"
_TEXT = "a completion would have no text, which rewards score"

REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "tokenizer",
            "tokenizer_revision",
            "revision",
            "code_revision",
            "model_weights",
            "hf_config_path",
            "config_format",
        ),
        _MODEL,
    ),
    **dict.fromkeys(
        ("hf_overrides", "model_class_overrides", "quantization", "quantization_config", "convert"), _MODEL
    ),
    **dict.fromkeys(("override_generation_config", "logits_processors", "watermark_config"), _POLICY),
    **dict.fromkeys(
        ("distributed_executor_backend", "device_ids", "nnodes", "node_rank", "master_addr", "master_port"), _PLACE
    ),
    **dict.fromkeys(("prefill_context_parallel_size", "data_parallel_size_local", "data_parallel_backend"), _PLACE),
    **dict.fromkeys(("data_parallel_rank", "data_parallel_start_rank", "data_parallel_address"), _PLACE),
    **dict.fromkeys(("data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb"), _PLACE),
    **dict.fromkeys(("skip_tokenizer_init", "tokens_only"), _TEXT),
    "enable_lora": "engines receive merged weights, so that it would only slow them down and change the weights' names",
    "runner": "an engine generates",
}
"""Of vLLM 0.32's `AsyncEngineArgs`, each with its reason. At a value that changes nothing (false, null) a key is let through."""


def engine_keys() -> set[str] | None:
    """Returns the names that the installed vLLM's `AsyncEngineArgs` takes, read from its source, since its import takes seconds; None where
    this machine has no vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py")
    if not source.is_file():
        return None
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return {
        field.target.id
        for found in classes
        if found.name in ("EngineArgs", "AsyncEngineArgs")
        for field in found.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def check_engine_keys(rollout: RolloutConfig) -> None:
    """Checks `rollout.engine`.

    Raises:
        ConfigError: a key is not one of vLLM's, or is one that may not be passed; one line for each.
    """
    faults = []
    known = engine_keys() if rollout.engine else None
    for name, value in rollout.engine.items():
        where = f"rollout.engine.{name} is {value!r}"
        if name in REFUSED and value not in (None, False):
            faults.append(f"{where}; {REFUSED[name]}. Remove it.")
        elif known is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            faults.append(
                f"{where}; vLLM's engine takes no such argument. {f'Did you mean {near[0]}?' if near else 'Remove it.'}"
            )
    if rollout.engine.get("load_format") == "dummy":
        faults.append(
            "rollout.engine.load_format is 'dummy'; version 0 is the model's own weights, which are not sent. Remove it."
        )
    if rollout.gpus == 0 and "kv_cache_memory_bytes" in rollout.engine:
        faults.append(
            "rollout.engine.kv_cache_memory_bytes is given; on a CPU it follows from rollout.kv_cache_gib. Set that."
        )
    batched = rollout.engine.get("max_num_batched_tokens")
    if isinstance(batched, int) and batched < rollout.max_concurrent_requests:
        faults.append(
            f"rollout.engine.max_num_batched_tokens is {batched}; an engine computes at least a token of each request at once, and "
            f"rollout.max_concurrent_requests is {rollout.max_concurrent_requests}. Raise it to that, or lower the requests."
        )
    if faults:
        raise ConfigError("\n".join(faults))
