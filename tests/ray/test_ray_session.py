"""A Ray of the run's own: its logs stay where an error may have begun in an actor, and only there."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray._private.worker

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ActorGone, ConfigError, RunError
from maspo_ray.fleet.calls import await_named
from maspo_ray.fleet.ray_session import connected

pytestmark = pytest.mark.ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
PLACEMENT = PlacementConfig(object_store_gib=0.1)


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (RunError("an actor failed"), True),
        (KeyError("a bug of our own"), True),
        (ConfigError("pipeline.steps is 0"), False),
        (KeyboardInterrupt(), False),
        (None, False),
    ],
    ids=["run error", "bug", "config error", "interruption", "no error"],
)
def test_logs_of_an_own_ray_stay_for_what_may_have_begun_in_an_actor(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, is_kept: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, logs = Path(), Path()
    try:
        with connected(PLACEMENT):
            logs = Path(ray._private.worker._global_node.get_logs_dir_path())
            folder = logs.parents[1]
            assert any(logs.iterdir())
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    try:
        assert folder.exists() is is_kept
        if error is not None and is_kept:
            assert error.__notes__ == [f"the actors' logs are in {folder}/session_latest/logs"]
            assert any(logs.glob("raylet*"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Idle:
    async def wait(self) -> None:
        await asyncio.sleep(60.0)


def test_actor_that_ray_ends_to_save_memory_is_gone_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    memory = psutil.virtual_memory()
    # Below what is in use, so that Ray takes the node to be out of memory at once.
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{memory.used / memory.total / 100:.4f}")
    with pytest.raises(ActorGone) as raised, connected(PLACEMENT):
        idle: Any = ray.remote(Idle).options(num_cpus=0).remote()
        asyncio.run(asyncio.wait_for(await_named("rollout/0", "generating", idle.wait.remote()), 50.0))
    line = str(raised.value)
    assert line.startswith("rollout/0 was lost while generating: ") and "memory" in line and "\n" not in line
    shutil.rmtree(Path(raised.value.__notes__[0].removeprefix("the actors' logs are in ")).parents[1])


def _refused(address: str, wait_s: float = 2.0) -> str:
    with pytest.raises(ConfigError) as raised, connected(PlacementConfig(address=address, wait_s=wait_s)):
        pass
    assert not ray.is_initialized()
    [line] = str(raised.value).splitlines()
    return line


def test_address_where_nothing_answers_is_one_line_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            started = time.monotonic()
            line = _refused(address)
            assert time.monotonic() - started < 3
            assert line.startswith(
                f"placement.address is {address}; nothing answers there within placement.wait_s (2 s: [Errno 111]"
            )
    assert "no Ray can be reached there (Invalid address format: rubbish)" in _refused("rubbish")
    assert "nothing answers there" in _refused("no-such-host.invalid:6379")


@pytest.mark.slow
def test_address_where_something_else_answers_is_one_line() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        line = _refused(f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "what answers there is no Ray that can be used (" in line


def test_own_ray_refuses_others_tokens_writes_nothing_at_home_and_spares_the_callers_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # Where nothing can be written.
    monkeypatch.setenv("HOME", "/proc/nobody")
    before = subprocess.Popen(["sleep", "60"])
    with connected(PLACEMENT):
        during = subprocess.Popen(["sleep", "60"])
        address = ray.get_runtime_context().gcs_address
        where: Any = ray.remote(tempfile.gettempdir).options(num_cpus=0)
        temp = Path(ray.get(where.remote()))
        # A name of 36 characters in it is a path that a Unix socket can have.
        assert temp.is_dir() and temp.parent.name.startswith("maspo-") and len(str(temp)) < 107 - 37
        other = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
        program = (
            "import sys\nfrom maspo_ray.config import PlacementConfig\nfrom maspo_ray.fleet.ray_session import connected\n"
            "with connected(PlacementConfig(address=sys.argv[1], wait_s=5)): pass"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, address],
            env={**os.environ, **other},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.stderr.splitlines()[-1] == (
        f"maspo_ray.errors.ConfigError: placement.address is {address}; its Ray refuses this process's token. "
        "Give the cluster's in RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token."
    )
    assert "gcs_client" not in done.stderr
    assert not temp.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ
    for process in (before, during):
        assert process.poll() is None
        process.kill()
        process.wait()
