"""Checks of the files that a config names, before anything starts: the model's folder, the data files, the run's folder.

Promise: takes well under a second beside the reading of the data and starts nothing; imports neither torch, transformers, ray nor vllm. A run that passes can still
fail later, but not for want of a local file.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from maspo_ray.config import LoraConfig, ModelConfig, RunConfig
from maspo_ray.data.run_rows import RunRows
from maspo_ray.errors import ConfigError
from maspo_ray.model_limits import check_model_limits
from maspo_ray.model_shape import read_config_json
from maspo_ray.run_dir.hold import check_run_dir

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM 0.32.0's CPU attention (CPUAttentionBackend.get_supported_head_sizes); with another size the engine would fail only at its
start."""

_TOKEN_BYTES = 16
"""What a token of a completion takes in the object store, at most about: its id, log-prob, reference log-prob and text."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def preflight(config: RunConfig, resume: bool) -> RunRows:
    """Checks the model, the data, the run's folder and the object store's size, and reports all faults at once.

    Returns the rows of the data, of which those of local files are read.

    Raises:
        ConfigError: something is at fault; it has one line for each fault.
    """
    rows = RunRows(config.data)
    checks: list[Callable[[], None]] = [
        lambda: check_model(config.model, "cuda" if config.rollout.gpus > 0 else "cpu"),
        lambda: check_model_limits(config),
        lambda: check_lora(config.learner.lora, config.model),
        rows.read_files,
        lambda: check_run_dir(config.run_dir, resume),
    ]
    if not (config.placement.address or os.environ.get("RAY_ADDRESS")):
        checks.append(lambda: check_object_store(config, config.placement.object_store_gib * 2**30))
    faults = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return rows


def is_hub_id(path: str) -> bool:
    """Returns whether a model's path is a hub's `org/name` rather than a folder of this machine."""
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1 or not all(path.split("/")):
        return False
    return not Path(path).exists() and not Path(path.split("/")[0]).is_dir()


def check_model(model: ModelConfig, device: Literal["cpu", "cuda"]) -> None:
    """Checks a local model's folder; a hub id is not checked, since that would need the network.

    Raises:
        ConfigError: the folder, its config or its tokenizer is missing, or vLLM's CPU attention cannot run it.
    """
    if is_hub_id(model.path):
        return
    where, folder = f"model.path is {model.path}", Path(model.path)
    if not folder.is_dir():
        remedy = (
            "Write the folder's path in full" if model.path.startswith("~") else "Give a folder, or a hub id org/name"
        )
        raise ConfigError(f"{where}; there is no such folder. {remedy}.")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{where}; the folder has no config.json. Give the folder of a Hugging Face model.")
    # With trust_remote_code the model's own code decides how its tokenizer's files are named.
    if not model.trust_remote_code and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{where}; the folder has no tokenizer ({', '.join(TOKENIZER_FILES)}). Save the model's tokenizer into it."
        )
    if device == "cpu":
        _check_head_size(folder, where)


def _check_head_size(folder: Path, where: str) -> None:
    tree = read_config_json(folder, where)
    size, hidden, heads = (tree.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if size is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = hidden // heads
    if isinstance(size, int) and size not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"{where}; its attention heads are of size {size}, but vLLM on CPU takes only "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}. Take a model with one of these, or set rollout.gpus to 1."
        )


def check_lora(lora: LoraConfig | None, model: ModelConfig) -> None:
    """Checks that each of `learner.lora.targets` names modules in the layers of a local model; of a hub's model the learner checks it at
    set-up.

    Raises:
        ConfigError: a target names no module.
    """
    if lora is None or "all-linear" in lora.targets or is_hub_id(model.path):
        return
    # Such as self_attn.q_proj, of model.layers.0.self_attn.q_proj.weight.
    places = {
        name.removesuffix(".weight")
        for name in _weight_names(Path(model.path))
        if re.search(r"\.\d+\..*\.weight$", name)
    }
    unknown = [t for t in lora.targets if not any(place == t or place.endswith(f".{t}") for place in places)]
    if unknown and places:
        there = sorted({place.rpartition(".")[2] for place in places if "norm" not in place})
        raise ConfigError(
            f"learner.lora.targets is {list(lora.targets)}; no module in the layers of {model.path} is called "
            f"{' or '.join(unknown)}. Name some of {', '.join(there)}, or set all-linear."
        )


def _weight_names(folder: Path) -> list[str]:
    """Returns the names of a model's weights; none where its folder has no safetensors."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            return list(json.loads(index.read_text())["weight_map"])
        if whole.is_file():
            with safe_open(whole, "np") as weights:
                return list(weights.keys())
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.path is {folder}; its weights cannot be read ({error}). Download them again."
        ) from None
    return []


def check_object_store(config: RunConfig, capacity_bytes: float) -> None:
    """Checks that the object store holds all groups that may be under way at once, with every completion as long as it may get.

    Raises:
        ConfigError: it does not.
    """
    pipeline, rollout = config.pipeline, config.rollout
    groups = pipeline.max_groups_under_way
    group_bytes = rollout.group_size * rollout.max_new_tokens * _TOKEN_BYTES
    if groups * group_bytes > capacity_bytes:
        field = f"pipeline.max_staleness is {pipeline.max_staleness}"
        if pipeline.groups_per_step * group_bytes > capacity_bytes:
            field = f"pipeline.groups_per_step is {pipeline.groups_per_step}"
        raise ConfigError(
            f"{field}; so {groups:,} groups may be under way at once, up to "
            f"{groups * group_bytes / 2**30:.3g} GiB of tokens and log-probs, more than the object store's "
            f"{capacity_bytes / 2**30:.3g} GiB. Lower it, or raise placement.object_store_gib (of a cluster: what `ray start` gives it)."
        )
