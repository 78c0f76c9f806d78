"""Checkpoints: the model after a step, and beside it the learner's state, from which the next step can be made again.

Promise: a folder with a checkpoint's name is complete, since it is renamed only after every rank has saved; its list of the state's files
and their sizes shows later whether it still is. What those files hold is the learner's.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maspo_ray.errors import ConfigError, RunError

STATE, _FILES = "state", "state_files.json"
"""In a checkpoint: the folder of the learner's state, and the list of its files."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder to write into, which gets the name of `folder` when all is written: a folder that has the name is complete.

    Args:
        folder: does not exist, or is empty.

    Raises:
        RunError: this process does not find what was written.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    if not partial.is_dir():
        raise RunError(
            f"the learner saved its model into {partial.resolve()}, where the driver finds nothing. Take a run_dir that all nodes "
            "share; the model is in that folder of the node of learner/0."
        )
    partial.rename(folder)


def begin_checkpoint(folder: Path) -> Path:
    """Returns the hidden folder to save a checkpoint into: the model in it, the learner's state in its `STATE`, which all ranks write."""
    partial = folder.resolve().with_name(f".{folder.name}")
    # Left by a run that ended while it saved.
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def end_checkpoint(partial: Path, folder: Path) -> None:
    """Gives a checkpoint its final name, once all ranks have saved.

    Raises:
        RunError: this process does not find the state: a rank on another node saved it to a disk of its own.
    """
    paths = [path for path in partial.glob(f"{STATE}/**/*") if path.is_file()]
    if not paths:
        raise RunError(
            f"the learner saved its state into {partial / STATE}, where the driver finds nothing. Take a run_dir that all "
            "nodes share."
        )
    files = {str(path.relative_to(partial)): path.stat().st_size for path in paths}
    (partial / _FILES).write_text(json.dumps(files, indent=2) + "\n")
    partial.rename(folder)


def state_of(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's learner state, having checked that each of its files exists and has its full size.

    Raises:
        ConfigError: the checkpoint, its list of files or one of them is missing, or a file is shorter or longer than it was.
    """
    where = f"the checkpoint is {checkpoint}"
    remedy = "Restore it, or begin at another step with --start (0 is the start of the run)"
    if not checkpoint.is_dir():
        raise ConfigError(f"{where}; it is gone. {remedy}.")
    try:
        files: dict[str, int] = json.loads((checkpoint / _FILES).read_text())
    except (OSError, ValueError):
        raise ConfigError(f"{where}; it has no list of the learner's state ({_FILES}). {remedy}.") from None
    for name, size in files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            fault = f"{name} is gone" if found is None else f"{name} has {found} of {size} bytes"
            raise ConfigError(f"{where}; its {fault}. {remedy}.")
    return checkpoint / STATE
