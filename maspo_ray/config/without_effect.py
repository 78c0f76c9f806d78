"""Which of the keys that a config sets have no effect in its run, and why: `maspo check` and a run's start say so.

Promise: pure. A key is named only where its value is not the default, so that a resolved config, which has every key, is as quiet as the
file that it came from. A new key with a condition has its line here.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from maspo_ray.config.learner import LearnerConfig
from maspo_ray.config.run import RunConfig
from maspo_ray.config.sections import (
    RoleConfig,
)

_log = logging.getLogger(__name__)


def warn_of_keys_without_effect(config: RunConfig) -> None:
    """Says which keys of a config have no effect in its run."""
    for line in without_effect(config, os.environ.get("RAY_ADDRESS")):
        _log.warning("%s", line)


def without_effect(config: RunConfig, ray_address: str | None = None) -> list[str]:
    """Returns a line for each key that is set and has no effect.

    Args:
        ray_address: what RAY_ADDRESS says, None where it is not set.
    """
    causes = [*_of_roles(config), *_of_training(config), *_of_steps(config), *_of_deepspeed(config.learner)]
    if config.placement.address or ray_address:
        causes.append(("placement.object_store_gib", "a cluster's object store has the size that `ray start` gave it"))
    lines = [
        f"{path} is {value}; it has no effect, since {cause}."
        for key, cause in causes
        for path, value in _set_keys(config, key.split("."))
    ]
    warmup, steps = config.learner.warmup_steps, config.pipeline.steps
    if warmup > steps:
        lines.append(f"learner.warmup_steps is {warmup}; the run ends at step {steps}, before learner.lr is reached.")
    return lines


def _set_keys(node: BaseModel | dict[str, Any], path: Sequence[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields the path and value of a key whose value is not its default; of a section, of each of its keys."""
    name, *inner = path
    if isinstance(node, dict):
        value, is_set = node.get(name), name in node
    else:
        value = getattr(node, name)
        is_set = value != type(node).model_fields[name].get_default(call_default_factory=True)
    if inner and isinstance(value, (BaseModel, dict)):
        yield from _set_keys(value, inner, f"{prefix}{name}.")
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _set_keys(value, [field], f"{prefix}{name}.")
    elif is_set and not inner:
        yield f"{prefix}{name}", value


def _is_alone(role: RoleConfig) -> bool:
    return role.per_node is None and (role.replicas or 1) == 1


def _of_roles(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.rollout.gpus > 0:
        yield "rollout.kv_cache_gib", "on a GPU the KV cache follows from rollout.engine.gpu_memory_utilization"
    else:
        yield "rollout.engine.gpu_memory_utilization", "on a CPU the KV cache follows from rollout.kv_cache_gib"
    if _is_alone(config.rollout):
        yield "rollout.update", "there is one rollout actor"
    if config.kl.coef == 0:
        yield "reference", "no reference actor is started while kl.coef is 0"
        yield "kl.estimator", "kl.coef is 0"


def _of_training(config: RunConfig) -> Iterator[tuple[str, str]]:
    if config.objective.old_policy == "behaviour":
        yield "objective.importance_cap", "objective.old_policy is behaviour, whose ratio needs no correction"
    if config.data.eval is None:
        yield "eval", "there is no data.eval"
    elif config.eval.temperature == 0:
        for name in ("top_p", "top_k", "min_p"):
            yield f"eval.{name}", "eval.temperature is 0, which takes the most probable token"
    if config.checkpoint.every == 0 and not config.checkpoint.save_final:
        yield "checkpoint.timeout_s", "nothing is saved"


def _of_steps(config: RunConfig) -> Iterator[tuple[str, str]]:
    steps = config.pipeline.steps
    if config.learner.warmup_steps >= steps:
        yield (
            "learner.schedule",
            f"learner.warmup_steps is {config.learner.warmup_steps} and the run ends at step {steps}",
        )
    if config.data.eval is not None and config.eval.every >= steps:
        yield "eval.every", f"the run ends at step {steps}: it is evaluated before and after training only"
    if config.checkpoint.every > steps:
        yield "checkpoint.every", f"the run ends at step {steps}"
    if config.pipeline.max_staleness >= steps:
        yield "pipeline.max_staleness", f"a run of {steps} steps cannot be further behind than {steps - 1}"


def _of_deepspeed(learner: LearnerConfig) -> Iterator[tuple[str, str]]:
    # Given a zero_optimization, the learner's stage is at least 1.
    stage, zero = learner.zero_stage or 1, learner.deepspeed.get("zero_optimization", {})
    for name in zero:
        if stage < 3 and (name.startswith("stage3_") or name == "offload_param"):
            yield (
                f"learner.deepspeed.zero_optimization.{name}",
                f"parameters are sharded at learner.zero_stage 3, and it is {stage}",
            )
