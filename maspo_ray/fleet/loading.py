"""Dotted path → class, checked against the protocol of its role.

Promise: what is returned has every method of its role, taking the arguments that the framework passes, and a constructor that takes
the section's `args`; an error names what is missing. Importing a user's module happens here and nowhere else. Actor modules import their engines in `setup`, so
this is cheap.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maspo_ray.config import DataConfig, PipelineConfig, PluginConfig, RewardConfig, RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.fleet.blueprint import constructor_arguments
from maspo_ray.protocols import (
    AnswerCheck,
    ChecksAnswers,
    LatePolicy,
    LearnerActor,
    ReferenceActor,
    RewardActor,
    RolloutEngine,
    Sampler,
)

PROTOCOLS: dict[str, type] = {
    "rollout": RolloutEngine,
    "reward": RewardActor,
    "reference": ReferenceActor,
    "learner": LearnerActor,
}


def protocol_methods(protocol: type) -> list[str]:
    """Returns the names of the methods that a protocol asks for, in its order."""
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


@dataclass(frozen=True, slots=True)
class Plugins:
    """What a config names by dotted path, loaded and checked.

    Attributes:
        classes: the actor's class of each role that the run starts.
        sampler: makes the sampler of so many prompts.
        check_answer: says why the reward cannot score against an answer; None where the reward does not say.
    """

    classes: dict[str, type]
    sampler: Callable[[int], Sampler]
    late_policy: LatePolicy
    check_answer: AnswerCheck | None


def load_plugins(config: RunConfig) -> Plugins:
    """Returns all that a run needs.

    Raises:
        ConfigError: one cannot be loaded.
    """
    classes = load_classes(config)
    return Plugins(
        classes,
        load_sampler(config.data, config.seed),
        load_late_policy(config.pipeline),
        load_answer_check(classes["reward"], config.reward),
    )


def load_classes(config: RunConfig) -> dict[str, type]:
    """Returns the class of each role that the run starts, as `load_role` does."""
    return {role: load_role(config, role) for role in PROTOCOLS if role != "reference" or config.kl.coef > 0}


def load_role(config: RunConfig, role: str) -> type:
    """Returns the class of a role, checked against its protocol and against what it will be made with.

    Raises:
        ConfigError: as `load_actor_class` does; or the class does not take the section's `args`, or objects to the section.
    """
    section = getattr(config, role)
    found = load_actor_class(role, section.actor)
    _check_constructor(role, "actor", found, list(constructor_arguments(config, role)), section.args)
    # Optional, as `protocols` says.
    if (check := getattr(found, "check_config", None)) is not None:
        check(section)
    return found


def load_actor_class(role: str, dotted_path: str) -> type:
    """Returns the class that `<role>.actor` names.

    Raises:
        ConfigError: no such module, no such class, or a method is missing or takes other arguments.
    """
    return _load_class(f"{role}.actor is {dotted_path}", dotted_path, PROTOCOLS[role])


def load_sampler(data: DataConfig, seed: int) -> Callable[[int], Sampler]:
    """Returns what makes the sampler of so many prompts.

    Raises:
        ConfigError: as `load_actor_class` does for `data.sampler.path`, or the class does not take `data.sampler.args`.
    """
    make = _load_plugin("data.sampler", data.sampler, Sampler)

    def sampler_of(num_prompts: int) -> Sampler:
        sampler: Sampler = make(num_prompts=num_prompts, shuffle=data.shuffle, seed=seed)
        return sampler

    sampler_of(1)
    return sampler_of


def load_late_policy(pipeline: PipelineConfig) -> LatePolicy:
    """Returns the policy that `pipeline.late_policy` names.

    Raises:
        ConfigError: as `load_sampler` does.
    """
    policy: LatePolicy = _load_plugin("pipeline.late_policy", pipeline.late_policy, LatePolicy)(
        max_staleness=pipeline.max_staleness
    )
    return policy


def load_answer_check(reward_class: type, reward: RewardConfig) -> AnswerCheck | None:
    """Returns what says which answers a reward takes, None where its class has no `check_answer`.

    Raises:
        ConfigError: the method takes other arguments, or the class does not take `reward.args`.
    """
    if not issubclass(reward_class, ChecksAnswers):
        return None
    _check_protocol(f"reward.actor is {reward.actor}", reward_class, ChecksAnswers)
    made: ChecksAnswers = _make("reward", reward_class, reward.args)
    return made.check_answer


def _load_plugin(field: str, plugin: PluginConfig, protocol: type) -> Callable[..., Any]:
    """Returns what makes a plugin from what its protocol gives it."""
    plugin_class = _load_class(f"{field}.path is {plugin.path}", plugin.path, protocol)

    def make(**given: Any) -> Any:
        _check_constructor(field, "path", plugin_class, list(given), plugin.args)
        return _make(field, plugin_class, plugin.args, **given)

    return make


def _make(field: str, plugin_class: type, args: dict[str, Any], **given: Any) -> Any:
    try:
        return plugin_class(**given, **args)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{field}.args is {args}; {plugin_class.__name__} does not take it ({_one_line(error)}). Change {field}.args."
        ) from error


def _load_class(field: str, dotted_path: str, protocol: type) -> type:
    module_name, _, class_name = dotted_path.partition(":")
    if not module_name or not class_name:
        raise ConfigError(f"{field}; it must read module:Class. Write it so.")
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.insert(0, cwd)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigError(
                f"{field}; there is no module {missing}. Run from the folder that holds it, or put it on PYTHONPATH."
            ) from None
        raise ConfigError(f"{field}; importing it fails: {error}. Install what it imports.") from None
    except Exception as error:
        raise ConfigError(f"{field}; importing it fails: {_one_line(error)}. Mend the module.") from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise ConfigError(f"{field}; module {module_name} has no class {class_name}. Name one that it has.")
    _check_protocol(field, found, protocol)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_protocol(field: str, found: type, protocol: type) -> None:
    for name in protocol_methods(protocol):
        method = getattr(found, name, None)
        if not callable(method):
            raise ConfigError(
                f"{field}; the class has no method {name}, which {protocol.__name__} needs. "
                f"Add {name}{inspect.signature(getattr(protocol, name))}."
            )
        wanted = inspect.signature(getattr(protocol, name))
        if not _accepts(inspect.signature(method), wanted):
            raise ConfigError(
                f"{field}; its method {name}{inspect.signature(method)} cannot be called as {protocol.__name__} says. "
                f"Give it the signature {name}{wanted}."
            )


def _check_constructor(field: str, key: str, found: type, given: list[str], args: dict[str, Any]) -> None:
    """Checks by its signature that a class can be made with what the framework gives it and what a section's `args` add.

    Args:
        key: under which `field` names the class.

    Raises:
        ConfigError: it cannot; the line names the argument.
    """
    name = found.__name__
    if both := sorted(args.keys() & given):
        raise ConfigError(
            f"{field}.args.{both[0]} is {args[both[0]]!r}; {name} is given it by the framework. Remove it."
        )
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        # Some classes written in C tell none.
        return
    takes = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for argument in () if takes_any else [*given, *args]:
        if argument in takes:
            continue
        if argument in given:
            raise ConfigError(
                f"{field}.{key} is {found.__module__}:{name}; its constructor takes no {argument}, which the framework gives it. Add it."
            )
        own = sorted(takes - set(given))
        near = difflib.get_close_matches(argument, own, n=1)
        there = f"it takes {', '.join(own)}" if own else "it takes none"
        remedy = f"Did you mean {near[0]}?" if near else f"Remove it; {there}."
        raise ConfigError(f"{field}.args.{argument} is {args[argument]!r}; {name} takes no such argument. {remedy}")
    needed = [p.name for p in parameters if p.default is p.empty and p.name in takes and p.name not in {*given, *args}]
    if needed:
        raise ConfigError(f"{field}.args is {args}; {name} needs {' and '.join(needed)} too. Add it.")


def _accepts(signature: inspect.Signature, wanted: inspect.Signature) -> bool:
    """Whether a call with the arguments of `wanted` binds to `signature`."""
    kinds = inspect.Parameter
    positional = [
        p for p in wanted.parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    keywords = {p.name: None for p in wanted.parameters.values() if p.kind is kinds.KEYWORD_ONLY}
    try:
        signature.bind(*(None for _ in positional), **keywords)
    except TypeError:
        return False
    return True
