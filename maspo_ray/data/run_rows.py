"""The rows of a run's sources, each source read once.

Promise: what is asked for twice, by the checks before a run and by the run, is read once; bad rows are refused or left out as
`data.on_bad_row` says as soon as they are found.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from maspo_ray.config import DataConfig, DataSource, FileSource, MixSource
from maspo_ray.data.bad_rows import Fault, warn_of
from maspo_ray.data.sources import Row, SourceRows, read_source
from maspo_ray.errors import ConfigError
from maspo_ray.protocols import AnswerCheck


class RunRows:
    """Reads the sources of `data.train` and `data.eval`."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        self._read: dict[str, SourceRows] = {}
        self._checked: set[str] = set()

    def read_files(self) -> None:
        """Reads the sources that are local files.

        Raises:
            ConfigError: one line for each source that cannot be read or has rows that are refused.
        """
        self._read_those(only_files=True)

    def read_all(self) -> None:
        """Reads what is not read yet; raises as `read_files` does."""
        self._read_those(only_files=False)

    def check_answers(self, check: AnswerCheck | None, reward: str) -> None:
        """Holds the answers of what is read against what the reward takes.

        Args:
            check: says why an answer cannot be scored against, None where the reward takes any.
            reward: `reward.actor`, for errors.

        Raises:
            ConfigError: one line for each source that has rows that are refused.
        """
        if check is None:
            return
        faults = []
        for field in [field for field in self._read if field not in self._checked]:
            source = self._read[field]
            source.sift(partial(_answer_fault, check, reward, field))
            try:
                source.settle(self._data.on_bad_row)
            except ConfigError as error:
                faults.append(str(error))
            self._checked.add(field)
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def train(self) -> list[SourceRows]:
        """The training sources, all read."""
        return [self._read[field] for field, _, _ in self._sources() if field.startswith("data.train")]

    @property
    def eval(self) -> SourceRows | None:
        """The held-out rows, None where the run has none."""
        return self._read.get("data.eval")

    def warn(self) -> None:
        """Says which rows are left out."""
        for source in self._read.values():
            warn_of(source.where, [*source.bad, *source.too_long], source.num_rows)

    def left_out(self) -> list[dict[str, str]]:
        """Returns each row that became no prompt, for `RUN_DIR/left_out.jsonl`: its source, its place and the cause."""
        return [
            {"source": source.where, "row": row.place, "cause": row.fault.rule}
            for source in self._read.values()
            for row in (*source.bad, *source.too_long)
        ]

    def _read_those(self, only_files: bool) -> None:
        faults = []
        for field, name, source in self._sources():
            if field in self._read or (only_files and not isinstance(source, FileSource)):
                continue
            try:
                found = read_source(source, field, name)
                found.settle(self._data.on_bad_row)
                self._read[field] = found
            except ConfigError as error:
                faults.append(str(error))
        if faults:
            raise ConfigError("\n".join(faults))

    def _sources(self) -> Iterator[tuple[str, str, DataSource]]:
        """Yields the key in the config, the name in a mix ("" outside one) and the source."""
        train = self._data.train
        if isinstance(train, MixSource):
            for name, source in train.sources.items():
                yield f"data.train.sources.{name}", name, source
        else:
            yield "data.train", "", train
        if self._data.eval is not None:
            yield "data.eval", "", self._data.eval


def _answer_fault(check: AnswerCheck, reward: str, field: str, row: Row) -> Fault | None:
    cause = _asked(check, row, reward)
    if cause is None:
        return None
    return Fault(
        f"has the answer {_short(row.answer)}, a {_type_name(row.answer)}; {cause}",
        ("Mend it", f"set {field}.answer_column", "take another reward.actor"),
    )


def _asked(check: AnswerCheck, row: Row, reward: str) -> str | None:
    try:
        cause = check(row.answer, row.metadata)
    except Exception as error:
        # The user's code.
        shown = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"reward.actor is {reward}; its check_answer raises on {_short(row.answer)} ({shown}). Mend it."
        ) from error
    if cause is not None and not isinstance(cause, str):
        raise ConfigError(
            f"reward.actor is {reward}; its check_answer returned a {type(cause).__name__}; it must return a text or None. Mend it."
        )
    return cause


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _type_name(value: Any) -> str:
    return {str: "text", dict: "dictionary", int: "whole number", type(None): "missing value"}.get(
        type(value), type(value).__name__
    )
