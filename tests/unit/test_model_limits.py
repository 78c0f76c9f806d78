"""What the model's folder says of its size, and that it cannot do what a config asks of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from maspo_ray.config import RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.model_limits import check_model_limits
from maspo_ray.model_shape import ModelShape, longest_sequence, model_folder, model_shape, read_config_json

LLAMA: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def _folder(tmp_path: Path, tree: dict[str, Any]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


def _faults(tmp_path: Path, tree: dict[str, Any], **sections: dict[str, Any]) -> list[str]:
    """Returns what is wrong with a run over a model: prompts of at most 16 tokens, completions of at most 32 by default."""
    folder = _folder(tmp_path, tree)
    data = {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "max_prompt_tokens": 16} | sections.pop("data", {})
    rollout = {"max_new_tokens": 32} | sections.pop("rollout", {})
    model = {"path": str(folder), "dtype": "float32"}
    config = RunConfig.model_validate({"model": model, "data": data, "rollout": rollout} | sections)
    try:
        check_model_limits(config)
    except ConfigError as error:
        return str(error).splitlines()
    return []


# The shape.


def _shape(tmp_path: Path, tree: dict[str, Any]) -> ModelShape | None:
    folder = _folder(tmp_path, tree)
    return model_shape(folder, read_config_json(folder, "model"))


def test_shape_derives_the_parameters_of_a_model_without_weights(tmp_path: Path) -> None:
    shape = _shape(tmp_path, LLAMA)
    assert shape is not None and not shape.counted
    # A layer: 2 · 128 · 32 · (4 + 2) of attention and 3 · 128 · 352; the embedding once, since it is tied.
    assert shape.num_parameters == 4 * (49_152 + 135_168) + 64 * 128
    # Keys and values of 4 layers · 2 heads · 32.
    assert shape.kv_bytes_per_token(2) == 2 * 4 * 2 * 32 * 2


def test_shape_counts_the_parameters_of_the_weights_files(tmp_path: Path) -> None:
    folder = _folder(tmp_path, LLAMA)
    save_file(
        {"a": np.zeros((3, 5), np.float16), "b": np.zeros((), np.float32)}, folder / "model-00001-of-00002.safetensors"
    )
    save_file({"c": np.zeros(7, np.float32)}, folder / "model-00002-of-00002.safetensors")
    shape = _shape(tmp_path, LLAMA)
    assert shape is not None and (shape.num_parameters, shape.counted) == (15 + 1 + 7, True)


def test_shape_of_experts_has_all_in_its_parameters_and_those_a_token_meets_in_its_width(tmp_path: Path) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    shape = _shape(tmp_path, LLAMA | experts)
    assert shape is not None and shape.intermediate_size == 2 * 96
    assert shape.num_parameters == 4 * (49_152 + 3 * 128 * 96 * 8) + 64 * 128


def test_shape_caches_keys_of_layers_without_windows_alone(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    shape = _shape(tmp_path, {"model_type": "any", "text_config": LLAMA | {"layer_types": kinds}})
    assert shape is not None and shape.cached_layers == 2


def test_shape_knows_gpt2s_names_and_leaves_what_is_no_transformer(tmp_path: Path) -> None:
    shape = _shape(tmp_path, {"vocab_size": 50, "n_embd": 8, "n_layer": 2, "n_head": 2})
    assert shape is not None
    assert (shape.hidden_size, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (8, 2, 4, 32)
    assert _shape(tmp_path, {"vocab_size": 50, "hidden_size": 8, "state_size": 16}) is None


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"max_position_embeddings": 64, "model_max_length": 128}, 128),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}}, None),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}, None),
        ({}, None),
    ],
)
def test_longest_sequence_is_the_models_own_where_it_says(tree: dict[str, Any], expected: int | None) -> None:
    assert longest_sequence(tree) == expected


def test_model_folder_of_a_hub_id_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert model_folder("org/name") is None
    cached = tmp_path / "hub" / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    assert model_folder("org/name") == cached / "snapshots" / "abc"


# The limits.


def test_a_model_that_can_do_what_is_asked_has_no_fault(tmp_path: Path) -> None:
    assert _faults(tmp_path, LLAMA, rollout={"stop_token_ids": [63], "kv_cache_gib": 0.01}) == []


def test_a_sequence_longer_than_the_models_is_named_by_the_key_that_makes_it(tmp_path: Path) -> None:
    [fault] = _faults(tmp_path, LLAMA, rollout={"max_new_tokens": 49})
    assert fault == (
        "data.max_prompt_tokens is 16; with rollout.max_new_tokens (49) that makes 65, and the model takes at most 64 tokens, prompt and "
        "completion together. Lower one of them."
    )
    assert _faults(tmp_path, LLAMA, rollout={"max_new_tokens": 48}) == []
    [fault] = _faults(tmp_path, LLAMA, rollout={"max_model_tokens": 65})
    assert fault.startswith("rollout.max_model_tokens is 65; the model takes at most 64 tokens")
    assert fault.endswith("Set it to 64 or less.")


def test_a_sequence_longer_than_the_models_is_left_to_who_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overridden = {"max_model_tokens": 65, "engine": {"hf_overrides": {"max_position_embeddings": 128}}}
    assert _faults(tmp_path, LLAMA, rollout=overridden) == []
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert _faults(tmp_path, LLAMA, rollout={"max_model_tokens": 65}) == []


@pytest.mark.parametrize("section", ["rollout", "eval"])
def test_a_stop_token_that_the_model_lacks_is_named(tmp_path: Path, section: str) -> None:
    [fault] = _faults(tmp_path, LLAMA, **{section: {"stop_token_ids": [3, 64, 65]}})
    assert fault.startswith(
        f"{section}.stop_token_ids is [3, 64, 65]; the model has the tokens 0 to 63, so 64 is none of them."
    )


def test_a_cache_too_small_for_one_sequence_is_refused_on_a_cpu(tmp_path: Path) -> None:
    # Two blocks of 32 tokens, each token 2 · 4 layers · 2 heads · 32 · 4 bytes: 131,072 bytes.
    enough = 131_072 / 2**30
    assert _faults(tmp_path, LLAMA, rollout={"kv_cache_gib": enough}) == []
    [fault] = _faults(tmp_path, LLAMA, rollout={"kv_cache_gib": enough * 0.99})
    assert fault.startswith("rollout.kv_cache_gib is 0.00012")
    assert "a sequence of 48 tokens takes 0.000122 GiB" in fault
    assert _faults(tmp_path, LLAMA, rollout={"kv_cache_gib": enough / 2, "gpus": 1}) == []
    windows = LLAMA | {"layer_types": ["sliding_attention"] * 4}
    assert _faults(tmp_path, windows, rollout={"kv_cache_gib": enough / 2}) == []


def test_a_model_that_is_not_on_this_machine_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    data = {"train": {"kind": "jsonl", "path": "rows.jsonl"}}
    check_model_limits(RunConfig.model_validate({"model": {"path": "org/name"}, "data": data}))
