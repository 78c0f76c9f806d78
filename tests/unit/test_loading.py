"""Dotted paths: what is loaded keeps its role's protocol; what is not there, or does not, is named."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maspo_ray.config import DataConfig, PipelineConfig, RewardConfig, RunConfig
from maspo_ray.data.samplers import PassRateSampler, UniformSampler
from maspo_ray.errors import ConfigError
from maspo_ray.fleet.loading import (
    PROTOCOLS,
    load_actor_class,
    load_answer_check,
    load_classes,
    load_late_policy,
    load_role,
    load_sampler,
    protocol_methods,
)
from maspo_ray.groups.late_policy import DropStale, TrainStale
from maspo_ray.protocols import AnswerCheck, LatePolicy, Sampler

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Write:
    """Writes a user's module, importable for this test; returns its name."""
    name = f"user_module_{abs(hash(request.node.name))}"
    monkeypatch.syspath_prepend(tmp_path)
    request.addfinalizer(lambda: sys.modules.pop(name, None))

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def _fault(role: str, dotted_path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_actor_class(role, dotted_path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# What loads.


@pytest.mark.parametrize(
    ("role", "dotted_path"),
    [
        ("rollout", "actors.vllm_rollout:VLLMRollout"),
        ("reference", "actors.hf_reference:HFReference"),
        ("learner", "actors.deepspeed_learner:DeepSpeedLearner"),
        ("reward", "actors.rewards.exact_match:ExactMatchReward"),
        ("reward", "actors.rewards.math_verify:MathVerifyReward"),
        ("reward", "actors.rewards.reasoning_gym:ReasoningGymReward"),
    ],
)
def test_load_built_in_actor_keeps_its_protocol(role: str, dotted_path: str) -> None:
    assert load_actor_class(role, dotted_path).__name__ == dotted_path.partition(":")[2]


@pytest.mark.parametrize(
    "method",
    [
        "def score(self, prompt, completions): ...",
        "async def score(self, prompt, completions): ...",
        "def score(self, p, c, limit=3): ...",
        "def score(self, *everything): ...",
    ],
)
def test_load_reward_of_the_users_own_in_any_signature_that_can_be_called(write: Write, method: str) -> None:
    module = write(f"class R:\n    {method}\n")
    assert load_actor_class("reward", f"{module}:R").__module__ == module


def test_load_inherited_method_counts(write: Write) -> None:
    module = write("class Base:\n    def score(self, prompt, completions): ...\nclass R(Base): ...\n")
    assert load_actor_class("reward", f"{module}:R").__name__ == "R"


def test_load_finds_a_module_in_the_folder_that_the_run_is_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_config.py").write_text("class R:\n    def score(self, prompt, completions): ...\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    try:
        assert load_actor_class("reward", "beside_the_config:R").__name__ == "R"
    finally:
        sys.modules.pop("beside_the_config", None)


@pytest.mark.parametrize(("coef", "roles"), [(0.0, {"rollout", "reward", "learner"}), (0.1, set(PROTOCOLS))])
def test_load_classes_has_a_reference_only_with_kl(coef: float, roles: set[str]) -> None:
    tree = {
        "model": {"path": "org/model"},
        "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}},
        "kl": {"coef": coef},
        # Never looked at without KL.
        "reference": {"actor": "actors.hf_reference:HFReference" if coef else "no.such:Reference"},
    }
    assert set(load_classes(RunConfig.model_validate(tree))) == roles


# What does not.


@pytest.mark.parametrize("dotted_path", ["my_rewards.Reward", "my_rewards:", ":Reward", ""])
def test_load_path_without_module_and_class_is_refused(dotted_path: str) -> None:
    assert _fault("reward", dotted_path) == f"reward.actor is {dotted_path}; it must read module:Class. Write it so."


@pytest.mark.parametrize(
    ("dotted_path", "missing"),
    [
        ("no_such_module:R", "no_such_module"),
        ("actors.no_such:R", "actors.no_such"),
        ("no_such_module.inner:R", "no_such_module"),
    ],
)
def test_load_missing_module_is_named(dotted_path: str, missing: str) -> None:
    assert _fault("learner", dotted_path) == (
        f"learner.actor is {dotted_path}; there is no module {missing}. "
        "Run from the folder that holds it, or put it on PYTHONPATH."
    )


def test_load_module_that_imports_what_is_not_installed_names_that(write: Write) -> None:
    module = write("import no_such_library\nclass R: ...\n")
    assert _fault("reward", f"{module}:R") == (
        f"reward.actor is {module}:R; importing it fails: No module named 'no_such_library'. Install what it imports."
    )


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class R(", "SyntaxError: '(' was never closed"),
        ("from json import no_such_name", "ImportError: cannot import name 'no_such_name'"),
    ],
)
def test_load_module_that_fails_is_one_line_with_the_cause(write: Write, source: str, cause: str) -> None:
    module = write(source)
    fault = _fault("reward", f"{module}:R")
    assert fault.startswith(f"reward.actor is {module}:R; importing it fails: {cause}")
    assert fault.endswith("Mend the module.")


@pytest.mark.parametrize("source", ["", "R = 3", "def R(): ...", "r = 1\nclass Reward: ..."])
def test_load_module_without_the_class_is_named(write: Write, source: str) -> None:
    module = write(source)
    assert _fault("reward", f"{module}:R") == (
        f"reward.actor is {module}:R; module {module} has no class R. Name one that it has."
    )


@pytest.mark.parametrize(
    ("role", "method"), [(role, name) for role, protocol in PROTOCOLS.items() for name in protocol_methods(protocol)]
)
def test_load_class_that_lacks_a_method_is_told_which(write: Write, role: str, method: str) -> None:
    protocol = PROTOCOLS[role]
    others = "".join(f"    {name} = P.{name}\n" for name in protocol_methods(protocol) if name != method)
    module = write(f"from maspo_ray.protocols import {protocol.__name__} as P\nclass A:\n    x = 0\n{others}")
    fault = _fault(role, f"{module}:A")
    assert fault.startswith(
        f"{role}.actor is {module}:A; the class has no method {method}, which {protocol.__name__} needs. Add {method}(self"
    )


@pytest.mark.parametrize(
    "method", ["def score(self, prompt): ...", "def score(self, prompt, completions, *, limit): ...", "score = 3"]
)
def test_load_method_that_cannot_be_called_is_refused(write: Write, method: str) -> None:
    module = write(f"class R:\n    {method}\n")
    fault = _fault("reward", f"{module}:R")
    if method == "score = 3":
        assert "the class has no method score" in fault
    else:
        assert "cannot be called as RewardActor says. Give it the signature score(self, prompt" in fault


def test_load_method_without_a_keyword_that_the_framework_passes_is_refused(write: Write) -> None:
    module = write(
        "from maspo_ray.protocols import RolloutEngine as P\n"
        "class A:\n"
        + "".join(f"    {name} = P.{name}\n" for name in protocol_methods(PROTOCOLS["rollout"]) if name != "sample")
        + "    async def sample(self, token_ids, *, sampling, seed): ...\n"
    )
    assert "its method sample(self, token_ids, *, sampling, seed) cannot be called" in _fault("rollout", f"{module}:A")


# Samplers.

METHODS = """
    def next(self): return 0
    def observe(self, index, pass_rate): ...
    def state(self): return {}
    def restore(self, state): ...
"""


def _load_sampler(path: str | None = None, **args: object) -> Sampler:
    section = {} if path is None else {"sampler": {"path": path, "args": args}}
    data = DataConfig.model_validate({"train": {"kind": "jsonl", "path": "rows.jsonl"}, **section})
    return load_sampler(data, seed=3)(5)


def _sampler_fault(path: str, **args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        _load_sampler(path, **args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_load_sampler_is_uniform_unless_named_and_has_the_datas_seed_and_shuffle() -> None:
    sampler, expected = _load_sampler(), UniformSampler(5, shuffle=True, seed=3)
    assert isinstance(sampler, UniformSampler)
    assert [sampler.next() for _ in range(10)] == [expected.next() for _ in range(10)]
    assert isinstance(_load_sampler("maspo_ray.data.samplers:PassRateSampler", decay=0.9), PassRateSampler)


def test_load_sampler_of_the_users_own_receives_its_args(write: Write) -> None:
    constructor = (
        "    def __init__(self, num_prompts, shuffle, seed, step): self.given = num_prompts, shuffle, seed, step\n"
    )
    module = write(f"class S:\n{constructor}{METHODS}")
    assert vars(_load_sampler(f"{module}:S", step=2))["given"] == (5, True, 3, 2)


def test_load_sampler_faults_name_the_field() -> None:
    path = "data.sampler.path is no_such:S; there is no module no_such."
    assert _sampler_fault("no_such:S").startswith(path)
    assert _sampler_fault("maspo_ray.data.samplers:Uniform") == (
        "data.sampler.path is maspo_ray.data.samplers:Uniform; module maspo_ray.data.samplers has no class Uniform. Name one that it has."
    )


def test_load_sampler_that_lacks_a_method_is_told_which(write: Write) -> None:
    module = write(f"class S:\n{METHODS.replace('observe', 'see')}")
    assert _sampler_fault(f"{module}:S").startswith(
        f"data.sampler.path is {module}:S; the class has no method observe, which Sampler needs. Add observe(self"
    )


def test_load_sampler_wrong_args_are_answered_before_a_sampler_is_made(write: Write) -> None:
    path = "maspo_ray.data.samplers:PassRateSampler"
    assert _sampler_fault(path, decay=2) == (
        "data.sampler.args.decay is 2; it must be at least 0 and below 1. Set it to 0.5."
    )
    assert _sampler_fault(path, decy=0.5) == (
        "data.sampler.args.decy is 0.5; PassRateSampler takes no such argument. Did you mean decay?"
    )
    fault = _sampler_fault(path, decay="half")
    assert fault.startswith("data.sampler.args is {'decay': 'half'}; PassRateSampler does not take it (TypeError: ")
    data = DataConfig.model_validate(
        {"train": {"kind": "jsonl", "path": "x"}, "sampler": {"path": path, "args": {"floor": 0}}}
    )
    with pytest.raises(ConfigError, match="^data.sampler.args.floor is 0"):
        load_sampler(data, seed=0)


# What decides about late groups.


def _load_late_policy(path: str | None = None, **args: object) -> LatePolicy:
    section = {} if path is None else {"late_policy": {"path": path, "args": args}}
    return load_late_policy(PipelineConfig.model_validate({"max_staleness": 2, **section}))


def test_load_late_policy_drops_unless_another_is_named_and_knows_the_bound() -> None:
    strict, late = _load_late_policy(), _load_late_policy("maspo_ray.groups.late_policy:TrainStale", max_lag=5)
    assert isinstance(strict, DropStale) and isinstance(late, TrainStale)
    assert (strict.oldest_version(9), late.oldest_version(9)) == (9 - 2, 9 - 5)


def test_load_late_policy_of_the_users_own_receives_its_args(write: Write) -> None:
    module = write(
        "class D:\n"
        "    def __init__(self, max_staleness, odd): self.given = max_staleness, odd\n"
        "    def oldest_version(self, version): return 0\n"
        "    def judge(self, experience, version): return None\n"
    )
    assert vars(_load_late_policy(f"{module}:D", odd=True))["given"] == (2, True)


@pytest.mark.parametrize(
    ("path", "args", "fault"),
    [
        ("no_such:D", {}, "pipeline.late_policy.path is no_such:D; there is no module no_such."),
        (
            "maspo_ray.data.samplers:UniformSampler",
            {},
            "the class has no method oldest_version, which LatePolicy needs.",
        ),
        (
            "maspo_ray.groups.late_policy:TrainStale",
            {},
            "pipeline.late_policy.args is {}; TrainStale needs max_lag too. Add it.",
        ),
    ],
)
def test_load_late_policy_faults_name_the_field(path: str, args: dict[str, object], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _load_late_policy(path, **args)
    assert fault in str(caught.value) and len(str(caught.value).splitlines()) == 1


# What a class is made with.

CONSTRUCTOR = {
    "rollout": "model, rollout, max_model_tokens, threads, seed",
    "reward": "",
    "reference": "model, temperature, threads",
    "learner": "model, learner, objective, kl, temperature, total_updates, rank, world_size, threads, seed",
}
"""As the protocols' docstrings say."""


def _config(**sections: Any) -> RunConfig:
    tree = {"model": {"path": "org/model"}, "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}}}
    return RunConfig.model_validate({**tree, "kl": {"coef": 0.1}, **sections})


def _class_of(role: str, constructor: str) -> str:
    """Returns the source of a class `A` of a role with a constructor of so many parameters."""
    protocol = PROTOCOLS[role]
    methods = "".join(f"    {name} = P.{name}\n" for name in protocol_methods(protocol))
    return (
        f"from maspo_ray.protocols import {protocol.__name__} as P\n"
        f"class A:\n    def __init__(self, {constructor}): ...\n{methods}"
    )


def _role_fault(config: RunConfig, role: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_role(config, role)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("role", PROTOCOLS)
def test_load_class_of_every_role_may_have_arguments_of_its_own(write: Write, role: str) -> None:
    module = write(_class_of(role, f"{CONSTRUCTOR[role]}{', ' if CONSTRUCTOR[role] else ''}words, limit=3"))
    section = {"actor": f"{module}:A", "args": {"words": 2}}
    assert load_role(_config(**{role: section}), role).__name__ == "A"
    faults = {
        "wrods": f"{role}.args.wrods is 2; A takes no such argument. Did you mean words?",
        "xyz": f"{role}.args.xyz is 2; A takes no such argument. Remove it; it takes limit, words.",
    }
    for name, fault in faults.items():
        assert _role_fault(_config(**{role: section | {"args": {name: 2}}}), role) == fault
    assert (
        _role_fault(_config(**{role: section | {"args": {}}}), role)
        == f"{role}.args is {{}}; A needs words too. Add it."
    )


@pytest.mark.parametrize(("role", "given"), [("rollout", "seed"), ("reference", "threads"), ("learner", "rank")])
def test_load_args_that_the_framework_gives_are_refused(write: Write, role: str, given: str) -> None:
    module = write(_class_of(role, CONSTRUCTOR[role]))
    fault = _role_fault(_config(**{role: {"actor": f"{module}:A", "args": {given: 3}}}), role)
    assert fault == f"{role}.args.{given} is 3; A is given it by the framework. Remove it."


def test_load_constructor_that_lacks_what_the_framework_gives_is_refused(write: Write) -> None:
    module = write(_class_of("reference", "model, temperature"))
    assert _role_fault(_config(reference={"actor": f"{module}:A"}), "reference") == (
        f"reference.actor is {module}:A; its constructor takes no threads, which the framework gives it. Add it."
    )


def test_load_constructor_that_takes_anything_is_accepted(write: Write) -> None:
    module = write(_class_of("learner", "**everything"))
    assert load_role(_config(learner={"actor": f"{module}:A", "args": {"any": 1}}), "learner").__name__ == "A"


@pytest.mark.parametrize(
    ("actor", "args", "fault"),
    [
        ("exact_match:ExactMatchReward", {"ignore_csae": True}, "reward.args.ignore_csae is True; ExactMatchReward takes no such argument. Did you mean ignore_case?"),
        ("exact_match:ExactMatchReward", {"pattern": "("}, "reward.args.pattern is '('; it is not a regular expression"),
        ("math_verify:MathVerifyReward", {"timeout": 3}, "reward.args.timeout is 3; MathVerifyReward takes no such argument. Remove it; it takes none."),
        ("reasoning_gym:ReasoningGymReward", {"answer_pattern": "x"}, "reward.args.answer_pattern is 'x'; it has 0 groups"),
    ],
)  # fmt: skip
def test_load_built_in_reward_with_wrong_args_is_refused(actor: str, args: dict[str, Any], fault: str) -> None:
    assert _role_fault(_config(reward={"actor": f"actors.rewards.{actor}", "args": args}), "reward").startswith(fault)


def test_load_class_that_objects_to_its_section_is_heard(write: Write) -> None:
    module = write(
        "from maspo_ray.errors import ConfigError\n"
        "class A:\n"
        "    def score(self, prompt, completions): ...\n"
        "    @staticmethod\n"
        "    def check_config(reward):\n"
        "        if reward.cpus > 1: raise ConfigError(f'reward.cpus is {reward.cpus:g}; too many. Lower it.')\n"
    )
    actor = {"actor": f"{module}:A"}
    assert load_role(_config(reward=actor), "reward").__name__ == "A"
    assert _role_fault(_config(reward={**actor, "cpus": 2}), "reward") == "reward.cpus is 2; too many. Lower it."


# What a reward says of answers.

CHECKS = """
class Silent:
    def score(self, prompt, completions): ...

class Bounded(Silent):
    def __init__(self, most):
        self.most = most
    def check_answer(self, answer, metadata):
        return None if answer <= self.most else f"Bounded takes at most {self.most}"

class WrongSignature(Silent):
    def check_answer(self, answer): ...

class Raises(Bounded):
    def __init__(self):
        raise OSError("no such licence")
"""


def test_answer_check_is_the_rewards_own_made_with_its_args(write: Write) -> None:
    name = write(CHECKS)

    def check_of(class_name: str, **args: object) -> AnswerCheck | None:
        reward = RewardConfig(actor=f"{name}:{class_name}", args=args)
        return load_answer_check(load_actor_class("reward", reward.actor), reward)

    assert check_of("Silent") is None
    check = check_of("Bounded", most=3)
    assert check is not None and (check(3, {}), check(4, {})) == (None, "Bounded takes at most 3")
    with pytest.raises(
        ConfigError, match=r"its method check_answer\(self, answer\) cannot be called as ChecksAnswers says"
    ):
        check_of("WrongSignature")
    with pytest.raises(ConfigError, match=r"^reward.args is {}; Raises does not take it \(OSError: no such licence\)"):
        check_of("Raises")
