"""The config: flags go over the file, kinds decide which keys there are, and every fault is one line with its remedy."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from maspo_ray.config import (
    ConfigError,
    CsvSource,
    GrpoConfig,
    HuggingFaceSource,
    JsonlSource,
    LearnerConfig,
    MaspoConfig,
    MixSource,
    OverlongConfig,
    ParquetSource,
    ReasoningGymSource,
    RolloutConfig,
    RunConfig,
    SamplerConfig,
    load_config,
)
from maspo_ray.config.faults import field_paths

TREE: dict[str, Any] = {
    "model": {"path": "org/model"},
    "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "max_prompt_tokens": 8},
    "rollout": {"max_new_tokens": 8},
}

MIX: dict[str, Any] = {
    "kind": "mix",
    "sources": {"a": {"kind": "csv", "path": "a.csv"}, "b": {"kind": "parquet", "path": "b/*.parquet", "limit": 5}},
}


def _merged(tree: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree with keys such as `{"rollout.group_size": 1}` set in it."""
    tree = copy.deepcopy(tree)
    for path, value in keys.items():
        *sections, name = path.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return tree


def _load(folder: Path, keys: dict[str, Any] | None = None, *flags: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(_merged(TREE, keys or {})))
    return load_config(file, flags)


def _fault(folder: Path, keys: dict[str, Any] | None = None, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(folder, keys, *flags)
    return str(caught.value)


# Where a value comes from.


def test_load_file_alone_fills_the_rest_with_defaults(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert (config.model.path, config.data.train) == ("org/model", JsonlSource(path=Path("rows.jsonl")))
    assert (config.rollout.max_new_tokens, config.rollout.group_size, config.objective) == (8, 8, MaspoConfig())


def test_load_flag_goes_over_the_file_and_leaves_its_other_keys(tmp_path: Path) -> None:
    config = _load(tmp_path, {"rollout.group_size": 4, "rollout.temperature": 0.7}, "--rollout.group_size", "6")
    assert (config.rollout.group_size, config.rollout.temperature, config.rollout.max_new_tokens) == (6, 0.7, 8)


def test_load_flag_forms_are_equal_and_the_last_counts(tmp_path: Path) -> None:
    assert _load(tmp_path, {}, "--seed=4").seed == 4
    assert _load(tmp_path, {}, "--seed", "3", "--seed", "5").seed == 5
    whole_section = _load(tmp_path, {}, "--rollout", '{"temperature": 0.5}').rollout
    assert (whole_section.temperature, whole_section.max_new_tokens) == (0.5, 8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    in_file=st.none() | st.floats(1e-3, 2.0),
    in_flag=st.none() | st.floats(1e-3, 2.0),
    seed=st.integers(0, 2**31 - 1),
    shuffle=st.booleans(),
    args=st.dictionaries(st.text("abc_", min_size=1, max_size=4), st.none() | st.integers() | st.text("xyz ")),
)
def test_load_any_values_come_out_as_they_went_in(
    tmp_path: Path, in_file: float | None, in_flag: float | None, seed: int, shuffle: bool, args: dict[str, Any]
) -> None:
    keys = {} if in_file is None else {"rollout.temperature": in_file}
    flags = [] if in_flag is None else ["--rollout.temperature", repr(in_flag)]
    flags += ["--seed", str(seed), "--data.shuffle", str(shuffle).lower(), "--rollout.args", json.dumps(args)]
    config = _load(tmp_path, keys, *flags)
    expected = in_flag if in_flag is not None else in_file if in_file is not None else 1.0
    assert (config.rollout.temperature, config.seed, config.data.shuffle) == (expected, seed, shuffle)
    assert config.rollout.args == args


def test_load_environment_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEED", "seed", "MASPO_SEED"):
        monkeypatch.setenv(name, "7")
    assert _load(tmp_path).seed == 0


def test_load_resolved_config_loads_again_as_itself(tmp_path: Path) -> None:
    config = _load(tmp_path, {"objective.kind": "grpo", "data.eval": {"kind": "reasoning_gym", "task": "gcd"}})
    file = tmp_path / "resolved.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(file) == config
    assert type(config) is RunConfig


# Kinds.


def test_objective_without_kind_is_maspo(tmp_path: Path) -> None:
    assert _load(tmp_path, {}, "--objective.alpha", "0.5").objective == MaspoConfig(alpha=0.5)
    assert _load(tmp_path, {"objective.beta_pos": 0.1}, "--objective.alpha", "0.5").objective == MaspoConfig(
        alpha=0.5, beta_pos=0.1
    )


def test_objective_kind_decides_the_keys(tmp_path: Path) -> None:
    grpo = {"objective.kind": "grpo"}
    assert _load(tmp_path, grpo, "--objective.epsilon", "0.1").objective == GrpoConfig(epsilon=0.1)
    flags = ("--objective.kind", "grpo", "--objective.epsilon", "0.3")
    assert _load(tmp_path, {}, *flags).objective == GrpoConfig(epsilon=0.3)
    fault = _fault(tmp_path, grpo, "--objective.alpha", "0.1")
    assert fault.startswith("objective.alpha is '0.1'; another kind has this key. Set objective.kind to that one,")


def test_data_kind_decides_the_source(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        {"data.train": {"kind": "huggingface", "name": "org/data"}, "data.eval": {"kind": "reasoning_gym", "task": "gcd"}},
        "--data.eval.size",
        "20",
    )  # fmt: skip
    assert config.data.train == HuggingFaceSource(name="org/data")
    assert config.data.eval == ReasoningGymSource(task="gcd", size=20)


def test_data_mix_has_sources_of_any_kind_and_weights(tmp_path: Path) -> None:
    config = _load(tmp_path, {"data.train": MIX | {"weights": {"b": 0.5}}}, "--data.train.weights", '{"a": 3}')
    train = config.data.train
    assert isinstance(train, MixSource)
    assert train.sources == {"a": CsvSource(path=Path("a.csv")), "b": ParquetSource(path=Path("b/*.parquet"), limit=5)}
    # The flag adds to what the file says, as one of a section does.
    assert (train.weight("a"), train.weight("b")) == (3.0, 0.5)
    assert _load(tmp_path, {"data.train": MIX}).data.train.weight("a") == 1.0  # type: ignore[union-attr]
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_overlong_is_off_unless_set_and_a_flag_is_enough(tmp_path: Path) -> None:
    assert _load(tmp_path).reward.overlong is None and not _load(tmp_path).pipeline.filter_overlong
    flags = ("--reward.overlong.buffer_tokens", "7", "--pipeline.filter_overlong", "true")
    config = _load(tmp_path, {}, *flags)
    assert config.reward.overlong == OverlongConfig(buffer_tokens=7, penalty=1.0) and config.pipeline.filter_overlong
    assert _load(tmp_path, {"reward.overlong": None}).reward.overlong is None


def test_sampler_is_uniform_unless_named_and_its_args_can_be_given_as_a_flag(tmp_path: Path) -> None:
    assert _load(tmp_path).data.sampler == SamplerConfig(path="maspo_ray.data.samplers:UniformSampler", args={})
    flags = ("--data.sampler.path", "my_samplers:S", "--data.sampler.args", '{"decay": 0.5}')
    assert _load(tmp_path, {}, *flags).data.sampler == SamplerConfig(path="my_samplers:S", args={"decay": 0.5})


# What follows from other keys.


def test_max_model_tokens_is_prompt_and_completion_unless_set(tmp_path: Path) -> None:
    assert _load(tmp_path).max_model_tokens == 8 + 8
    assert _load(tmp_path, {"rollout.max_model_tokens": 12}).max_model_tokens == 12


def test_micro_batch_that_holds_just_one_longest_sequence_is_enough(tmp_path: Path) -> None:
    assert _load(tmp_path, {"learner.max_tokens_per_micro_batch": 16}).max_model_tokens == 16


@given(batch=st.integers(1, 64), updates=st.integers(1, 9), ranks=st.integers(1, 9))
def test_batch_and_updates_fit_exactly_if_they_divide_whatever_the_ranks(batch: int, updates: int, ranks: int) -> None:
    tree = _merged(
        TREE,
        {"pipeline.groups_per_step": batch, "learner.updates_per_batch": updates, "learner.replicas": ranks},
    )
    if batch % updates == 0:
        assert RunConfig.model_validate(tree).pipeline.groups_per_step == batch
        return
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(tree)
    proposed = int(str(caught.value).split("Set it to ")[1].split(".")[0])
    # The remedy is the next batch that divides.
    assert proposed % updates == 0 and batch < proposed < batch + updates


# Faults: one line each; field, value, rule, remedy.


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"rollout.temprature": 1}, "rollout.temprature is 1; there is no such key. Did you mean rollout.temperature?"),
        ({"rolout": {}}, "rolout is {}; there is no such key. Did you mean rollout?"),
        ({"qqqq": 1}, "qqqq is 1; there is no such key. Remove it."),
        ({"pipeline.steps": "many"}, "pipeline.steps is 'many'; input should be a valid integer"),
        ({"pipeline.steps": 1.5}, "pipeline.steps is 1.5; input should be a valid integer"),
        ({"data.chat_template": "maybe"}, "data.chat_template is 'maybe'; input should be a valid boolean"),
        ({"rollout": 5}, "rollout is 5; input should be a valid dictionary"),
        ({"rollout": None}, "rollout is None; input should be a valid dictionary"),
        ({"model.dtype": "fp8"}, "model.dtype is 'fp8'; input should be 'float32' or 'bfloat16'. Change model.dtype."),
        ({"learner.lr": float("inf")}, "learner.lr is inf; input should be a finite number. Change learner.lr."),
        ({"learner.lr": 0}, "learner.lr is 0; input should be greater than 0. Change learner.lr."),
        ({"learner.betas": [0.9]}, "learner.betas.1 is not set; it is required. Add it to the config."),
        ({"model": {}}, "model.path is not set; it is required. Add it to the config."),
        ({"data.train": {"kind": "jsonl"}}, "data.train.path is not set; it is required. Add it to the config."),
        ({"data.train": {"path": "x"}}, "data.train.kind is not set; it must be one of 'jsonl', 'json', 'csv', 'parquet', 'saved', 'huggingface', 'reasoning_gym', 'mix'."),
        ({"data.train.kind": "xml"}, "data.train.kind is xml; it must be one of 'jsonl', 'json', 'csv', 'parquet', 'saved', 'huggingface', 'reasoning_gym', 'mix'."),
        ({"data.eval": {"kind": "mix", "sources": {"a": {"kind": "csv", "path": "x"}}}}, "data.eval.kind is mix; it must be one of 'jsonl', 'json', 'csv', 'parquet', 'saved', 'huggingface', 'reasoning_gym'."),
        ({"data.train": {"kind": "mix", "sources": {}}}, "data.train.sources is {}; dictionary should have at least 1 item"),
        ({"data.train": MIX | {"weights": {"c": 1}}}, "data.train.weights.c is 1.0; there is no source c (there are a, b). Remove it."),
        ({"data.train": MIX | {"weights": {"b": 0}}}, "data.train.weights.b is 0.0; it must be above 0. Raise it, or remove the source."),
        ({"data.train": {"kind": "mix", "sources": {"a b": {"kind": "csv", "path": "x"}}}}, "data.train.sources is"),
        ({"data.train": {"kind": "mix", "sources": {"a": {"kind": "csv"}}}}, "data.train.sources.a.path is not set; it is required. Add it to the config."),
        ({"data.train": {"kind": "csv", "path": "x", "list_key": "y"}}, "data.train.list_key is 'y'; another kind has this key."),
        ({"objective.kind": "ppo"}, "objective.kind is ppo; it must be one of 'maspo', 'grpo'. Set it."),
        ({"objective.epsilon": 0.2}, "objective.epsilon is 0.2; another kind has this key. Set objective.kind to that one,"),
        ({"rollout.temperature": 0}, "rollout.temperature is 0; a greedy policy has no log-probs to learn from, so it must be above 0. Set it to 1.0."),
        ({"rollout.temperature": float("nan")}, "rollout.temperature is nan; input should be a finite number."),
        ({"seed": 2**31}, "seed is 2147483648; input should be less than 2147483648. Change seed."),
        ({"data.train": {"kind": "reasoning_gym", "task": "gcd", "seed": -1}}, "data.train.seed is -1; input should be greater than or equal to 0. Change data.train.seed."),
        ({"rollout.group_size": 1}, "rollout.group_size is 1; the grpo advantage compares the completions of a group, so it needs at least 2. Set rollout.group_size to 2 or more."),
        ({"rollout.group_size": 1, "advantage.kind": "rloo"}, "rollout.group_size is 1; the rloo advantage"),
        ({"pipeline.max_staleness": -1}, "pipeline.max_staleness is -1; input should be greater than or equal to 0. Change pipeline.max_staleness."),
        ({"learner.updates_per_batch": 3}, "pipeline.groups_per_step is 16; it must divide by learner.updates_per_batch (3). Set it to 18."),
        ({"rollout.replicas": 2, "rollout.per_node": 1}, "rollout.replicas is 2 and per_node is 1; only one of them counts. Remove one."),
        ({"rollout.replicas": 0}, "rollout.replicas is 0; input should be greater than or equal to 1."),
        ({"rollout.gpus": 1.5}, "rollout.gpus is 1.5; above 1 a number of GPUs must be whole. Set a whole number or a fraction below 1."),
        ({"learner.deepspeed": {"optimizer": {}}}, "learner.deepspeed is {'optimizer': {}}; optimizer follow from the learner and model sections. Remove from learner.deepspeed."),
        ({"learner.deepspeed": {"zero_optimization": {"stage": 3}}}, "learner.deepspeed is {'zero_optimization': {'stage': 3}}; zero_optimization.stage follow"),
        ({"learner.deepspeed": {"zero_optimization": 3}}, "learner.deepspeed is {'zero_optimization': 3}; its zero_optimization must be a section of keys."),
        ({"learner.zero_stage": 0, "learner.deepspeed": {"zero_optimization": {}}}, "learner.zero_stage is 0; learner.deepspeed has a zero_optimization, which is without effect there. Set zero_stage to 1."),
        ({"learner.zero_stage": 0}, "learner.zero_stage is 0; there gradients of model.dtype bfloat16 would be added up in bfloat16. Set learner.zero_stage to 1."),
        ({"learner.lora": {"rank": 0}}, "learner.lora.rank is 0; input should be greater than or equal to 1."),
        ({"learner.lora": {"targets": []}}, "learner.lora.targets is []; tuple should have at least 1 item after validation, not 0."),
        ({"learner.lora": {"targets": ["all-linear", "lm_head"]}}, "learner.lora.targets is ['all-linear', 'lm_head']; all-linear stands for every linear module. Name it alone, or remove it."),
        ({"learner.max_tokens_per_micro_batch": 15}, "learner.max_tokens_per_micro_batch is 15; one sequence may have 16 tokens. Set it to at least 16."),
        ({"rollout.max_model_tokens": 8}, "rollout.max_new_tokens is 8; it must leave room for a prompt within rollout.max_model_tokens (8). Lower it."),
        ({"rollout.max_model_tokens": 10, "data.max_prompt_tokens": 10}, "data.max_prompt_tokens is 10; a prompt so long would leave no room for a completion within rollout.max_model_tokens (10). Lower it."),
        ({"rollout.min_new_tokens": 9}, "rollout.min_new_tokens is 9; it may be at most rollout.max_new_tokens (8). Lower it."),
        ({"eval.min_new_tokens": 9}, "eval.min_new_tokens is 9; it may be at most rollout.max_new_tokens (8). Lower it."),
        ({"eval.samples": 4, "eval.temperature": 0}, "eval.samples is 4; where temperature is 0 they are all the same. Set it to 1."),
        ({"eval.samples": 4, "eval.top_k": 1}, "eval.samples is 4; where top_k is 1 they are all the same. Set it to 1."),
        ({"rollout.top_k": 1}, "rollout.top_k is 1; completions of a group would all be the same. Set it to 2 or more, or remove it."),
        ({"data.chat_template": False, "data.system_prompt": "x"}, "data.system_prompt is set; it needs data.chat_template."),
        ({"objective.sigma_max": 0.5}, "objective.sigma_max is 0.5; it must be at least sigma_base (1.0). Raise it."),
        ({"objective.risk_min": 20}, "objective.risk_max is 10.0; it must be at least risk_min (20.0). Raise it."),
        ({"reward.overlong": {}}, "reward.overlong.buffer_tokens is not set; it is required. Add it to the config."),
        ({"reward.overlong": {"buffer_tokens": 0}}, "reward.overlong.buffer_tokens is 0; input should be greater than or equal to 1."),
        ({"reward.overlong": {"buffer_tokens": 8}}, "reward.overlong.buffer_tokens is 8; it must be below rollout.max_new_tokens (8). Lower it."),
        ({"reward.overlong": {"buffer_tokens": 4, "penalty": 0}}, "reward.overlong.penalty is 0; input should be greater than 0."),
        ({"reward.max_error_rate": 1.5}, "reward.max_error_rate is 1.5; input should be less than or equal to 1."),
    ],
)  # fmt: skip
def test_load_fault_in_the_file_is_one_line_with_field_value_rule_and_remedy(
    tmp_path: Path, keys: dict[str, Any], fault: str
) -> None:
    said = _fault(tmp_path, keys)
    assert said.startswith(fault)
    assert len(said.splitlines()) == 1
    assert said.endswith((".", "?"))


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--rollout.temprature", "1"], "--rollout.temprature is given; there is no such key. Did you mean rollout.temperature?"),
        (["--rollout.temprature=1"], "--rollout.temprature is given; there is no such key. Did you mean rollout.temperature?"),
        (["--rollout.group", "4"], "--rollout.group is given; there is no such key. Did you mean rollout.group_size?"),
        (["extra"], "extra is given; there is no such key. Remove it."),
        (["--seed"], "--seed is given without a value; a flag needs one. Write --seed VALUE."),
        (["--objective.alpha", "x"], "objective.alpha is 'x'; input should be a valid number"),
        (["--rollout.temperature", "0"], "rollout.temperature is '0'; a greedy policy has no log-probs"),
        (["--pipeline.max_staleness", "-1"], "pipeline.max_staleness is '-1'; input should be greater than or equal to 0."),
        (["--rollout.group_size", "1"], "rollout.group_size is 1; the grpo advantage"),
    ],
)  # fmt: skip
def test_load_fault_in_a_flag_is_one_line_with_field_value_rule_and_remedy(
    tmp_path: Path, flags: list[str], fault: str
) -> None:
    said = _fault(tmp_path, {}, *flags)
    assert said.startswith(fault)
    assert len(said.splitlines()) == 1


