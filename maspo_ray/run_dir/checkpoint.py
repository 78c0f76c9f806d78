"""What a run saves after a step: the model, and beside it the learner's state, from which the next step can be made again.

Promise: a folder that has a checkpoint's name is whole, and its list of files says what is whole. Does not know what the learner writes.
"""

import json
import shutil
from pathlib import Path

from maspo_ray.errors import ConfigError, RunError

STATE, _FILES = "state", "state_files.json"


def begin_checkpoint(folder: Path) -> Path:
    """Returns the folder to save a checkpoint into: the model, and in `STATE` what every learner rank writes of its state."""
    partial = folder.resolve().with_name(f".{folder.name}")
    # Of a run that ended while it saved.
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def end_checkpoint(partial: Path, folder: Path) -> None:
    """Gives a checkpoint its name, once all ranks have saved.

    Raises:
        RunError: what they saved is not where this process looks for it.
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
    """Returns the folder of a checkpoint's state, of which every file is there in its whole length.

    Raises:
        ConfigError: one is not.
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
