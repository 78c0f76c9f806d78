"""The run's configuration. Its sections, `RunConfig` that puts them together, and `load_config` that reads them from a file and flags."""

from maspo_ray.config.data import (
    DataConfig,
    DataSource,
    HuggingFaceSource,
    JsonlSource,
    ReasoningGymSource,
    SamplerConfig,
)
from maspo_ray.config.objective import AdvantageConfig, GrpoConfig, KLConfig, MaspoConfig, ObjectiveConfig
from maspo_ray.config.placement import PlacementConfig
from maspo_ray.config.run import RunConfig, load_config
from maspo_ray.config.sections import (
    CheckpointConfig,
    Dtype,
    EvalConfig,
    LatePolicyConfig,
    LearnerConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OverlongConfig,
    PipelineConfig,
    PluginConfig,
    ReferenceConfig,
    RewardConfig,
    RoleConfig,
    RolloutConfig,
    Section,
    UpdateOrder,
)
from maspo_ray.errors import ConfigError

__all__ = [
    "AdvantageConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "LatePolicyConfig",
    "Dtype",
    "EvalConfig",
    "GrpoConfig",
    "HuggingFaceSource",
    "JsonlSource",
    "KLConfig",
    "LearnerConfig",
    "LoggingConfig",
    "LoraConfig",
    "MaspoConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OverlongConfig",
    "PipelineConfig",
    "PlacementConfig",
    "PluginConfig",
    "ReasoningGymSource",
    "ReferenceConfig",
    "RewardConfig",
    "RoleConfig",
    "RolloutConfig",
    "RunConfig",
    "SamplerConfig",
    "Section",
    "UpdateOrder",
    "load_config",
]
