"""The Ray that a run uses: the one that it is told of, or one of its own.

Promise: another's Ray is left as it was found, and one that does not answer is said in one line by `placement.wait_s`; a Ray of the run's
own is `own_ray`'s.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ConfigError
from maspo_ray.fleet.own_ray import connect, disconnect, own_ray

# Prints why the cluster is not to be talked to, nothing where it is. Ray itself would try 20 times and write its reason to the process's
# standard error alone.
_PROBE = "import sys\nfrom ray._raylet import GcsClient\ntry: GcsClient(address=sys.argv[1])\nexcept Exception as e: print(e)"
_IMPORT_S = 10.0


@contextmanager
def connected(placement: PlacementConfig) -> Iterator[bool]:
    """Connects to Ray for the run's time; yields whether nodes may still join it (it is not the run's own).

    Raises:
        ConfigError: no Ray answers at the address, or it refuses this process.
    """
    address = placement.address or os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield True
    elif address:
        where = f"{'placement.address' if placement.address else 'RAY_ADDRESS'} is {address}"
        _connect(where, address, placement.wait_s)
        try:
            yield True
        finally:
            disconnect()
    else:
        with own_ray(placement):
            yield False


def object_store_bytes() -> float:
    """Returns the object stores' size, all nodes together."""
    return float(ray.cluster_resources().get("object_store_memory", 0.0))


def object_store_used_bytes() -> float:
    """Returns how much of it is in use; what is small Ray keeps in the process that owns it, and does not count here."""
    return object_store_bytes() - float(ray.available_resources().get("object_store_memory", 0.0))


def _connect(where: str, address: str, wait_s: float) -> None:
    remedy = "Start one, or leave the address out for a Ray of the run's own."
    try:
        _check_answer(where, address, wait_s)
        connect(address)
    except (ConnectionError, ray.exceptions.AuthenticationError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}; no Ray can be reached there ({str(error).splitlines()[0]}). {remedy}") from None


def _check_answer(where: str, address: str, wait_s: float) -> None:
    """Checks that a cluster answers at `host:port`, with Ray's client or without; of other addresses Ray itself judges at once."""
    is_client = address.startswith("ray://")
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=wait_s).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{where}; nothing answers there within placement.wait_s ({wait_s:g} s: {error}). Start a Ray there, or leave the "
            "address out for one of the run's own."
        ) from None
    if not is_client:
        refusal = _refusal(address, wait_s)
        if "AuthToken" in refusal:
            raise ConfigError(
                f"{where}; its Ray refuses this process's token. Give the cluster's in RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token."
            )
        if refusal:
            raise ConfigError(
                f"{where}; what answers there is no Ray that can be used ({refusal}). Give the address of one."
            )


def _refusal(address: str, wait_s: float) -> str:
    """Returns why a cluster does not talk to a process like this one, "" where it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, address],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=wait_s + _IMPORT_S,
        )
    except subprocess.TimeoutExpired:
        return f"it says nothing within {wait_s:g} s"
    return " ".join(done.stdout.split())
