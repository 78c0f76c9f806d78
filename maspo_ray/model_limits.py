"""Whether the model that a config names can do what the config asks of it; else an engine would say so at its start, or in the midst of a run.

Promise: judges by config.json alone, of a model that is on this machine; what that does not say is left to the engine.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from maspo_ray.config import RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.model_shape import longest_sequence, model_folder, model_shape, read_config_json

_BLOCK_TOKENS = 32
"""Of the KV cache on a CPU, where `rollout.engine` has no other `block_size`."""


def check_model_limits(config: RunConfig) -> None:
    """Holds stop tokens, the longest sequence and the KV cache against the model.

    Raises:
        ConfigError: a line for each that the model cannot do.
    """
    folder = model_folder(config.model.path)
    if folder is None or not (folder / "config.json").is_file():
        return
    tree = read_config_json(folder, f"model.path is {config.model.path}")
    faults = [*_unknown_stops(config, tree), *_too_long(config, tree)]
    shape = model_shape(folder, tree)
    if shape is not None and shape.cached_layers == shape.num_layers and "kv_lora_rank" not in tree:
        faults += _cache_too_small(config, shape.kv_bytes_per_token(4 if config.model.dtype == "float32" else 2))
    if faults:
        raise ConfigError("\n".join(faults))


def _unknown_stops(config: RunConfig, tree: Mapping[str, Any]) -> Iterator[str]:
    size = tree.get("vocab_size")
    if not isinstance(size, int):
        return
    for section, tokens in (("rollout", config.rollout.stop_token_ids), ("eval", config.eval.stop_token_ids or ())):
        if unknown := [token for token in tokens if token >= size]:
            yield (
                f"{section}.stop_token_ids is {list(tokens)}; the model has the tokens 0 to {size - 1}, so {unknown[0]} is none of them. "
                "Remove it, or take the id from the model's tokenizer."
            )


def _too_long(config: RunConfig, tree: dict[str, Any]) -> Iterator[str]:
    longest, asked, rollout = longest_sequence(tree), config.max_model_tokens, config.rollout
    allowed = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").strip().lower() in ("1", "true")
    if longest is None or asked <= longest or allowed or "hf_overrides" in rollout.engine:
        return
    takes = f"the model takes at most {longest} tokens, prompt and completion together"
    if rollout.max_model_tokens is not None:
        yield f"rollout.max_model_tokens is {asked}; {takes}. Set it to {longest} or less."
    else:
        yield (
            f"data.max_prompt_tokens is {config.data.max_prompt_tokens}; with rollout.max_new_tokens ({rollout.max_new_tokens}) that makes "
            f"{asked}, and {takes}. Lower one of them."
        )


def _cache_too_small(config: RunConfig, token_bytes: int) -> Iterator[str]:
    rollout = config.rollout
    if rollout.gpus > 0 or rollout.engine.keys() & {"kv_cache_memory_bytes", "kv_cache_dtype"}:
        return
    block = rollout.engine.get("block_size", _BLOCK_TOKENS)
    needed = -(-config.max_model_tokens // block) * block * token_bytes / 2**30
    if needed > rollout.kv_cache_gib:
        yield (
            f"rollout.kv_cache_gib is {rollout.kv_cache_gib:g}; a sequence of {config.max_model_tokens} tokens takes {needed:.3g} GiB of "
            "keys and values. Raise it, or lower data.max_prompt_tokens or rollout.max_new_tokens."
        )
