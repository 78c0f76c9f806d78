"""What a command shows on standard error while it works, and that nothing else is configured for it."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maspo_ray import controller, dtype_speed
from maspo_ray.cli import main
from maspo_ray.config import load_config
from maspo_ray.fleet import reservation
from maspo_ray.fleet.placement import RoleDemand

WARNING = "model.dtype is bfloat16; on this machine's CPU its matrix products take 1.9 times as long as float32's. Set it to float32."


@pytest.fixture
def config(tmp_path: Path) -> str:
    """Path of a config that is right."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"head_dim": 32}')
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    tree = {
        "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16"},
        "data": {"train": {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}, "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "placement": {"cpus_per_node": 4},
        "run_dir": str(tmp_path / "out"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return str(tmp_path / "run.yaml")


def _instead_of_training(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    def train(*_: Any) -> None:
        work()
        raise KeyboardInterrupt

    monkeypatch.setattr(controller, "train", train)


def test_command_shows_how_long_it_waits_for_the_cluster(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reservation, "cluster_nodes", lambda: ())
    demand = RoleDemand("learner", 1, None, 0.0, 1.0)
    _instead_of_training(monkeypatch, lambda: reservation.wait_for_cluster([demand], wait_s=0.1))
    assert main(["train", config]) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "waiting for the cluster, 0 of 0.1 s: registered: 0 nodes, 0 CPUs, 0 GPUs; needed: 1 CPU, 0 GPUs"
    assert rest[-1].startswith("error: placement.wait_s is 0.1; by then registered: 0 nodes")


def test_command_shows_each_message_of_the_framework_once_and_leaves_other_loggers_as_they_were(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, own = logging.getLogger(), logging.getLogger("maspo_ray")
    before = [root.level, [*root.handlers], own.level, [*own.handlers], own.propagate]

    def work() -> None:
        assert [root.level, root.handlers] == before[:2]
        logging.getLogger("maspo_ray.rollouts.pool").warning("one %s", "warning")
        logging.getLogger("maspo_ray.fleet").debug("a detail")
        logging.getLogger("ray").info("another's")
        # As the live display does.
        monkeypatch.setattr(sys, "stderr", sys.stdout)
        logging.getLogger("maspo_ray").info("beside the display")

    _instead_of_training(monkeypatch, work)
    # What a library may have left there.
    extra = logging.StreamHandler(sys.stderr)
    root.addHandler(extra)
    before[1] = [*root.handlers]
    try:
        main(["train", config])
    finally:
        root.removeHandler(extra)
    out, err = capsys.readouterr()
    assert err.splitlines() == ["one warning"]
    assert out.splitlines()[0] == "beside the display"
    own = logging.getLogger("maspo_ray")
    assert [own.level, own.handlers, own.propagate] == before[2:]


def test_bfloat16_that_is_slow_is_warned_of_before_a_run_starts_anything(
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dtype_speed, "bfloat16_slowdown", lambda: 1.94)

    def load_tokenizer(*_: Any) -> None:
        assert caplog.messages == [WARNING]
        raise KeyboardInterrupt

    # The first of what a run loads, before Ray.
    monkeypatch.setattr(controller, "load_tokenizer", load_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        controller.train(load_config(config))


def test_home_that_cannot_be_written_adds_no_line(config: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": " ", "answer": "2"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "maspo_ray", "train", config, "--model.dtype", "float32"],
        env=os.environ | {"HOME": "/proc/nobody"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("error: ")] == []
