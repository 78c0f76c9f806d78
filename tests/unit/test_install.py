"""`make setup`'s installer, with pip itself and package indexes of the test's own on this machine: who is asked for what, and what is said."""

import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "requirements" / "install.py"


def _wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


class _Index(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with a lock, and the address of two indexes: `/pypi/`, and `/cpu/`, which has torch and a stranger's `other`."""
    folder = tmp_path_factory.mktemp("house")
    _wheel(folder / "site/pypi/other", "other", "1.0")
    _wheel(folder / "site/cpu/torch", "torch", "2.13.0+cpu")
    _wheel(folder / "site/cpu/other", "other", "1.0")
    (folder / "lock.txt").write_text("other==1.0\ntorch==2.13.0+cpu\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, directory=str(folder / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _install(folder: Path, pypi: str, torch_index: str, lock: str = "lock.txt") -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV"))}
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": pypi,
        "TORCH_CPU_INDEX": torch_index,
        "PIP_RETRIES": "1",
    }
    _Index.asked.clear()
    command = [sys.executable, str(SCRIPT), str(folder / "venv"), str(folder / lock)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def _silent_address() -> str:
    """Returns the address of a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/cpu/"


def test_setup_that_fails_names_the_package_where_it_looked_and_what_to_do_and_the_next_try_goes_on(
    house: tuple[Path, str],
) -> None:
    folder, address = house
    silent = _silent_address()
    done = _install(folder, f"{address}/pypi/", silent)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: torch==2.13.0+cpu is not installed; looked for at {address}/pypi/ (")
    assert f" and at {silent} (it gave no answer)" in line
    assert "set TORCH_CPU_INDEX to a mirror of PyTorch's CPU builds." in line
    assert "no answer about torch, trying again" in done.stdout
    # PyTorch's index is asked for torch alone, though it has the other package too.
    done = _install(folder, f"{address}/pypi/", f"{address}/cpu/")
    assert done.returncode == 0, done.stderr
    assert {path for path in _Index.asked if path.startswith("/cpu/") and path.endswith("/")} == {"/cpu/torch/"}
    assert any(path.startswith("/pypi/other/") for path in _Index.asked)
    assert f"not there; torch==2.13.0+cpu from {address}/cpu/" in done.stdout
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    assert (site / "torch.py").is_file() and (site / "other.py").is_file()
    # One that is nowhere.
    (folder / "more.txt").write_text("other==1.0\nabsent==3.0\ntorch==2.13.0+cpu\n")
    done = _install(folder, f"{address}/pypi/", silent, "more.txt")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"error: absent==3.0 is not installed; looked for at {address}/pypi/: ")
    assert line.endswith(f"The whole log is {folder / 'venv' / 'setup.log'}.")


def test_setup_by_a_python_that_the_lock_is_not_for_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import runpy, sys; sys.version_info = (3, 14, 0); sys.version = '3.14.0 (main)'\n"
        f"sys.argv = ['install.py', {str(tmp_path / 'venv')!r}, 'lock']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: PYTHON is 3.14.0; the lock is for Python 3.11 to 3.13. Set it to one")
    assert not (tmp_path / "venv").exists()
