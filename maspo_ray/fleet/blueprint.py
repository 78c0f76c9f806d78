"""What the class of each role is made with: the one place that spells it out, for starting actors and for checking a user's class.

Promise: pure. `protocols` says the same in words; the section's `args` come on top of it, and none of its names may be among them.
"""

from typing import Any

from maspo_ray.config import RunConfig


def constructor_arguments(
    config: RunConfig, role: str, replica: int = 0, threads: int = 1, world_size: int = 1
) -> dict[str, Any]:
    """Returns the keyword arguments that the framework gives a role's class; the section's `args` are not among them."""
    if role == "rollout":
        return {
            "model": config.model,
            "rollout": config.rollout,
            "max_model_tokens": config.max_model_tokens,
            "threads": threads,
            "seed": config.seed + replica,
        }
    if role == "reference":
        return {"model": config.model, "temperature": config.rollout.temperature, "threads": threads}
    if role == "learner":
        return {
            "model": config.model,
            "learner": config.learner,
            "objective": config.objective,
            "kl": config.kl,
            "temperature": config.rollout.temperature,
            "total_updates": config.pipeline.steps * config.learner.updates_per_batch,
            "rank": replica,
            "world_size": world_size,
            "threads": threads,
            "seed": config.seed,
        }
    assert role == "reward", role
    return {}
