"""A data source of the config → its rows: prompt, answer, and the other columns as metadata.

Promise: every row has a prompt that can be asked, and its answer column exists; every other row of the data is kept as a bad one, with its
place and cause. A source that cannot be read is a `ConfigError` that names the config's key. Tokenising is `prompts`'. The libraries behind
the sources are imported only when a source of their kind is read.
"""

import ast
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from maspo_ray.config import DataSource, FileSource, HuggingFaceSource, ReasoningGymSource, TableSource
from maspo_ray.data.bad_rows import BadRow, Fault, settle
from maspo_ray.data.files import read_records
from maspo_ray.data.tables import Records, hub_records
from maspo_ray.errors import ConfigError

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One question, as the user's data has it.

    Attributes:
        prompt: a string, or a list of chat messages, each with a role and a content.
        answer: whatever the answer column holds.
        row_id: `train/<row>` or `eval/<row>`, of a source of a mix `train/<source>/<row>`, rows counted from 0, bad ones among them; the
            same in every run over the same data.
        metadata: the row's other columns; of reasoning-gym the task, its args and the entry, which its scorer needs.
        place: where the data has it, such as `line 3`.
    """

    prompt: str | list[Message]
    answer: Any
    row_id: str
    metadata: dict[str, Any]
    place: str

    @property
    def text(self) -> str:
        """The prompt as a string; of messages the content of the last that is not the assistant's, whose turn a completion goes on with."""
        if isinstance(self.prompt, str):
            return self.prompt
        asked = (message for message in reversed(self.prompt) if message["role"] != "assistant")
        return next(asked, self.prompt[-1])["content"]


class SourceRows:
    """The rows of a source.

    Args:
        field: the source's key in the config, such as `data.train`.
        name: the source's in a mix; "" of one that stands alone.
        where: the source's key and value, with which errors about it begin.
        prefix: of row ids, before their number.

    Attributes:
        rows: that can be used, in the source's order.
        bad: that become no prompt.
        too_long: whose prompt is longer than `data.max_prompt_tokens`.
    """

    def __init__(self, field: str, name: str, where: str, prefix: str) -> None:
        self.field = field
        self.name = name
        self.where = where
        self.prefix = prefix
        self.rows: list[Row] = []
        self.bad: list[BadRow] = []
        self.too_long: list[BadRow] = []

    @property
    def num_rows(self) -> int:
        """Of the data, all of them."""
        return len(self.rows) + len(self.bad) + len(self.too_long)

    def sift(self, fault_of: Callable[[Row], Fault | None]) -> None:
        """Moves rows that have a fault to the bad ones."""
        kept = []
        for row in self.rows:
            if (fault := fault_of(row)) is None:
                kept.append(row)
            else:
                self.bad.append(BadRow(row.place, fault))
        self.rows = kept

    def settle(self, on_bad_row: Literal["refuse", "skip"]) -> None:
        """Raises `ConfigError` where there are bad rows and they are refused, or where there are no others."""
        settle(self.where, self.bad, self.num_rows, on_bad_row)


def read_source(source: DataSource, field: str, name: str = "") -> SourceRows:
    """Returns the rows of a source, in the data's own order; it has at least one, which may be bad.

    Args:
        field: the source's key in the config, such as `data.train`; errors name it.
        name: the source's in a mix.

    Raises:
        ConfigError: the source does not exist or cannot be read.
    """
    split = field.split(".")[1]
    prefix = f"{split}/{name}/" if name else f"{split}/"
    if isinstance(source, ReasoningGymSource):
        found = SourceRows(field, name, f"{field}.task is {source.task}", prefix)
        _read_reasoning_gym(source, found)
    elif isinstance(source, HuggingFaceSource):
        found = SourceRows(field, name, f"{field}.name is {source.name}", prefix)
        _take(source, hub_records(source, found.where), found)
    else:
        assert isinstance(source, FileSource)
        found = SourceRows(field, name, f"{field}.path is {source.path}", prefix)
        _take(source, read_records(source, found.where), found)
    if not found.num_rows:
        raise ConfigError(f"{found.where}; it is empty. Give a source that has rows.")
    found.sift(_text_fault)
    return found


