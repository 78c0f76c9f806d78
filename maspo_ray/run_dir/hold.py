"""RUN_DIR belongs to one run at a time, and to a run that has made something for good.

Promise: two runs never write into one folder, also where both begin at once; the lock is the operating system's, so that a run that has
died holds none. A run that made no step, evaluation or model stands in no other's way: what it left is cleared by the next, and at once
where the input was at fault. Files that no run has written are never touched.
"""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from maspo_ray.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""By this file a folder is known to have been a run's; it stays."""
_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "ledger.jsonl",
    "eval.jsonl",
    "notes.jsonl",
    "left_out.jsonl",
    ".room",
    "timeline.json",
    "summary.json",
    "curves.png",
)
_WRITTEN = (*_FILES, "tensorboard", "steps", "checkpoints")
_PARTIAL = (".*.partial", "checkpoints/.*", "steps/*.partial")


def check_run_dir(run_dir: Path, resume: bool) -> None:
    """Checks that the run's folder can be written to and holds no other run.

    Raises:
        ConfigError: it cannot, or it does; or `resume` is set, which is not supported yet.
    """
    if resume:
        saved = _newest_model(run_dir)
        remedy = f"with --model.path {saved} and another --run_dir" if saved else "without --resume"
        raise ConfigError(f"--resume is given; resuming is not supported yet. Start a new run {remedy}.")
    where = f"run_dir is {run_dir}"
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{where}; {'it' if there == run_dir else there} is a file. Give a new run_dir.")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{where}; {there} cannot be written to. Give a run_dir that can.")
    if _is_locked(run_dir / LOCK):
        raise _held(run_dir)
    if _stands_in_the_way(run_dir):
        raise _taken(run_dir)
    for path in map(run_dir.joinpath, _FILES):
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise ConfigError(f"{where}; {path} cannot be written to. Remove it, or give a new run_dir.")


@contextmanager
def held_run_dir(run_dir: Path) -> Iterator[None]:
    """Holds a folder, which is made where there is none, for the time of a run.

    Raises:
        ConfigError: another run holds it, or has made something in it; or it cannot be written to.
    """
    if _stands_in_the_way(run_dir):
        raise _taken(run_dir)
    was_there, was_a_runs = run_dir.exists(), (run_dir / LOCK).exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(run_dir)
    except OSError as error:
        raise ConfigError(f"run_dir is {run_dir}; it cannot be written to ({error}). Give one that can.") from error
    with lock:
        # Another may have begun and ended since.
        if _has_made_something(run_dir):
            raise _taken(run_dir)
        if was_a_runs:
            _clear(run_dir, spared=())
        others = [path.name for path in run_dir.iterdir()]
        try:
            yield
        except (ConfigError, KeyboardInterrupt):
            if not _has_made_something(run_dir):
                _clear(run_dir, spared=others)
                if not was_there:
                    _remove_empty(run_dir)
            raise


def remove_partial(run_dir: Path) -> None:
    """Removes what was being saved when the run ended."""
    for pattern in _PARTIAL:
        for path in run_dir.glob(pattern):
            _remove(path)


def _take_lock(run_dir: Path) -> BinaryIO:
    path = run_dir / LOCK
    while True:
        lock = path.open("a+b")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise _held(run_dir) from None
        except OSError as error:
            # Some network file systems have none.
            logger.warning(
                "run_dir is %s; its file system has no locks (%s), so that nothing keeps a second run out.",
                run_dir,
                error,
            )
            return lock
        # A run that cleared its folder may have removed the file between the two calls.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                lock.truncate(0)
                lock.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
                lock.flush()
                return lock
        lock.close()


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _held(run_dir: Path) -> ConfigError:
    who = "another run"
    with suppress(OSError, ValueError):
        host, pid = (run_dir / LOCK).read_text().split()
        who = f"the run of process {pid} on {host}"
    return ConfigError(f"run_dir is {run_dir}; {who} is writing into it. Give another run_dir, or wait for its end.")


def _stands_in_the_way(run_dir: Path) -> bool:
    if _has_made_something(run_dir):
        return True
    # Without the lock's file these are not a run's that is known to have made nothing.
    return not (run_dir / LOCK).exists() and any((run_dir / name).exists() for name in ("metrics.jsonl", "config.yaml"))


def _has_made_something(run_dir: Path) -> bool:
    """Returns whether a run has made a step, an evaluation or a model."""
    written = (run_dir / name for name in ("metrics.jsonl", "eval.jsonl"))
    if any(path.is_file() and path.stat().st_size for path in written):
        return True
    return (run_dir / "final").exists() or any(run_dir.glob("checkpoints/step_*"))


def _clear(run_dir: Path, spared: Sequence[str]) -> None:
    """Removes what a run that made nothing has written.

    Args:
        spared: names of what was there before it.
    """
    remove_partial(run_dir)
    for name in _WRITTEN:
        if name not in spared:
            _remove(run_dir / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(run_dir: Path) -> None:
    (run_dir / LOCK).unlink()
    # It stays where a user has put something into it meanwhile.
    with suppress(OSError):
        run_dir.rmdir()


def _taken(run_dir: Path) -> ConfigError:
    kind = "a finished" if _is_finished(run_dir) else "an unfinished"
    return ConfigError(f"run_dir is {run_dir}; it already holds {kind} run. Give a new run_dir or remove it.")


def _is_finished(run_dir: Path) -> bool:
    """Returns whether the run in a folder came to its last step; the summary of one that did not says so."""
    if (run_dir / "final").exists():
        return True
    try:
        summary = json.loads((run_dir / "summary.json").read_text())
        return not (summary.get("interrupted", False) or summary.get("failure"))
    except (OSError, ValueError, AttributeError):
        return False


def _newest_model(run_dir: Path) -> Path | None:
    """Returns the folder of the model that a run saved last, None if it saved none."""
    if (run_dir / "final" / "config.json").is_file():
        return run_dir / "final"
    saved = [folder.parent for folder in run_dir.glob("checkpoints/step_*/config.json")]
    return max(saved, key=_step_of, default=None)


def _step_of(folder: Path) -> int:
    digits = re.findall(r"\d+", folder.name)
    return int(digits[-1]) if digits else -1
