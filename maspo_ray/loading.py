"""Dotted path → class, checked against the protocol of its role.

Promise: what is returned has every method of its role, taking the arguments that the framework passes; an error names
what is missing. Importing a user's module happens here and nowhere else. Actor modules import their engines in `setup`, so
this is cheap.
"""

import importlib
import inspect
import sys
from pathlib import Path

from maspo_ray.config import RunConfig
from maspo_ray.errors import ConfigError
from maspo_ray.protocols import LearnerActor, ReferenceActor, RewardActor, RolloutActor

PROTOCOLS: dict[str, type] = {
    "rollout": RolloutActor,
    "reward": RewardActor,
    "reference": ReferenceActor,
    "learner": LearnerActor,
}


def protocol_methods(protocol: type) -> list[str]:
    """Returns the names of the methods that a protocol asks for, in its order."""
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


def load_classes(config: RunConfig) -> dict[str, type]:
    """Returns the class of each role that the run starts, checked against its protocol."""
    roles = [role for role in PROTOCOLS if role != "reference" or config.kl.coef > 0]
    return {role: load_actor_class(role, getattr(config, role).actor) for role in roles}


def load_actor_class(role: str, dotted_path: str) -> type:
    """Returns the class that `<role>.actor` names.

    Raises:
        ConfigError: no such module, no such class, or a method is missing or takes other arguments.
    """
    field = f"{role}.actor is {dotted_path}"
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
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{field}; importing it fails: {cause}. Mend the module.") from error
    actor_class = getattr(module, class_name, None)
    if not inspect.isclass(actor_class):
        raise ConfigError(f"{field}; module {module_name} has no class {class_name}. Name one that it has.")
    _check_protocol(field, actor_class, PROTOCOLS[role])
    return actor_class


def _check_protocol(field: str, actor_class: type, protocol: type) -> None:
    for name in protocol_methods(protocol):
        method = getattr(actor_class, name, None)
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