def _take(source: TableSource, records: Records, found: SourceRows) -> None:
    """Adds the records as rows, at most `limit`."""
    for index, (place, record) in enumerate(islice(records, source.limit)):
        row = record if isinstance(record, Fault) else _row(record, source, found, index, place)
        if isinstance(row, Fault):
            found.bad.append(BadRow(place, row))
        else:
            found.rows.append(row)


def _read_reasoning_gym(source: ReasoningGymSource, found: SourceRows) -> None:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    field = found.field
    if source.task not in DATASETS:
        raise ConfigError(f"{found.where}; reasoning-gym has no such task. {_nearest(source.task, DATASETS)}")
    try:
        dataset = reasoning_gym.create_dataset(source.task, size=source.size, seed=source.seed, **source.args)
    except (TypeError, ValueError, AttributeError, AssertionError) as error:
        # A task checks its own arguments, mostly by assertions.
        raise ConfigError(
            f"{field}.args is {source.args}; the task {source.task} does not take it: {error}. Change {field}.args."
        ) from None
    for i in range(source.size):
        entry = dataset[i]
        metadata = {"task": source.task, "args": source.args, "entry": entry}
        question = entry["question"] + source.suffix
        found.rows.append(Row(question, entry["answer"], f"{found.prefix}{i}", metadata, f"entry {i}"))


def _nearest(name: str, names: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {near[0]}?" if near else "Name one that it has, such as chain_sum."


def _row(record: dict[str, Any], source: TableSource, found: SourceRows, index: int, place: str) -> Row | Fault:
    prompt = _column(record, source.prompt_column, f"{found.field}.prompt_column")
    if isinstance(prompt, Fault):
        return prompt
    answer = _column(record, source.answer_column, f"{found.field}.answer_column")
    if isinstance(answer, Fault):
        return answer
    if not _is_prompt(prompt):
        return Fault(
            f"has in column {source.prompt_column} neither a text nor a list of messages with a role and a content each",
            ("Mend it", f"set {found.field}.prompt_column"),
        )
    if isinstance(prompt, list):
        # A column of messages has all their keys; one that a message lacked is null there, which templates take for given.
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    used = {source.prompt_column.partition(".")[0], source.answer_column.partition(".")[0]}
    used |= {source.prompt_column, source.answer_column}
    metadata = {name: value for name, value in record.items() if name not in used}
    return Row(prompt, answer, f"{found.prefix}{index}", metadata, place)


def _column(record: dict[str, Any], name: str, key: str) -> Any:
    """Returns a column's value; a dotted name such as `extra.answer`, unless a column is called so, looks inside a column of
    dictionaries."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return Fault(f"lacks the column {name} (it has {', '.join(map(str, record)) or 'none'})", (f"Set {key}",))
        value = value[part]
    return value


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _text_fault(row: Row) -> Fault | None:
    """Returns why a prompt cannot be asked, or an answer cannot be given, whatever the tokenizer."""
    texts = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    if not any(text.strip() for text in texts):
        return Fault("has a prompt without text")
    if isinstance(row.prompt, str) and _spells_messages(row.prompt):
        return Fault("has a prompt that spells chat messages as text", ("Store them as a list of objects",))
    for text in texts:
        if half := _half_a_pair(text):
            return Fault(f"has a prompt that is no valid text ({half} is half a surrogate pair)")
    if isinstance(row.answer, str) and (half := _half_a_pair(row.answer)):
        return Fault(f"has an answer that is no valid text ({half} is half a surrogate pair)")
    return None


def _half_a_pair(text: str) -> str | None:
    """Returns the first code unit that is no character, as JSON writes it; None where a text can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def _spells_messages(text: str) -> bool:
    """Returns whether a text is a list of messages, written out as JSON or by Python, as a CSV file must have it."""
    if not text.lstrip().startswith("[{") or "role" not in text:
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            return _is_prompt(read(text.strip()))
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False
