"""A data source of the config → its rows: prompt, answer, and the other columns as metadata.

Promise: every row has a prompt that is not empty, and its answer column exists; a fault in the data is a `ConfigError` that names the
config's key and, for a file, the line. Tokenising is `prompts`'. The libraries behind the sources are imported only when a source of
their kind is read.
"""

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maspo_ray.config import DataSource, HuggingFaceSource, JsonlSource, ReasoningGymSource
from maspo_ray.errors import ConfigError

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One question, as the user's data has it.

    Attributes:
        prompt: a string, or a list of chat messages, each with a role and a content.
        answer: whatever the answer column holds.
        row_id: `<train or eval>/<row>`, rows counted from 0; the same in every run over the same data.
        metadata: the row's other columns; of reasoning-gym the task, its args and the entry, which its scorer needs.
    """

    prompt: str | list[Message]
    answer: Any
    row_id: str
    metadata: dict[str, Any]

    @property
    def text(self) -> str:
        """The prompt as a string; of messages the last one's content."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_rows(source: DataSource, field: str) -> list[Row]:
    """Returns the rows of a source, at least one, in the data's own order.

    Args:
        field: the source's key in the config, such as `data.train`; errors name it, and row ids begin with its last part.

    Raises:
        ConfigError: the source does not exist or cannot be read, or a row lacks a column that the config names.
    """
    match source:
        case JsonlSource():
            return _jsonl_rows(source, field)
        case HuggingFaceSource():
            return _huggingface_rows(source, field)
        case ReasoningGymSource():
            return _reasoning_gym_rows(source, field)


def _jsonl_rows(source: JsonlSource, field: str) -> list[Row]:
    where = f"{field}.path is {source.path}"
    if not source.path.is_file():
        raise ConfigError(f"{where}; there is no such file. Give the path of a file of one JSON object a line.")
    rows: list[Row] = []
    for number, record in _json_objects(source, where):
        rows.append(_row(record, source, field, len(rows), f"{where}; line {number}"))
        if len(rows) == source.limit:
            break
    if not rows:
        raise ConfigError(f"{where}; the file is empty. Give one that has a JSON object a line.")
    return rows


def _json_objects(source: JsonlSource, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of each line that is not blank."""
    try:
        with source.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ConfigError(f"{where}; line {number} is not JSON ({error.msg}). Mend the line.") from None
                if not isinstance(record, dict):
                    raise ConfigError(
                        f"{where}; line {number} is not a JSON object but a {type(record).__name__}. Mend the line."
                    )
                yield number, record
    except UnicodeDecodeError:
        raise ConfigError(f"{where}; the file is not UTF-8 text. Give one that is.") from None


def _huggingface_rows(source: HuggingFaceSource, field: str) -> list[Row]:
    where = f"{field}.name is {source.name}"
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ConfigError(
            f"{field}.kind is huggingface; the package datasets is not installed. Install datasets, or use a jsonl file."
        ) from None
    try:
        data = load_dataset(source.name, source.subset, split=source.split)
    except Exception as error:
        # The library raises errors of its own, of the hub's client and of the operating system, which have no base class but this.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{where}; loading it fails: {cause}. Check {field}.name, subset and split.") from error
    if not len(data):
        raise ConfigError(f"{where}; split {source.split} is empty. Name another in {field}.split.")
    if source.limit is not None:
        data = data.select(range(min(source.limit, len(data))))
    return [_row(record, source, field, i, f"{where}; row {i}") for i, record in enumerate(data)]


def _reasoning_gym_rows(source: ReasoningGymSource, field: str) -> list[Row]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        raise ConfigError(
            f"{field}.task is {source.task}; reasoning-gym has no such task. {_nearest(source.task, DATASETS)}"
        )
    try:
        dataset = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.args)
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        # A task checks its own arguments, mostly by assertions.
        raise ConfigError(
            f"{field}.args is {source.args}; the task {source.task} does not take it: {error}. Change {field}.args."
        ) from None
    rows = []
    for i in range(source.size):
        entry = dataset[i]
        metadata = {"task": source.task, "args": source.args, "entry": entry}
        rows.append(Row(entry["question"] + source.suffix, entry["answer"], _row_id(field, i), metadata))
    return rows


def _nearest(name: str, names: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else "Name one that it has, such as chain_sum."


def _row(record: dict[str, Any], source: JsonlSource | HuggingFaceSource, field: str, index: int, where: str) -> Row:
    prompt = _column(record, source.prompt_column, f"{field}.prompt_column", where)
    answer = _column(record, source.answer_column, f"{field}.answer_column", where)
    if not _is_prompt(prompt):
        raise ConfigError(
            f"{where} has in column {source.prompt_column} neither a text nor a list of messages with a role and a content "
            f"each. Mend it, or set {field}.prompt_column."
        )
    used = {source.prompt_column.partition(".")[0], source.answer_column.partition(".")[0]}
    used |= {source.prompt_column, source.answer_column}
    metadata = {name: value for name, value in record.items() if name not in used}
    return Row(prompt, answer, _row_id(field, index), metadata)


def _column(record: dict[str, Any], name: str, key: str, where: str) -> Any:
    """Returns a column's value; a dotted name such as `extra.answer`, unless a column is called so, looks inside a column of
    dictionaries."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ConfigError(f"{where} lacks the column {name} (it has {', '.join(record) or 'none'}). Set {key}.")
        value = value[part]
    return value


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _row_id(field: str, index: int) -> str:
    return f"{field.rpartition('.')[2]}/{index}"
