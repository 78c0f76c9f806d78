"""Real runs on a real Ray that are asked to end by a signal: whole, in time, and with nothing left. Engines and learner are the test's
own, so that what is waited for is Ray and the run and not a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
MARK = "MASPO_TEST_ENDS"
"""In the environment of the run, and so of every process that it starts, whoever its parent is by then."""
WITHIN_S = 30.0
pytestmark = pytest.mark.ray

PLUGINS = """
import asyncio
import subprocess
import time
from pathlib import Path

import numpy as np

from maspo_ray.experience import Completion, Parity, PublishReport, UpdateReport, VersionSpan


class Engine:
    def __init__(self, **given):
        self._version = 0

    async def setup(self):
        pass

    async def sample(self, token_ids, *, sampling, seed, cache_key):
        await asyncio.sleep(0.02)
        spans = (VersionSpan(self._version, 0, 4),)
        return Completion(np.zeros(4, np.int32), np.zeros(4, np.float32), spans, "stop", str(seed))

    async def weight_checksum(self):
        return None

    async def check(self):
        pass

    async def finish_weight_update(self, weight_version):
        self._version = weight_version

    async def init_weight_transfer_engine(self, init_info):
        pass

    stage_weights = update_weights = init_weight_transfer_engine

    async def start_weight_update(self):
        pass

    async def shutdown(self):
        pass


class Learner:
    def __init__(self, *, save_s=0.0, fails_at=None, **given):
        self._save_s, self._fails_at = save_s, fails_at

    def rendezvous(self):
        return "127.0.0.1", 1

    def setup(self, master_address, master_port):
        pass

    def train_step(self, version, plans, *payloads):
        time.sleep(0.1)
        if version == self._fails_at:
            raise OSError(28, "No space left on device")
        metrics = {"tokens/trained": 16.0, "learner/skipped": 0.0}
        return [UpdateReport(metrics, True, (), {0: Parity(0.0, 0.0, 16)}) for _ in plans]

    def shares_prompts(self):
        return True

    def completion_logprobs(self, pairs):
        return [np.zeros(len(completion), np.float32) for _, completion in pairs]

    def connect(self, replicas, engines, workers_per_engine, backend, timeout_s):
        self._engines = engines

    def publish(self, version, replicas):
        import ray

        ray.get([engine.finish_weight_update.remote(version) for engine in self._engines])
        return PublishReport(0.0, ((0.0, 0.0),) * len(replicas))

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
        time.sleep(self._save_s)
        Path(folder, "model.safetensors").write_text("all of it")

    save_state = load_state = save

    def shutdown(self):
        pass


class Reward:
    def setup(self):
        # In a session of its own, and with a parent that is gone.
        subprocess.Popen("sleep 1000 & exec sleep 1000", shell=True, start_new_session=True)
        subprocess.run("setsid sleep 1000 > /dev/null 2>&1 & exit", shell=True)

    async def score(self, prompt, completions):
        return [float(int(completion.text) % 2) for completion in completions]
