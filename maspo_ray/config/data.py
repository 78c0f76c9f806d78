"""The sections that say where prompts come from and what is made of them.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from maspo_ray.config.section import Section
from maspo_ray.config.sections import PluginConfig


class TableSource(Section):
    """Rows with columns, of which one is the prompt and one the answer."""

    kind: str
    prompt_column: str = "prompt"
    """A string, or a list of chat messages. A dot goes into a column of dictionaries, unless a column is called so."""
    answer_column: str = "answer"
    """What the reward compares with; a dot as in prompt_column: `reward_model.ground_truth`."""
    limit: int | None = Field(None, ge=1)
    """Read at most so many rows."""


class FileSource(TableSource):
    """Rows of local files."""

    path: Path
    """A file, a folder of such files, or a glob such as `data/train-*.jsonl`; several files are read in the order of their names."""


class JsonlSource(FileSource):
    """Of one JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"


class JsonSource(FileSource):
    """Each one JSON document: a list of objects."""

    kind: Literal["json"] = "json"
    list_key: str | None = None
    """Where the document is an object: its key that holds the list."""


class CsvSource(FileSource):
    """With a header line; every value is a text."""

    kind: Literal["csv"] = "csv"
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """By default a tab in files that end in .tsv, else a comma."""


class ParquetSource(FileSource):
    kind: Literal["parquet"] = "parquet"


class SavedSource(FileSource):
    """A folder that `datasets` wrote by `save_to_disk`."""

    kind: Literal["saved"] = "saved"
    split: str | None = None
    """Of a folder that holds several splits."""


class HuggingFaceSource(TableSource):
    """A dataset of the Hugging Face hub, or a local folder laid out like one."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """`org/name`, or a folder's path."""
    subset: str | None = None
    """Name of the dataset's configuration, where it has several."""
    split: str = "train"
    """Of the dataset."""


class ReasoningGymSource(Section):
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of a reasoning-gym dataset, e.g. `chain_sum`."""
    size: int = Field(1000, ge=1)
    """Questions to generate."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of their generation."""
    args: dict[str, Any] = {}
    """Passed to `reasoning_gym.create_dataset`."""
    suffix: str = ""
    """Appended to each question, e.g. how to write the answer."""


_OneSource = JsonlSource | JsonSource | CsvSource | ParquetSource | SavedSource | HuggingFaceSource | ReasoningGymSource
DataSource = Annotated[_OneSource, Field(discriminator="kind")]


class MixSource(Section):
    """Several sources, drawn from by weight."""

    kind: Literal["mix"] = "mix"
    sources: dict[str, DataSource] = Field(min_length=1)
    """By name; metrics.jsonl has columns `source/<name>/…`."""
    weights: dict[str, float] = {}
    """By a source's name; one that is not named has weight 1. Of the prompts that are drawn each source has its weight's share, however
    many rows it has."""

    @field_validator("sources")
    @classmethod
    def _plain_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(
                    f"{name!r} names a source; a name has letters, digits, '_', '-' and '.' alone. Rename it"
                )
        return value

    @model_validator(mode="after")
    def _weights_are_of_sources(self) -> Self:
        for name, weight in self.weights.items():
            if name not in self.sources:
                raise ValueError(
                    f"weights.{name} is {weight}; there is no source {name} (there are {', '.join(self.sources)}). Remove it."
                )
            if weight <= 0:
                raise ValueError(f"weights.{name} is {weight}; it must be above 0. Raise it, or remove the source.")
        return self

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)


TrainSource = Annotated[_OneSource | MixSource, Field(discriminator="kind")]

SOURCE_KINDS: tuple[str, ...] = tuple(
    source.model_fields["kind"].default for source in get_args(_OneSource | MixSource)
)


class SamplerConfig(PluginConfig):
    path: str = "maspo_ray.data.samplers:UniformSampler"
    """Dotted path `module:Class`; `maspo_ray.data.samplers:PassRateSampler` prefers prompts that are solved sometimes."""


class DataConfig(Section):
    train: TrainSource
    """Where training prompts come from: `kind` and its keys."""
    eval: DataSource | None = None
    """Held-out prompts, of the kinds that `data.train` has but for `mix`; without them no evaluation is run."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows that cannot become prompts: the run is refused with the first one's place and cause, or they are left out,
    counted and listed in RUN_DIR/left_out.jsonl."""
    chat_template: bool = True
    """Wrap a string prompt as a user's message by the tokenizer's chat template."""
    template_name: str | None = None
    """Which of a tokenizer's chat templates, where it has several; by default the one called `default`."""
    system_prompt: str | None = None
    """Set before each prompt by the chat template."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are left out, counted and listed in RUN_DIR/left_out.jsonl."""
    shuffle: bool = True
    """Draw training prompts in an order that the seed and the epoch decide, else in the data's."""
    sampler: SamplerConfig = SamplerConfig()
    """What decides which training prompt comes next; of a mix each source has one of its own."""

    @model_validator(mode="after")
    def _system_prompt_needs_a_template(self) -> Self:
        if self.system_prompt is not None and not self.chat_template:
            raise ValueError(
                "system_prompt is set; it needs data.chat_template. Set data.chat_template to true or remove the prompt."
            )
        if self.template_name is not None and not self.chat_template:
            raise ValueError(
                f"template_name is {self.template_name}; it needs data.chat_template. Set data.chat_template to true or remove the name."
            )
        return self
