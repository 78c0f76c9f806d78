"""The sections that say where prompts come from and what is made of them.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from maspo_ray.config.section import Section
from maspo_ray.config.sections import PluginConfig


class JsonlSource(Section):
    kind: Literal["jsonl"] = "jsonl"
    path: Path
    """File of one JSON object a line."""
    prompt_column: str = "prompt"
    """A string, or a list of chat messages."""
    answer_column: str = "answer"
    limit: int | None = Field(None, ge=1)
    """Read at most so many lines."""


class HuggingFaceSource(Section):
    kind: Literal["huggingface"] = "huggingface"
    name: str
    subset: str | None = None
    split: str = "train"
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    """A dot goes into a column of dictionaries: `reward_model.ground_truth`."""
    limit: int | None = Field(None, ge=1)


class ReasoningGymSource(Section):
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of a reasoning-gym dataset, e.g. `chain_sum`."""
    size: int = Field(1000, ge=1)
    seed: int = 0
    args: dict[str, Any] = {}
    """Passed to `reasoning_gym.create_dataset`."""
    suffix: str = ""
    """Appended to each question, e.g. how to write the answer."""


DataSource = Annotated[JsonlSource | HuggingFaceSource | ReasoningGymSource, Field(discriminator="kind")]


class SamplerConfig(PluginConfig):
    path: str = "maspo_ray.data.samplers:UniformSampler"
    """Dotted path `module:Class`; `maspo_ray.data.samplers:PassRateSampler` prefers prompts that are solved sometimes."""


class DataConfig(Section):
    train: DataSource
    eval: DataSource | None = None
    """Held-out prompts; without them no evaluation is run."""
    chat_template: bool = True
    """Wrap a string prompt as a user's message by the tokenizer's chat template."""
    system_prompt: str | None = None
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are left out, counted."""
    shuffle: bool = True
    sampler: SamplerConfig = SamplerConfig()
    """What decides which training prompt comes next."""

    @model_validator(mode="after")
    def _system_prompt_needs_a_template(self) -> Self:
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt is set; it needs data.chat_template. Set data.chat_template to true or remove the prompt."
            )
        return self
