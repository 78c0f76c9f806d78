"""`examples/ray_job` as a user runs it: a cluster whose Python lacks the project, and a job that brings it in its working directory."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.engine]

# Ray 2.60 asks for a token; without one in the environment it would write its own into the home folder.
TOKEN = secrets.token_hex(32)

# A reward of the user's own beside the project. It also tells where its process found the code, and what was sent.
REWARDS = """
import json
import os
from pathlib import Path

import actors.rewards
import maspo_ray


class TellingReward:
    def __init__(self, report):
        self._report = Path(report)

    def setup(self):
        found = {"cwd": os.getcwd(), "files": [__file__, maspo_ray.__file__, actors.rewards.__file__]}
        found["sent"] = sorted(os.listdir("."))
        self._report.write_text(json.dumps(found))

    def score(self, prompt, completions):
        return [float(sum(completion.token_ids) % 2 == 0) for completion in completions]
"""


@dataclass(frozen=True, slots=True)
class Head:
    process: psutil.Process
    address: str

    def of_a_run(self) -> list[str]:
        """Returns the cluster's processes that are a driver's or an actor's of a run."""
        commands = []
        for child in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                commands.append(" ".join(child.cmdline()))
        marks = ("maspo_ray", "ray::VLLM", "ray::Reward", "ray::HFRef", "ray::DeepSpeed")
        return [command for command in commands if any(mark in command for mark in marks)]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _python_without_the_project(folder: Path) -> Path:
    """Returns an interpreter that has the packages of this one, but none that is installed editable, as the project is."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # Only a site's own .pth files are read, not those in a folder that one of them names.
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    probe = subprocess.run(
        [python, "-c", "import maspo_ray"], cwd=folder, env=_environment(python), capture_output=True
    )
    assert b"ModuleNotFoundError" in probe.stderr, "the project is installed in a way that cannot be hidden from a node"
    return python


def _environment(python: Path) -> dict[str, str]:
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    path = f"{python.parent}{os.pathsep}{mine['PATH']}"
    return {**mine, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node in a process group of its own, with a job server."""
    # Unix sockets under it have paths of at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="maspo", dir="/tmp"))
    port, dashboard, agent, client = _free_ports(4)
    python = _python_without_the_project(folder / "venv")
    arguments = {
        "port": port,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "ray-client-server-port": client,
        "node-ip-address": "127.0.0.1",
        "temp-dir": folder / "ray",
        "num-cpus": 2,
        "object-store-memory": 100 * 2**20,
    }
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    with (folder / "head.log").open("w") as log:
        started = subprocess.Popen(
            [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags],
            cwd=folder,
            env=_environment(python),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process, address = psutil.Process(started.pid), f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for_job_server(started, address, folder / "head.log")
        yield Head(process, address)
    finally:
        ending = [process, *process.children(recursive=True)] if started.poll() is None else []
        started.terminate()
        _, alive = psutil.wait_procs(ending, timeout=15)
        for left in alive:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        psutil.wait_procs(alive, timeout=5)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_job_server(started: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and started.poll() is None:
        try:
            urlopen(f"{address}/api/version", timeout=2).close()
            return
        except HTTPError:
            # It answers, if only that it wants the token.
            return
        except (URLError, OSError):
            pass
        time.sleep(0.2)
    pytest.fail(f"the cluster did not come up: {log.read_text()}")


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files as git would hand them on, a user's reward, and what must not be sent."""
    folder = tmp_path_factory.mktemp("repository")
    names = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in (".venv/lib/large", ".git/objects/large", "runs/old/final/large", "examples/quickstart/model/large"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not to be sent")
    (folder / "telling_rewards.py").write_text(REWARDS)
    return folder


def _submit(head: Head, directory: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/ray_job/submit.py", "--address", head.address, "--folder", folder, *overrides],
        cwd=directory,
        env=_environment(Path(sys.executable)),
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_submitted_job_trains_with_nothing_but_its_working_directory(
    head: Head, working_directory: Path, tmp_path: Path
) -> None:
    prepare = [sys.executable, "examples/quickstart/prepare.py", "--folder", str(tmp_path / "quickstart")]
    subprocess.run([*prepare, "--max-steps", "30"], cwd=ROOT, check=True, timeout=150, capture_output=True)
    report = tmp_path / "report.json"
    job = _submit(
        head,
        working_directory,
        tmp_path,
        *("--reward.actor", "telling_rewards:TellingReward", "--reward.args", json.dumps({"report": str(report)})),
        *("--pipeline.steps", "3", "--pipeline.groups_per_step", "4", "--pipeline.filter_zero_variance", "false"),
        *("--eval.every", "0", "--data.eval.limit", "16", "--logging.curves", "false"),
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "SUCCEEDED" in job.stdout and "Run finished: 3 steps" in job.stdout

    [run] = (tmp_path / "runs").iterdir()
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    groups = json.loads((run / "summary.json").read_text())["groups"]
    assert groups["submitted"] == len(ledger) == sum(groups.values()) - groups["submitted"]
    assert groups["trained"] == 3 * 4
    assert (run / "final" / "model.safetensors").exists()

    found = json.loads(report.read_text())
    assert Path(found["cwd"]).parent.name == "working_dir_files"
    assert all(Path(file).is_relative_to(found["cwd"]) for file in found["files"])
    assert {"actors", "examples", "maspo_ray", "telling_rewards.py"} <= set(found["sent"])
    assert not {".venv", ".git", "runs"} & set(found["sent"])

    deadline = time.monotonic() + 10
    while head.of_a_run() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert head.of_a_run() == []


def test_submitted_job_with_a_wrong_key_fails_and_says_why(head: Head, working_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "quickstart" / "model").mkdir(parents=True)
    (tmp_path / "quickstart" / "data").mkdir()
    for name in ("model/config.json", "data/heldout.jsonl"):
        (tmp_path / "quickstart" / name).write_text("{}")
    job = _submit(head, working_directory, tmp_path, "--objective.alfa", "0.5")
    assert job.returncode == 1
    assert "error: " in job.stdout and "objective.alfa" in job.stdout
    assert "FAILED" in job.stdout and "Traceback" not in job.stdout
    assert not (tmp_path / "runs").exists()


def test_submit_with_a_folder_that_depends_on_the_job_is_refused(head: Head, working_directory: Path) -> None:
    job = _submit(head, working_directory, Path("shared"))
    assert job.returncode == 2
    assert "--folder is shared; it must be absolute" in job.stderr