def test_load_several_faults_have_a_line_each(tmp_path: Path) -> None:
    keys = {"rollout.temperature": 0, "pipeline.max_staleness": -1, "learner.lrr": 1}
    assert [line.split(" is ")[0] for line in _fault(tmp_path, keys).splitlines()] == [
        "rollout.temperature",
        "learner.lrr",
        "pipeline.max_staleness",
    ]


# A key given twice.


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        # A whole section, as it happens when a block is pasted in.
        ("rollout: {group_size: 4}\nseed: 1\nrollout: {temperature: 0.7}\n", ["rollout is given twice (lines 1 and 3 of"]),
        ("learner:\n  lr: 1.0e-6\n  betas: [0.9, 0.95]\n  lr: 2.0e-6\n", ["learner.lr is given twice (lines 2 and 4 of"]),
        ("rollout: {engine: {block_size: 16, block_size: 32}}\n", ["rollout.engine.block_size is given twice (lines 1 and 1 of"]),
        ("learner: {lora: {targets: [{a: 1, a: 2}]}}\n", ["learner.lora.targets.0.a is given twice (lines 1 and 1 of"]),
        # The same value is two all the same, and quotes make no other key of it.
        ("seed: 1\n'seed': 1\n", ["seed is given twice (lines 1 and 2 of"]),
        ("seed: 1\nrun_dir: a\nseed: 2\nrun_dir: b\n", ["seed is given twice (lines 1 and 3", "run_dir is given twice (lines 2 and 4"]),
    ],
)  # fmt: skip
def test_load_key_that_a_file_gives_twice_is_named_with_both_lines(
    tmp_path: Path, text: str, faults: list[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert [line[: len(fault)] for line, fault in zip(lines, faults, strict=True)] == faults
    assert all(line.endswith(f"{file}); only the last would count. Put both into one.") for line in lines)


def test_load_key_over_that_of_a_merge_and_an_alias_given_often_are_no_key_given_twice(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = yaml.safe_dump(TREE) + "reward: &role {cpus: 0.5, timeout_s: 9}\nreference: {<<: *role, timeout_s: 8}\n"
    file.write_text(text)
    config = load_config(file)
    assert (config.reward.timeout_s, config.reference.timeout_s, config.reference.cpus) == (9, 8, 0.5)


def test_load_search_for_keys_given_twice_ends_in_a_section_that_holds_itself(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(TREE) + "reward: &r\n  args: *r\n")
    assert load_config(file).reward.args.keys() == {"args"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "1", "--seed", "2"],
        ["--seed=1", "--learner.lr", "1e-5", "--seed", "2"],
        ["--seed=1", "--seed=2"],
    ],
)
def test_load_flag_given_twice_counts_as_the_last_and_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: list[str]
) -> None:
    assert _load(tmp_path, {}, *flags).seed == 2
    assert caplog.messages == ["--seed is given as 1 and as 2; the last counts."]


