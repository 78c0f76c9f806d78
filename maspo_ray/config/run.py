"""The run's configuration: a frozen tree, read from YAML, any key overridable on the command line.

Promise: a `RunConfig` that exists is consistent with itself. What it names in the world (files, classes, cluster) is
checked by `preflight`, `loading` and `placement`. Imports neither torch, ray nor vllm, so that a wrong key is answered
at once.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from maspo_ray.config.data import DataConfig
from maspo_ray.config.faults import describe_flag_error, describe_repeated_flags, describe_validation_errors
from maspo_ray.config.learner import LearnerConfig
from maspo_ray.config.objective import AdvantageConfig, KLConfig, MaspoConfig, ObjectiveConfig
from maspo_ray.config.output import CheckpointConfig, LoggingConfig
from maspo_ray.config.placement import PlacementConfig
from maspo_ray.config.sections import (
    EvalConfig,
    ModelConfig,
    PipelineConfig,
    ReferenceConfig,
    RewardConfig,
    RolloutConfig,
    Section,
)
from maspo_ray.config.yaml_file import read_yaml
from maspo_ray.errors import ConfigError

_log = logging.getLogger(__name__)


class RunConfig(Section):
    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Where prompts come from and what is made of them."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout actors: how completions are sampled, and by which engine."""
    reward: RewardConfig = RewardConfig()
    """Reward actors: what scores a completion."""
    reference: ReferenceConfig = ReferenceConfig()
    """Reference actors, started only if `kl.coef` is above 0."""
    learner: LearnerConfig = LearnerConfig()
    """The learner's ranks: optimizer, sharding, micro-batches."""
    objective: ObjectiveConfig = MaspoConfig()
    """The loss of a token."""
    advantage: AdvantageConfig = AdvantageConfig()
    """What a group's rewards say of each completion."""
    kl: KLConfig = KLConfig()
    """The KL to the reference policy."""
    pipeline: PipelineConfig = PipelineConfig()
    """Steps, batches, staleness, filters, deadlines."""
    placement: PlacementConfig = PlacementConfig()
    """Nodes, and the Ray that the run uses."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluations."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved when."""
    logging: LoggingConfig = LoggingConfig()
    """What a run writes and shows."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the run: data order, sampling, weights that are made anew."""
    run_dir: Path = Path("runs/maspo")
    """Must not hold another run."""

    @field_validator("objective", mode="before")
    @classmethod
    def _maspo_unless_named(cls, value: Any) -> Any:
        return {"kind": "maspo", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}; the {self.advantage.kind} advantage compares the "
                "completions of a group, so it needs at least 2. Set rollout.group_size to 2 or more."
            )
        batch, updates = self.pipeline.groups_per_step, self.learner.updates_per_batch
        if batch % updates:
            raise ValueError(
                f"pipeline.groups_per_step is {batch}; it must divide by learner.updates_per_batch ({updates}). "
                f"Set it to {math.ceil(batch / updates) * updates}."
            )
        if self.learner.zero_stage == 0 and self.model.dtype == "bfloat16":
            raise ValueError(
                "learner.zero_stage is 0; there gradients of model.dtype bfloat16 would be added up in bfloat16. Set "
                "learner.zero_stage to 1."
            )
        longest = self.max_model_tokens
        if self.rollout.max_new_tokens >= longest:
            raise ValueError(
                f"rollout.max_new_tokens is {self.rollout.max_new_tokens}; it must leave room for a prompt within "
                f"rollout.max_model_tokens ({longest}). Lower it."
            )
        if self.data.max_prompt_tokens >= longest:
            raise ValueError(
                f"data.max_prompt_tokens is {self.data.max_prompt_tokens}; a prompt so long would leave no room for a completion within "
                f"rollout.max_model_tokens ({longest}). Lower it."
            )
        shortest = max(
            ("rollout", self.rollout.min_new_tokens), ("eval", self.eval.min_new_tokens or 0), key=lambda s: s[1]
        )
        if shortest[1] > self.rollout.max_new_tokens:
            raise ValueError(
                f"{shortest[0]}.min_new_tokens is {shortest[1]}; it may be at most rollout.max_new_tokens "
                f"({self.rollout.max_new_tokens}). Lower it."
            )
        overlong = self.reward.overlong
        if overlong is not None and overlong.buffer_tokens >= self.rollout.max_new_tokens:
            raise ValueError(
                f"reward.overlong.buffer_tokens is {overlong.buffer_tokens}; it must be below rollout.max_new_tokens "
                f"({self.rollout.max_new_tokens}). Lower it."
            )
        if self.learner.max_tokens_per_micro_batch < longest:
            raise ValueError(
                f"learner.max_tokens_per_micro_batch is {self.learner.max_tokens_per_micro_batch}; one sequence may have "
                f"{longest} tokens. Set it to at least {longest}."
            )
        return self

    @property
    def max_model_tokens(self) -> int:
        """Longest sequence, prompt and completion together, in tokens."""
        return self.rollout.max_model_tokens or self.data.max_prompt_tokens + self.rollout.max_new_tokens


class _FileAndFlags(BaseSettings, RunConfig):  # type: ignore[misc]
    """`RunConfig` as pydantic-settings reads it: flags over the file's keys; environment variables are not read."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the run's configuration from a YAML file and flags such as `["--objective.alpha", "0.5"]`.

    Raises:
        ConfigError: one line for each thing that is wrong: field, value, rule, remedy.
    """
    tree = read_yaml(Path(path))
    for line in describe_repeated_flags(overrides, RunConfig):
        # As on any command line, so that a flag can be added to a command that has it; but never in silence.
        _log.warning(line)
    try:
        both = _FileAndFlags(_cli_parse_args=list(overrides), _cli_exit_on_error=False, **tree)
        return RunConfig(**{name: getattr(both, name) for name in RunConfig.model_fields})
    except SettingsError as error:
        raise ConfigError(describe_flag_error(str(error), RunConfig)) from None
    except ValidationError as error:
        raise ConfigError("\n".join(describe_validation_errors(error, RunConfig))) from None
