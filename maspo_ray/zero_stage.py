"""What DeepSpeed's ranks shard, by the config: one rule for the learner and for the estimate of its memory."""

from maspo_ray.config import LearnerConfig, ModelConfig


def zero_stage_of(learner: LearnerConfig, model: ModelConfig, world_size: int) -> int:
    """Returns the ZeRO stage: the config's, else 1, or 0 where there is nothing to shard, to offload or to keep a float32 copy of."""
    if learner.zero_stage is not None:
        return learner.zero_stage
    plain = world_size == 1 and model.dtype == "float32" and "zero_optimization" not in learner.deepspeed
    return 0 if plain else 1
