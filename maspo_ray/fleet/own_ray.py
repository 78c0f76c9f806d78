"""A Ray of the run's own, on this machine.

Promise: it is gone when the run is, with every process that it started, whatever ended the run; what this process had started before is
left alone. Only who holds its token is served, and the token is in no file. Its logs stay where an error ended the run that may have
begun in an actor.
"""

import getpass
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.fleet import process_guard, ray_node
from maspo_ray.stop_signals import handlers_kept
from maspo_ray.threads import call_within, start_call

_DISCONNECT_S = 8.0
"""Ray 2.60 takes 5 s to let go of a node that has died."""
_END_S = 12.0


@contextmanager
def own_ray(placement: PlacementConfig) -> Iterator[None]:
    """Starts Ray and connects to it; ends it at the end.

    Raises:
        RunError: it does not start.
    """
    # Unix sockets have short paths, so the folder must lie near the root.
    try:
        folder = Path(tempfile.mkdtemp(prefix="maspo-", dir="/tmp" if os.path.isdir("/tmp") else None))
    except OSError as error:
        raise RunError(f"Ray needs a folder for its sockets and logs; it cannot be made ({error}).") from None
    guard = None
    with _own_token():
        try:
            guard = _Guarded(folder, placement)
            connect(guard.address())
            yield
        except ConfigError:
            raise
        # Not an interruption, which is no `Exception`.
        except Exception as error:
            # The engines' own last words may be needed to understand what happened.
            error.add_note(f"the actors' logs are in {folder}/session_latest/logs")
            if guard is not None:
                guard.keep_logs()
            raise
        finally:
            disconnect()
            if guard is not None:
                guard.end()
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _lasting_caches() -> dict[str, str]:
    """Returns the environment that keeps what torch compiles from run to run, though the actors' temporary files go with each."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return {}
    # As torch 2.13 itself would name it.
    return {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir(), f"torchinductor_{user}"))}


def connect(address: str) -> None:
    """Connects this process to a Ray that answers; can be interrupted."""
    # Ray 2.60 has a SIGTERM abort the process, with a trace of its stack.
    with handlers_kept() as a_signal_waits:
        # In a thread, since a signal would have to wait for it.
        call = start_call(
            lambda: ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False
            )
        )
        while not call.done() and not a_signal_waits():
            wait([call], timeout=0.1)
    call.result()


def disconnect() -> None:
    """Lets go of Ray, within a deadline where it has died."""
    with suppress(TimeoutError):
        call_within(_DISCONNECT_S, ray.shutdown)


class _Guarded:
    """A guard (`process_guard`) and the Ray that it has started."""

    def __init__(self, folder: Path, placement: PlacementConfig) -> None:
        parameters = {
            "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "object_store_memory": int(placement.object_store_gib * 2**30),
        }
        # -P: of the folder of a program nothing is imported.
        python = [sys.executable, "-P"]
        command = [*python, ray_node.__file__, str(folder), json.dumps(parameters)]
        self._errors = folder / "start.err"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*python, process_guard.__file__, str(folder), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # A Ray that lives as long as one run has nothing to report, unless the user says so.
                env={"RAY_USAGE_STATS_ENABLED": "0", **_lasting_caches(), **os.environ},
                start_new_session=True,
            )

    def address(self) -> str:
        """Returns where its Ray answers, once it does.

        Raises:
            RunError: it has not started.
        """
        assert self._process.stdout is not None
        address = self._process.stdout.readline().decode().strip()
        if not address:
            said = self._errors.read_text(errors="replace").strip().splitlines()
            raise RunError(f"Ray did not start: {said[-1] if said else 'it said nothing'}")
        return address

    def keep_logs(self) -> None:
        """Leaves Ray's logs where they are when it ends."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(process_guard.KEEP_LOGS)
            self._process.stdin.flush()

    def end(self) -> None:
        """Ends Ray and all that descends from it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()


@contextmanager
def _own_token() -> Iterator[None]:
    """Within, Ray asks for a token that only this process and what it starts know; a user who turned that off is heard."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        yield
        return
    # Ray's own default would write one into the home folder, which need not be writable.
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    _read_token_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_token_again()


def _read_token_again() -> None:
    # As Ray 2.60 itself does when it turns the token on; it keeps both in memory.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