def test_load_flags_of_lists_and_dictionaries_add_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = ("--rollout.engine", '{"block_size": 16}', "--rollout.engine", '{"max_num_batched_tokens": 512}')
    config = _load(tmp_path, {}, *engine, "--learner.betas", "0.8", "--learner.betas", "0.9")
    assert config.rollout.engine == {"block_size": 16, "max_num_batched_tokens": 512}
    assert config.learner.betas == (0.8, 0.9)
    assert caplog.messages == []


@pytest.mark.parametrize("key", sorted(LearnerConfig.owned_deepspeed_keys))
def test_deepspeed_key_that_a_section_owns_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} follow from the learner and model sections"):
        LearnerConfig(deepspeed={key: 1})


@pytest.mark.parametrize("key", sorted(RolloutConfig.owned_engine_keys))
def test_engine_key_that_a_section_owns_is_refused(tmp_path: Path, key: str) -> None:
    fault = _fault(tmp_path, {"rollout.engine": {key: 2, "gpu_memory_utilization": 0.8}})
    assert fault.startswith("rollout.engine is {'")
    assert f"; {key} follow from the model and rollout sections" in fault
    assert fault.endswith("Remove from rollout.engine.")


def test_deepspeed_other_keys_pass_through() -> None:
    given = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    assert LearnerConfig(deepspeed=given).deepspeed == given


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(path=st.sampled_from(sorted(set(field_paths(RunConfig)))), at=st.integers(0, 100))
def test_load_misspelt_key_is_told_the_right_one(tmp_path: Path, path: str, at: int) -> None:
    section, _, name = path.rpartition(".")
    at %= len(name)
    misspelt = f"{section}.{name[:at]}{name[at]}{name[at:]}".lstrip(".")
    assert _fault(tmp_path, {}, f"--{misspelt}", "1") == (
        f"--{misspelt} is given; there is no such key. Did you mean {path}?"
    )


# The file itself.


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("model: [", "it is not YAML (line 1). Mend the file."),
        ("model:\n  path: a: b\n", "it is not YAML (line 2). Mend the file."),
        ("", "it must hold sections such as `model:`. Mend the file."),
        ("- a\n", "it must hold sections such as `model:`. Mend the file."),
        ("1: 2\n", "it must hold sections such as `model:`. Mend the file."),
    ],
)
def test_load_file_that_holds_no_sections_is_refused(tmp_path: Path, content: str, rule: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"config is {file}; {rule}"


def test_load_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert str(caught.value) == f"config is {file}; it is not YAML. Mend the file."


def test_load_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "no.yaml")
    assert (
        str(caught.value) == f"config is {tmp_path / 'no.yaml'}; there is no such file. Give the path of a YAML file."
    )


# What has been loaded.


@pytest.mark.parametrize("section", [name for name in RunConfig.model_fields if name not in ("seed", "run_dir")])
def test_config_is_frozen_in_every_section(section: str) -> None:
    config = RunConfig.model_validate(_merged(TREE, {"data.eval": {"kind": "reasoning_gym", "task": "gcd"}}))
    part = getattr(config, section)
    field = next(iter(type(part).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(part, field, getattr(part, field))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
