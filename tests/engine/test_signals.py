"""SIGTERM to `maspo train`, as a scheduler or a container's runtime sends it: the run ends as if by Ctrl-C, whole and with nothing left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MARK = "MASPO_TEST_SIGNALS"
"""In the environment of the run, and so of every process that it starts, whoever its parent is by then."""
GROUPS_PER_STEP = 4
pytestmark = [pytest.mark.engine, pytest.mark.ray]

# Right often enough, of a random model's completions, that groups have a signal.
REWARD = """
class EvenReward:
    async def score(self, prompt, completions):
        return [float(sum(completion.token_ids) % 2 == 0) for completion in completions]
"""


def _write_run(folder: Path, model: str) -> Path:
    """Writes what a run without an end needs, in the quickstart's format; returns its config."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(10, 20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "even_reward.py").write_text(REWARD)
    config = {
        "model": {"path": model, "dtype": "float32"},
        "data": {
            "train": {"kind": "jsonl", "path": str(folder / "data.jsonl")},
            "chat_template": False,
            "max_prompt_tokens": 8,
        },
        "rollout": {"group_size": 4, "max_new_tokens": 4, "kv_cache_gib": 0.06},
        "reward": {"actor": "even_reward:EvenReward", "cpus": 0.1},
        "learner": {"cpus": 0.8, "lr": 1e-3},
        "pipeline": {"steps": 10_000, "groups_per_step": GROUPS_PER_STEP},
        "run_dir": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _train_until_signal(config: Path, mark: str, steps: int) -> tuple[int, str, str, float]:
    """Trains for so many steps, then ends the run by SIGTERM.

    Returns:
        The exit code, standard output, standard error, and the seconds from the signal to the end.
    """
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    metrics = config.parent / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "maspo_ray", "train", str(config)],
        cwd=config.parent,
        env={**environment, "PYTHONPATH": str(ROOT), MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and process.poll() is None:
                if metrics.exists() and metrics.read_text().count("\n") >= steps:
                    break
                time.sleep(0.05)
            assert process.poll() is None, process.communicate()[1]
            started = {p.name() for p in _marked_processes(mark)}
            assert any("raylet" in name for name in started), f"these carry the mark: {started}"
            process.send_signal(signal.SIGTERM)
            signalled = time.monotonic()
            out, err = process.communicate(timeout=60)
            return process.returncode, out, err, time.monotonic() - signalled
        finally:
            process.kill()


def test_sigterm_ends_a_run_with_its_summary_its_files_whole_and_no_process_left(
    tiny_model: str, tmp_path: Path
) -> None:
    mark = uuid4().hex
    try:
        code, out, err, seconds = _train_until_signal(_write_run(tmp_path, tiny_model), mark, steps=2)
        assert _marked_processes(mark) == []
    finally:
        for process in _marked_processes(mark):
            process.kill()
    assert code == 130, err
    assert seconds < 15
    assert "Traceback" not in err
    metrics, ledger = (
        [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "ledger")
    )
    steps = len(metrics)
    assert [row["step"] for row in metrics] == list(range(1, steps + 1)) and steps >= 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] and summary["steps"] == steps
    assert f"Run interrupted after {steps} steps" in out
    # Every group that was submitted has a row, those that were under way too, and the summary counts the same.
    counts = summary["groups"]
    assert sorted(row["group_id"] for row in ledger) == list(range(counts["submitted"]))
    outcomes = Counter(row["outcome"] for row in ledger)
    assert {name: count for name, count in counts.items() if name != "submitted" and count} == dict(outcomes)
    assert any(row.get("cause") == "the run ended" for row in ledger)
    trained = Counter(row["step"] for row in ledger if row["outcome"] == "trained")
    assert all(trained[step] == GROUPS_PER_STEP for step in range(1, steps + 1))
