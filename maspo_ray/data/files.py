"""Local files → records, one a row, with the place of each.

Promise: a record is what its file holds, neither guessed at nor converted: JSON keeps its types, a CSV's values are texts. A row that
cannot be read comes out as its fault, so that the others can; a file that cannot is a `ConfigError`. JSON and CSV are read by Python's own
modules, which load at once, know the line, and give a column no single type; the other kinds by `tables`.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import TextIO

from maspo_ray.config import CsvSource, FileSource, JsonlSource, JsonSource, ParquetSource, SavedSource
from maspo_ray.data.bad_rows import Fault
from maspo_ray.data.tables import Record, Records, parquet_records, saved_records
from maspo_ray.errors import ConfigError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "json": (".json", ".json.gz"),
    "csv": (".csv", ".tsv", ".csv.gz", ".tsv.gz"),
    "parquet": (".parquet",),
}
"""By kind, what the files of a folder end in that are read."""

_SPLITS = {
    "train": "training", "test": "test", "testing": "test", "val": "validation", "valid": "validation", "validation": "validation",
    "dev": "validation", "eval": "test", "heldout": "test",
}  # fmt: skip
_LONGEST_CELL = 2**31 - 1


def read_records(source: FileSource, where: str) -> Records:
    """Returns the records of a source's files, in the order of the files' names and of their rows.

    Args:
        where: the source's key and path, for errors.

    Raises:
        ConfigError: there is no such file, or one cannot be read; while it goes through them.
    """
    if isinstance(source, SavedSource):
        return saved_records(source, where)
    files = _files(source, where)
    if isinstance(source, ParquetSource):
        return parquet_records(files, where)
    return _text_records(source, files, where)


def _files(source: FileSource, where: str) -> list[Path]:
    path, suffixes = source.path, SUFFIXES[source.kind]
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(suffixes))
        if not files:
            raise ConfigError(
                f"{where}; no file of this folder ends in {' or '.join(suffixes)}. Give another, or set kind."
            )
        splits = {
            _SPLITS[word] for file in files for word in re.split(r"[^a-z]+", file.name.lower()) if word in _SPLITS
        }
        if len(splits) > 1:
            raise ConfigError(
                f"{where}; this folder has files of several splits ({', '.join(file.name for file in files[:4])}). "
                f"Give a glob, such as {path}/train*{suffixes[0]}."
            )
        return files
    files = sorted(Path(name) for name in glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        what = "no file matches" if has_magic(str(path)) else "there is no such file"
        raise ConfigError(f"{where}; {what}. Give the path of a file, a folder or a glob.")
    return files


def _text_records(source: FileSource, files: list[Path], where: str) -> Records:
    for file in files:
        prefix = f"{file}, " if len(files) > 1 else ""
        shown = f"{where}; {file if len(files) > 1 else 'the file'}"
        with _opened(file, shown) as opened:
            if isinstance(source, JsonlSource):
                records = _jsonl_records(opened)
            elif isinstance(source, JsonSource):
                records = _json_records(opened, source.list_key, shown)
            else:
                assert isinstance(source, CsvSource)
                tab = file.name.removesuffix(".gz").endswith(".tsv")
                records = _csv_records(opened, source.delimiter or ("\t" if tab else ","), shown)
            for place, record in records:
                yield f"{prefix}{place}", record


@contextmanager
def _opened(file: Path, shown: str) -> Iterator[TextIO]:
    try:
        # utf-8-sig: some programs begin a file with a mark of its encoding, which is no part of its first row.
        # newline="": a line break inside a CSV's quotes stays what it is.
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig", newline="") as opened:
            yield opened
    except UnicodeDecodeError:
        raise ConfigError(f"{shown} is not UTF-8 text. Give one that is.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{shown} cannot be read ({error}). Give one that can.") from None


def _jsonl_records(opened: TextIO) -> Records:
    for number, line in enumerate(opened, start=1):
        if line.strip():
            yield f"line {number}", _json_line(line)


def _json_line(line: str) -> Record | Fault:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Fault(f"is not JSON ({getattr(error, 'msg', error)})", ("Mend the line",))
    return record if isinstance(record, dict) else _no_object(record)


def _no_object(record: object) -> Fault:
    return Fault(f"is not a JSON object but a {type(record).__name__}")


def _json_records(opened: TextIO, list_key: str | None, shown: str) -> Records:
    try:
        tree = json.load(opened)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise ConfigError(
                f"{shown} holds more than one JSON document. Set kind to jsonl, if each line is one."
            ) from None
        raise ConfigError(f"{shown} is not JSON (line {error.lineno}: {error.msg}). Mend it.") from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise ConfigError(f"{shown} is not JSON ({error}). Mend it.") from None
    except RecursionError:
        raise ConfigError(f"{shown} is nested too deeply to be read. Flatten it.") from None
    if list_key is not None:
        if not isinstance(tree, dict) or list_key not in tree:
            raise ConfigError(f"{shown} has no key {list_key}{_keys_of(tree)}. Change list_key.")
        tree = tree[list_key]
    if not isinstance(tree, list):
        raise ConfigError(
            f"{shown} holds no list of objects but a {type(tree).__name__}{_keys_of(tree)}. Set list_key to the key of its list."
        )
    for index, record in enumerate(tree):
        yield f"row {index}", record if isinstance(record, dict) else _no_object(record)


def _keys_of(tree: object) -> str:
    return f" (its keys are {', '.join(list(tree)[:8])})" if isinstance(tree, dict) and tree else ""


def _csv_records(opened: TextIO, delimiter: str, shown: str) -> Records:
    csv.field_size_limit(_LONGEST_CELL)
    # strict: a quote that is never closed would otherwise swallow the rest of the file.
    rows = csv.reader(opened, delimiter=delimiter, strict=True)
    line = 1
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{shown} has the column {twice} twice. Rename one.")
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) == len(names):
                yield f"line {line}", dict(zip(names, cells, strict=True))
            elif cells:
                rule = f"has {len(cells)} values, the header has {len(names)}"
                yield f"line {line}", Fault(rule, ("Put values that hold the delimiter in quotes",))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{shown} is not CSV from line {line} on ({error}). Mend its quotes.") from None
