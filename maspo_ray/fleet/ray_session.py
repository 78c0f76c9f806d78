"""The Ray that a run uses: the one that it is told of, or one of its own.

Promise: a Ray of the run's own is gone when the run is, with every process that it started; its logs stay where an error ended the run
that may have begun in an actor; another's Ray is left as it was found.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import ray

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ConfigError

_EXIT_S = 3.0


@contextmanager
def connected(placement: PlacementConfig) -> Iterator[bool]:
    """Connects to Ray for the run's time; yields whether nodes may still join it (it is not the run's own)."""
    address = placement.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield True
    elif address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False)
        except ConnectionError as error:
            raise ConfigError(
                f"placement.address is {address}; no Ray answers there ({str(error).splitlines()[0]}). "
                "Start one, or leave the address out for a Ray of the run's own."
            ) from None
        try:
            yield True
        finally:
            ray.shutdown()
    else:
        yield from _own(placement)


def object_store_bytes() -> float:
    """Returns the object stores' size, all nodes together."""
    return float(ray.cluster_resources().get("object_store_memory", 0.0))


def object_store_used_bytes() -> float:
    """Returns how much of it is in use; what is small Ray keeps in the process that owns it, and does not count here."""
    return object_store_bytes() - float(ray.available_resources().get("object_store_memory", 0.0))


def _own(placement: PlacementConfig) -> Iterator[bool]:
    # Unix sockets have short paths, so the folder must lie near the root.
    folder = tempfile.mkdtemp(prefix="maspo-", dir="/tmp" if os.path.isdir("/tmp") else None)
    keep_logs = False
    try:
        # Its dashboard and usage report are not for a Ray that lives as long as one run.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            _temp_dir=folder,
            num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            include_dashboard=False,
            object_store_memory=int(placement.object_store_gib * 2**30),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield False
    except ConfigError:
        raise
    # Not an interruption, which is no `Exception`.
    except Exception as error:
        # The engines' own last words may be needed to understand what happened.
        error.add_note(f"the actors' logs are in {folder}/session_latest/logs")
        keep_logs = True
        raise
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        _end(started)
        if not keep_logs:
            shutil.rmtree(folder, ignore_errors=True)


def _end(processes: list[psutil.Process]) -> None:
    """Waits for processes to end, and ends those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=_EXIT_S)
