"""A program that holds a run's processes together: `process_guard.py FOLDER COMMAND …` starts the command and waits.

Promise: when its standard input closes, by the run's end or by the driver's death, every process that descends from the command is ended,
also one in a session of its own or whose parents are gone, and the folder is removed. It stands in a session of its own and heeds no
signal that asks to end, so that it can do so whatever else is ended first. Needs neither Ray nor this package.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

KEEP_LOGS = b"keep the logs"
"""On standard input before it closes: the folder stays."""
TEMP = "t"
"""In the folder: where the processes put their temporary files; it is removed in any case. Unix sockets in it have short paths to spare."""

_PR_SET_CHILD_SUBREAPER = 36
_POLITE_S = 2.0
_KILL_S = 5.0


def main(folder: Path, command: list[str]) -> None:
    """Starts the command, which has this process's standard output, and ends it when standard input closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler rather than SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    if sys.platform == "linux":
        # Orphans come to this process instead of to init.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    (folder / TEMP).mkdir()
    subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(folder / TEMP)})
    # The command's end must show as the end of its output.
    os.close(1)
    told = _read_to_end(0)
    end_descendants()
    shutil.rmtree(folder / TEMP if KEEP_LOGS in told else folder, ignore_errors=True)


def _read_to_end(source: int) -> bytes:
    told = b""
    while True:
        if select.select([source], [], [], 1.0)[0]:
            part = os.read(source, 1024)
            if not part:
                return told
            told += part
        _reap()


def end_descendants() -> None:
    """Asks all processes that descend from this one to end, and after a grace kills what is left."""
    asked_at = time.monotonic()
    asked: set[psutil.Process] = set()
    while (left := _descendants()) and time.monotonic() - asked_at < _POLITE_S + _KILL_S:
        is_over = time.monotonic() - asked_at >= _POLITE_S
        for process in left:
            if is_over or process not in asked:
                _send(process, signal.SIGKILL if is_over else signal.SIGTERM)
        asked.update(left)
        time.sleep(0.05)


def _descendants() -> list[psutil.Process]:
    _reap()
    return [process for process in psutil.Process().children(recursive=True) if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: int) -> None:
    # It may have ended, or have become another user's.
    with suppress(psutil.Error):
        process.send_signal(number)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