"""


class Run:
    """A run that is under way, in a session of its own."""

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.mark, self.folder = uuid4().hex, folder
        mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maspo_ray", "train", "run.yaml", *flags],
            cwd=folder,
            env={**mine, "PYTHONPATH": str(ROOT), MARK: self.mark, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.temp_folders: set[str] = set()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
                    self.temp_folders |= {part for part in process.cmdline() if part.startswith("/tmp/maspo-")}
            except psutil.Error:
                continue
        return found

    def await_moment(self, has_come: Callable[["Run"], bool]) -> None:
        deadline = time.monotonic() + 120
        while not has_come(self):
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.05)

    def end(self) -> tuple[str, str, float]:
        """Returns what the run printed, and the seconds that it took to end."""
        asked = time.monotonic()
        out, err = self.process.communicate(timeout=WITHIN_S + 30)
        return out, err, time.monotonic() - asked

    def summary(self) -> dict[str, object]:
        read: dict[str, object] = json.loads((self.folder / "run" / "summary.json").read_text())
        return read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run needs; the model is there for its tokenizer."""
    from prepare import build_model, build_tokenizer

    build_model(seed=0).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "ends_plugins.py").write_text(PLUGINS)
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1=", "answer": "2"}) + "\n" for a in range(9))
    )
    config = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": {"kind": "jsonl", "path": "data.jsonl"}, "chat_template": False, "max_prompt_tokens": 8},
        "rollout": {"actor": "ends_plugins:Engine", "group_size": 4, "max_new_tokens": 4, "cpus": 0.1},
        "reward": {"actor": "ends_plugins:Reward", "cpus": 0.1},
        "learner": {"actor": "ends_plugins:Learner", "cpus": 0.1},
        "pipeline": {"steps": 10_000, "groups_per_step": 2},
        "placement": {"object_store_gib": 0.1},
        "run_dir": "run",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*flags: str, **environment: str) -> Run:
        runs.append(Run(folder, *flags, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        for process in run.processes():
            process.kill()
        run.process.kill()
        run.process.communicate()


def _has_begun(run: Run) -> bool:
    time.sleep(0.5)
    return True


def _starts_ray(run: Run) -> bool:
    return any("raylet" in process.name() for process in run.processes())


def _trains(run: Run) -> bool:
    metrics = run.folder / "run" / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= 2


def _saves(run: Run) -> bool:
    return (run.folder / "run" / ".final.partial" / "config.json").exists()


def _to_driver(run: Run, number: int) -> None:
    run.process.send_signal(number)


def _to_group(run: Run, number: int) -> None:
    os.killpg(run.process.pid, number)
    # As `timeout` does: to the process, and to its group.
    os.kill(run.process.pid, number)


def _to_all(run: Run, number: int) -> None:
    """As systemd and Slurm do, to every process of the job."""
    for process in run.processes():
        process.send_signal(number)


def _assert_nothing_is_left(run: Run) -> None:
    deadline = time.monotonic() + 1.0
    while run.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process.cmdline() for process in run.processes()] == []
    assert not [path for path in run.temp_folders if Path(path).exists()]
    assert not list(run.folder.glob("run/.*.partial"))


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOMENTS = {"begun": _has_begun, "ray": _starts_ray, "trains": _trains, "saves": _saves}
TARGETS = {"driver": _to_driver, "group": _to_group, "all": _to_all}
QUICK = {("trains", "all", signal.SIGTERM)}


@pytest.mark.parametrize(
    ("moment", "target", "number"),
    [
        pytest.param(
            *case, id="-".join(map(str, case[:2])) + f"-{case[2].name}", marks=() if case in QUICK else pytest.mark.slow
        )
        for case in ((moment, target, number) for moment in MOMENTS for target in TARGETS for number in SIGNALS)
    ],
)
def test_signal_ends_a_run_whole_and_leaves_nothing(
    start: Callable[..., Run], moment: str, target: str, number: signal.Signals
) -> None:
    flags = ("--pipeline.steps", "2", "--learner.args", '{"save_s": 60}') if moment == "saves" else ()
    run = start(*flags)
    run.await_moment(MOMENTS[moment])
    run.processes()
    TARGETS[target](run, number)
    out, err, seconds = run.end()
    print(seconds, run.process.returncode, out, err)
    assert seconds < WITHIN_S
    _assert_nothing_is_left(run)
    if moment == "begun":
        # Before the interpreter has read the program, the signal is the operating system's affair.
        assert run.process.returncode in (130, -number), (out, err)
        return
    assert run.process.returncode == 130, (out, err)
    if moment == "ray":
        assert err == "interrupted before anything was saved\n"
        assert not (run.folder / "run").exists()
        return
    assert err == "" and "Run interrupted after" in out
    summary = run.summary()
    assert summary["interrupted"] and summary["failure"] is None
    rows = [json.loads(line) for line in (run.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == summary["steps"] == rows[-1]["step"]
    ledger = (run.folder / "run" / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == summary["groups"]["submitted"]  # type: ignore[index]
    assert (run.folder / "run" / "curves.png").exists()
    assert not (run.folder / "run" / "final").exists()


def test_failure_leaves_a_summary_with_its_cause_and_all_that_was_made(start: Callable[..., Run]) -> None:
    run = start("--learner.args", '{"fails_at": 2}', "--checkpoint.every", "2")
    out, err, _ = run.end()
    cause = "learner/0 failed while training: OSError: [Errno 28] No space left on device"
    assert run.process.returncode == 1, (out, err)
    assert err.startswith(f"error: {cause}") and "Traceback" not in err
    assert "Run failed after 2 steps" in err and "checkpoints/step_000002" in err and "curves.png" in err
    summary = run.summary()
    assert str(summary["failure"]).startswith(cause)
    assert (summary["steps"], summary["interrupted"]) == (2, False)
    assert run.processes() == []
    kept = err.split("the actors' logs are in ")[1].split("/session_latest")[0]
    assert Path(kept, "session_latest", "logs").is_dir() and not Path(kept, "t").exists()
    shutil.rmtree(kept)


@pytest.mark.slow
def test_driver_that_is_killed_leaves_no_process(start: Callable[..., Run]) -> None:
    run = start()
    run.await_moment(_trains)
    run.processes()
    run.process.kill()
    run.process.communicate()
    deadline = time.monotonic() + 10
    while run.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    _assert_nothing_is_left(run)
    # Its lock died with it, and what it has made still stands in the way.
    again = start("--run_dir", "run")
    out, err, _ = again.end()
    assert (again.process.returncode, out) == (2, "")
    assert err == "error: run_dir is run; it already holds an unfinished run. Give a new run_dir or remove it.\n"
