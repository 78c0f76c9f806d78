"""Preflight: every missing file is one line before anything starts; what is right passes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from maspo_ray.config import LoraConfig, ModelConfig, RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.preflight import (
    CPU_HEAD_SIZES,
    check_lora,
    check_model,
    check_object_store,
    is_hub_id,
    preflight,
)
from maspo_ray.run_dir.hold import check_run_dir

LLAMA = {"hidden_size": 128, "num_attention_heads": 4}


def _model(folder: Path, tree: dict[str, Any], tokenizer: str | None = "tokenizer.json") -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    if tokenizer is not None:
        (folder / tokenizer).write_text("{}")
    return ModelConfig(path=str(folder))


def _config(tmp_path: Path, **keys: Any) -> RunConfig:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    tree = {"model": {"path": str(tmp_path / "model")}, "data": {"train": {"kind": "jsonl", "path": str(rows)}}}
    return RunConfig.model_validate(tree | {"run_dir": str(tmp_path / "run")} | keys)


# The model.


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/name", True),
        ("name", False),
        ("a/b/c", False),
        ("/org/name", False),
        ("./name", False),
        ("../name", False),
        ("~/name", False),
        ("org/", False),
        ("there/name", False),
        ("there", False),
    ],
)
def test_hub_id_is_one_slash_and_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(path) is expected


def test_model_hub_id_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_model(ModelConfig(path="org/name"), "cpu")


@pytest.mark.parametrize(
    ("path", "remedy"),
    [("./nowhere", "Give a folder, or a hub id org/name."), ("~/nowhere", "Write the folder's path in full.")],
)
def test_model_missing_folder_is_named(path: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(path=path), "cpu")
    assert str(caught.value) == f"model.path is {path}; there is no such folder. {remedy}"


def test_model_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(path=str(tmp_path)), "cuda")
    assert str(caught.value) == (
        f"model.path is {tmp_path}; the folder has no config.json. Give the folder of a Hugging Face model."
    )


def test_model_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    model = _model(tmp_path, LLAMA, tokenizer=None)
    with pytest.raises(ConfigError) as caught:
        check_model(model, "cuda")
    assert str(caught.value) == (
        f"model.path is {tmp_path}; the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json). "
        "Save the model's tokenizer into it."
    )
    check_model(model.model_copy(update={"trust_remote_code": True}), "cuda")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_model_any_tokenizer_file_is_enough(tmp_path: Path, name: str) -> None:
    check_model(_model(tmp_path, LLAMA, tokenizer=name), "cpu")


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, 16),
        ({"hidden_size": 128, "num_attention_heads": 4, "head_dim": 48}, 48),
        ({"hidden_size": 128, "num_attention_heads": 4, "text_config": {"hidden_size": 64, "num_attention_heads": 4}}, 16),
        ({"text_config": {"head_dim": 8}}, 8),
    ],
)  # fmt: skip
def test_model_head_size_that_cpu_attention_lacks_is_refused_on_cpu_only(
    tmp_path: Path, tree: dict[str, Any], size: int
) -> None:
    model = _model(tmp_path, tree)
    with pytest.raises(ConfigError) as caught:
        check_model(model, "cpu")
    assert str(caught.value) == (
        f"model.path is {tmp_path}; its attention heads are of size {size}, but vLLM on CPU takes only 32, 64, 80, 96, 112, "
        "128, 160, 192, 224, 256, 512. Take a model with one of these, or set rollout.gpus to 1."
    )
    check_model(model, "cuda")


@pytest.mark.parametrize(
    "tree",
    [
        LLAMA,
        {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32},
        {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "text_config": {"head_dim": 64}},
        {"hidden_size": 64, "num_attention_heads": 2, "head_dim": None},
        {"n_embd": 64},
    ],
)
def test_model_head_size_that_fits_or_is_not_said_passes(tmp_path: Path, tree: dict[str, Any]) -> None:
    check_model(_model(tmp_path, tree), "cpu")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_model_config_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    model = _model(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="its config.json is not a JSON object. Mend or replace the file.$"):
        check_model(model, "cpu")


@pytest.mark.engine
def test_cpu_head_sizes_are_those_of_the_installed_engine() -> None:
    cpu_attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    assert list(CPU_HEAD_SIZES) == cpu_attention.CPUAttentionBackend.get_supported_head_sizes()


# The adapters' targets.

WEIGHTS = (
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.norm",
    "lm_head",
)


def _with_weights(folder: Path, indexed: bool) -> ModelConfig:
    model = _model(folder, LLAMA)
    names = [f"{place}.weight" for place in WEIGHTS]
    if indexed:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
    else:
        save_file({name: np.zeros(1, np.float32) for name in names}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        (("query",), "query"),
        (("q_proj", "proj"), "proj"),
        (("lm_head", "embed_tokens"), "lm_head or embed_tokens"),
    ],
)
def test_lora_targets_that_name_no_module_are_told_what_there_is(
    tmp_path: Path, targets: tuple[str, ...], unknown: str, indexed: bool
) -> None:
    model = _with_weights(tmp_path / "model", indexed)
    with pytest.raises(ConfigError) as caught:
        check_lora(LoraConfig(targets=targets), model)
    assert str(caught.value) == (
        f"learner.lora.targets is {list(targets)}; no module in the layers of {model.path} is called {unknown}. "
        "Name some of q_proj, up_proj, or set all-linear."
    )


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "mlp.up_proj"), ("model.layers.0.mlp.up_proj",)])
def test_lora_targets_that_name_modules_pass(tmp_path: Path, targets: Any) -> None:
    check_lora(LoraConfig(targets=targets), _with_weights(tmp_path / "model", indexed=False))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_lora_targets_in_weights_that_are_no_file_of_weights_are_one_line(tmp_path: Path, name: str) -> None:
    model = _model(tmp_path / "model", LLAMA)
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="its weights cannot be read .* Download them again.") as caught:
        check_lora(LoraConfig(targets=("q_proj",)), model)
    assert len(str(caught.value).splitlines()) == 1


def test_lora_targets_are_left_to_set_up_where_the_weights_are_not_there(tmp_path: Path) -> None:
    check_lora(LoraConfig(targets=("query",)), _model(tmp_path / "model", LLAMA))


def test_preflight_looks_at_the_adapters_targets(tmp_path: Path) -> None:
    _with_weights(tmp_path / "model", indexed=False)
    with pytest.raises(ConfigError, match="learner.lora.targets is"):
        preflight(_config(tmp_path, learner={"lora": {"targets": ["query"]}}), resume=False)


# The data.


def test_preflight_reads_files_and_leaves_other_kinds_to_their_loading(tmp_path: Path) -> None:
    _model(tmp_path / "model", LLAMA)
    missing = {"kind": "jsonl", "path": str(tmp_path / "no.jsonl")}
    with pytest.raises(ConfigError) as caught:
        preflight(_config(tmp_path, data={"train": missing, "eval": missing}), resume=False)
    assert [line.partition(";")[0] for line in str(caught.value).splitlines()] == [
        f"data.train.path is {missing['path']}",
        f"data.eval.path is {missing['path']}",
    ]
    preflight(_config(tmp_path, data={"train": {"kind": "reasoning_gym", "task": "no_such_task"}}), resume=False)


# The run's folder.


def test_run_dir_new_or_empty_passes(tmp_path: Path) -> None:
    config = _config(tmp_path)
    check_run_dir(config.run_dir, resume=False)
    config.run_dir.mkdir()
    check_run_dir(config.run_dir, resume=False)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["metrics.jsonl"], "an unfinished"),
        (["config.yaml"], "an unfinished"),
        (["metrics.jsonl", "final/config.json"], "a finished"),
        (["final/config.json"], "a finished"),
    ],
)
def test_run_dir_that_holds_a_run_is_refused(tmp_path: Path, files: list[str], kind: str) -> None:
    config = _config(tmp_path)
    for name in files:
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.run_dir / name).write_text("{}")
    with pytest.raises(ConfigError) as caught:
        check_run_dir(config.run_dir, resume=False)
    assert str(caught.value) == (
        f"run_dir is {config.run_dir}; it already holds {kind} run. Give a new run_dir or remove it."
    )


@pytest.mark.parametrize(("interrupted", "kind"), [(False, "a finished"), (True, "an unfinished")])
def test_run_dir_with_a_summary_is_finished_unless_it_was_interrupted(
    tmp_path: Path, interrupted: bool, kind: str
) -> None:
    config = _config(tmp_path)
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").touch()
    (config.run_dir / "summary.json").write_text(json.dumps({"interrupted": interrupted}))
    with pytest.raises(ConfigError, match=f"it already holds {kind} run"):
        check_run_dir(config.run_dir, resume=False)


def test_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.run_dir.touch()
    with pytest.raises(ConfigError, match=f"^run_dir is {config.run_dir}; it is a file. Give a new run_dir.$"):
        check_run_dir(config.run_dir, resume=False)


def test_run_dir_below_a_file_is_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, run_dir=str(tmp_path / "rows.jsonl" / "run"))
    with pytest.raises(ConfigError, match=f"^run_dir is {config.run_dir}; {tmp_path / 'rows.jsonl'} is a file. Give"):
        check_run_dir(config.run_dir, resume=False)


def test_resume_names_the_newest_saved_model(tmp_path: Path) -> None:
    config = _config(tmp_path)
    opening = "--resume is given; resuming is not supported yet. Start a new run "
    with pytest.raises(ConfigError) as caught:
        check_run_dir(config.run_dir, resume=True)
    assert str(caught.value) == opening + "without --resume."
    # Newest by step, not by name; a folder that a crash left without a config is no model.
    for step in ("step_9", "step_000010", "step_000011"):
        (config.run_dir / "checkpoints" / step).mkdir(parents=True)
    for step in ("step_9", "step_000010"):
        (config.run_dir / "checkpoints" / step / "config.json").touch()
    with pytest.raises(ConfigError) as caught:
        check_run_dir(config.run_dir, resume=True)
    newest = config.run_dir / "checkpoints" / "step_000010"
    assert str(caught.value) == f"{opening}with --model.path {newest} and another --run_dir."
    _model(config.run_dir / "final", LLAMA)
    with pytest.raises(ConfigError, match=f"--model.path {config.run_dir}/final and another"):
        check_run_dir(config.run_dir, resume=True)


# All of it.


def test_preflight_right_config_passes(tmp_path: Path) -> None:
    _model(tmp_path / "model", LLAMA)
    preflight(_config(tmp_path), resume=False)


def test_preflight_reports_all_faults_one_a_line(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.run_dir.touch()
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError) as caught:
        preflight(config, resume=False)
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0] for line in lines] == ["model.path", "data.train.path", "run_dir"]


def test_preflight_head_size_counts_only_where_rollout_has_no_gpu(tmp_path: Path) -> None:
    _model(tmp_path / "model", {"hidden_size": 64, "num_attention_heads": 4})
    with pytest.raises(ConfigError, match="heads are of size 16"):
        preflight(_config(tmp_path), resume=False)
    preflight(_config(tmp_path, rollout={"gpus": 1}), resume=False)


def test_preflight_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'datasets', 'pyarrow', 'reasoning_gym'}"
    code = f"import sys, maspo_ray.preflight; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The object store.


def test_object_store_that_what_is_under_way_cannot_fit_is_refused_by_the_staleness(tmp_path: Path) -> None:
    tree = {"rollout": {"max_new_tokens": 4096, "group_size": 16}, "pipeline": {"groups_per_step": 64, "steps": 50}}
    (tmp_path / "model").mkdir()
    _model(tmp_path / "model", LLAMA)

    def check(max_staleness: int, capacity_gib: float) -> None:
        pipeline = tree["pipeline"] | {"max_staleness": max_staleness}
        learner = {"max_tokens_per_micro_batch": 8192}
        config = _config(tmp_path, **(tree | {"pipeline": pipeline, "learner": learner}))
        check_object_store(config, capacity_gib * 2**30)

    # A group is 16 · 4096 tokens of 16 bytes, 1 MiB; 64 of them and η = 1 are 128 MiB.
    check(1, 0.125)
    with pytest.raises(ConfigError) as caught:
        check(2, 0.125)
    assert str(caught.value) == (
        "pipeline.max_staleness is 2; so 192 groups may be under way at once, up to 0.188 GiB of tokens and log-probs, more than the "
        "object store's 0.125 GiB. Lower it, or raise placement.object_store_gib (of a cluster: what `ray start` gives it)."
    )
    # No more than the run's 50 steps are ever admitted: 3200 MiB.
    check(10_000, 3.125)
