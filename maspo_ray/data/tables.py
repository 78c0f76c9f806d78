"""Tables → records: Parquet files, what `save_to_disk` of `datasets` wrote, datasets of the hub.

Promise: a record has a value for each column, of Python's own types; a table that cannot be read is a `ConfigError` of one line. `datasets`
takes a second or more to import, so that happens only where it is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maspo_ray.config import HuggingFaceSource, SavedSource
from maspo_ray.data.bad_rows import Fault
from maspo_ray.errors import ConfigError

Record = dict[str, Any]
Records = Iterator[tuple[str, Record | Fault]]
"""(place of the row, the row) of each."""


def hub_records(source: HuggingFaceSource, where: str) -> Records:
    """Returns the records of a dataset of the hub, or of a folder laid out like one; at most `limit`, so that no more are kept in memory."""
    from datasets import load_dataset

    field = where.partition(".name")[0]
    with _one_line(where, f"Check {field}.name, subset and split, and whether the hub can be reached"):
        data = load_dataset(source.name, source.subset, split=source.split)
        if source.limit is not None:
            data = data.select(range(min(source.limit, len(data))))
        records = data.to_list()
    return _numbered(records)


def parquet_records(files: list[Path], where: str) -> Records:
    """Returns the records of Parquet files, each with the columns that it has."""
    # By pyarrow, as `datasets` does: alone it loads at once, and keeps no copy of a file in a cache.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for file in files:
        prefix = f"{file}, " if len(files) > 1 else ""
        try:
            with ParquetFile(file) as opened:
                records = opened.read().to_pylist()
        except (ArrowException, OSError) as error:
            shown = file if len(files) > 1 else "the file"
            cause = " ".join(str(error).split())
            raise ConfigError(f"{where}; {shown} cannot be read ({cause}). Give Parquet files.") from None
        for index, record in enumerate(records):
            yield f"{prefix}row {index}", record


def saved_records(source: SavedSource, where: str) -> Records:
    """Returns the records of a folder that `datasets` wrote by `save_to_disk`."""
    from datasets import Dataset, load_from_disk

    if not source.path.is_dir():
        raise ConfigError(f"{where}; there is no such folder. Give one that save_to_disk of datasets wrote.")
    field = where.partition(".path")[0]
    with _one_line(where, "Give a folder that save_to_disk of datasets wrote"):
        data = load_from_disk(str(source.path))
    if not isinstance(data, Dataset):
        if source.split is None and len(data) > 1 or source.split is not None and source.split not in data:
            raise ConfigError(f"{where}; it holds the splits {', '.join(data)}. Set {field}.split to one of them.")
        data = data[source.split or next(iter(data))]
    elif source.split is not None:
        raise ConfigError(
            f"{field}.split is {source.split}; {source.path} holds one dataset without splits. Remove it."
        )
    with _one_line(where, "Save it again"):
        records = data.to_list()
    return _numbered(records)


def _numbered(records: list[Record]) -> Records:
    for index, record in enumerate(records):
        yield f"row {index}", record


@contextmanager
def _one_line(where: str, remedy: str) -> Iterator[None]:
    """Within, whatever `datasets` raises is one line."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except Exception as error:
        # The library raises errors of its own, of Arrow, of the hub's client and of the operating system, which have no base class but this.
        # That a file cannot be read it says without the cause, from which it raises.
        root = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        cause = " ".join(f"{type(root).__name__}: {root}".split())
        raise ConfigError(f"{where}; loading it fails: {cause}. {remedy}.") from error
