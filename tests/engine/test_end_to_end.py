"""`maspo train` as a user runs it: real engines, from the config to the run folder, and every way that a run ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from maspo_ray.run_dir.step_record import read_step

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.ray]

# What a random model earns often enough that groups have a signal, a reward that never works, and a learner whose first update
# meets a NaN.
PLUGINS = """
from dataclasses import replace

from actors.deepspeed_learner import DeepSpeedLearner
from actors.vllm_rollout import VLLMRollout


class EvenReward:
    async def score(self, prompt, completions):
        return [float(sum(completion.token_ids) % 2 == 0) for completion in completions]


class FailingReward:
    def score(self, prompt, completions):
        raise ValueError("the verifier is out of order")


class OddRollout(VLLMRollout):
    # Says of each token that it was a little likelier than it was.
    async def sample(self, token_ids, **asked):
        completion = await super().sample(token_ids, **asked)
        return replace(completion, logprobs=completion.logprobs + 0.002)


class PoisonedLearner(DeepSpeedLearner):
    def train_step(self, version, plans, *payloads):
        if version == 0:
            bundle = plans[0].micro_batches[0][0]
            group, i = payloads[bundle.payload], bundle.items[0].sample
            broken = replace(group.completions[i], logprobs=group.completions[i].logprobs * float("nan"))
            completions = (*group.completions[:i], broken, *group.completions[i + 1 :])
            payloads = list(payloads)
            payloads[bundle.payload] = replace(group, completions=completions)
        return super().train_step(version, plans, *payloads)
"""


def _config(folder: Path, model: str, **sections: dict[str, object]) -> Path:
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 30) for b in range(10, 30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": str(folder / "data.jsonl")}
    tree: dict[str, dict[str, object]] = {
        "model": {"path": model, "dtype": "float32"},
        "data": {
            "train": source,
            "eval": {**source, "limit": 16},
            "chat_template": False,
            "max_prompt_tokens": 8,
        },
        "rollout": {"group_size": 4, "max_new_tokens": 4, "kv_cache_gib": 0.06},
        "reward": {"actor": "my_plugins:EvenReward"},
        "reference": {"cpus": 0.1},
        "learner": {"cpus": 0.8, "lr": 1e-3},
        "kl": {"coef": 0.01},
        "pipeline": {"steps": 4, "groups_per_step": 4, "parity_every": 1, "filter_zero_variance": False},
        "eval": {"every": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    (folder / "my_plugins.py").write_text(PLUGINS)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**tree, "run_dir": str(folder / "run")}))
    return path


class _Run:
    """A `maspo train`, or another command, in a process of its own, and every process that it was ever seen to start."""

    def __init__(self, config: Path, *command: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maspo_ray", *(command or ("train", str(config)))],
            cwd=config.parent,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started: dict[int, psutil.Process] = {}

    def look(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self.started.setdefault(child.pid, child)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self.process.poll() is None and not condition():
            self.look()
            time.sleep(0.1)

    def finish(self, timeout_s: float) -> tuple[int, str, str]:
        self.wait_until(lambda: False, timeout_s)
        if self.process.poll() is None:
            for process in [*self.started.values(), self.process]:
                process.kill()
            pytest.fail(f"the run had not ended after {timeout_s:g} s: {self.process.communicate()}")
        out, err = self.process.communicate(timeout=5)
        return self.process.returncode, out, err

    def left(self) -> list[str]:
        """Returns what is still there of the processes that the run started."""
        _, alive = psutil.wait_procs(list(self.started.values()), timeout=2)
        return [f"{p.pid} {p.name()}" for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The config of a run of four steps that has ended, with a checkpoint after every second, and what it said."""
    config = _config(tmp_path_factory.mktemp("trained"), tiny_model, checkpoint={"every": 2})
    run = _Run(config)
    code, out, err = run.finish(timeout_s=250)
    assert code == 0, err
    assert run.left() == []
    return config, out


def test_train_runs_all_four_actors_and_leaves_a_whole_run_folder(trained: tuple[Path, str]) -> None:
    config, out = trained
    folder = config.parent / "run"
    metrics, ledger, evals = (_rows(folder / f"{name}.jsonl") for name in ("metrics", "ledger", "eval"))
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    for row in metrics:
        assert 0 <= row["staleness/max"] <= 1
        assert row["parity/max"] is None or row["parity/max"] < 1e-3
        assert row["objective/kl"] >= 0
        assert 0 <= row["time/learner_wait_share"] <= 1
        assert row.keys() == metrics[0].keys()
    # All tokens of the first batch are of the weights that meet them, so that it compares learner and engine; so do probes, at every step
    # here where a batch has none.
    assert all(row["parity/max"] is not None for row in metrics)
    # Policy and reference are the same model.
    assert abs(metrics[0]["objective/kl"]) < 1e-6
    assert metrics[0]["learner/grad_norm"] > 0
    for outcome in ("filtered", "stale", "failed"):
        assert sum(row[f"groups/{outcome}"] for row in metrics) == [row["outcome"] for row in ledger].count(outcome)
    assert sum(row["tokens/generated"] for row in metrics) >= sum(row["tokens/trained"] for row in metrics) + 3 * 16
    assert [row["step"] for row in evals] == [0, 2, 4]
    assert all(row["set"] == "heldout" and row["num_prompts"] == 16 for row in evals)
    assert len({row["group_id"] for row in ledger}) == len(ledger)
    assert [row["outcome"] for row in ledger].count("trained") == 16
    assert {row["step"] for row in ledger if row["outcome"] == "trained"} == {1, 2, 3, 4}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["groups"]["submitted"] == len(ledger)
    assert not summary["interrupted"]
    assert {"config.yaml", "curves.png", "final", "tensorboard"} <= {path.name for path in folder.iterdir()}
    assert (folder / "final" / "model.safetensors").exists()
    trace = json.loads((folder / "timeline.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    spans = [(names[event["pid"]], event["name"]) for event in trace if event["ph"] == "X"]
    assert spans.count(("learner", "train")) == 4 and spans.count(("learner", "publish")) == 5
    assert ("rollout/0", "generate") in spans
    # The learner does one thing at a time.
    assert all(event["tid"] == 0 for event in trace if event["ph"] == "X" and names[event["pid"]] == "learner")
    assert list((folder / "tensorboard").iterdir())
    assert "Run finished: 4 steps" in out


@pytest.mark.parametrize(
    ("step", "begins"), [pytest.param(2, None, marks=pytest.mark.slow), (4, "run/checkpoints/step_000002/state")]
)
def test_replay_of_a_step_comes_to_the_same_model_bit_for_bit(
    trained: tuple[Path, str], tiny_model: str, step: int, begins: str | None
) -> None:
    config, _ = trained
    records = [read_step(path) for path in sorted((config.parent / "run" / "steps").iterdir())]
    assert [record.step for record in records] == [1, 2, 3, 4]
    # Tokens of two versions, and what the KL compares with: the replay has both to get right.
    assert {c.spans[0].version for record in records for group in record.groups for c in group.sampled.completions} > {
        0,
        1,
    }
    assert all(group.reference_logprobs is not None and -1 not in group.seeds for group in records[-1].groups)
    run = _Run(config, "replay", "run", "--step", str(step))
    code, out, err = run.finish(timeout_s=120)
    assert code == 0, err
    first, *steps, _, difference = out.splitlines()
    assert first == f"replaying steps {step - 1} to {step} from {begins or tiny_model}"
    assert len(steps) == 2 and difference == "max |Δ parameter|: 0"
    for line, row in zip(steps, _rows(config.parent / "run" / "metrics.jsonl")[step - 2 : step], strict=True):
        loss, norm = (f"{row[name]:.9g}" for name in ("loss", "learner/grad_norm"))
        assert line == f"step {row['step']}: loss {loss} (in the run {loss}), gradient norm {norm} (in the run {norm})"
    assert run.left() == []
    assert not list((config.parent / "run").glob(".replay-*"))


@pytest.mark.slow
def test_train_without_staleness_repeats_to_the_last_bit(tiny_model: str, tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        pipeline = {"max_staleness": 0, "filter_zero_variance": True}
        run = _Run(_config(tmp_path / name, tiny_model, pipeline=pipeline, eval={"every": 0}))
        code, _, err = run.finish(timeout_s=250)
        assert code == 0, err
        runs.append(_rows(tmp_path / name / "run" / "metrics.jsonl"))
    # What depends on when something was looked at, and not on what was computed.
    timed = ("time/", "object_store/", "groups/running", "groups/ready", "tokens/generated")
    for first, second in zip(*runs, strict=True):
        assert {k: v for k, v in first.items() if not k.startswith(timed)} == {
            k: v for k, v in second.items() if not k.startswith(timed)
        }
        assert first["staleness/max"] == 0


def test_train_of_adapters_interrupted_stops_within_15_s_and_says_what_was_saved(
    tiny_model: str, tmp_path: Path
) -> None:
    sections = {"pipeline": {"steps": 10_000}, "checkpoint": {"every": 1}, "learner": {"lora": {"rank": 4}}}
    run = _Run(_config(tmp_path, tiny_model, **sections))
    metrics = tmp_path / "run" / "metrics.jsonl"
    run.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, timeout_s=200)
    # As a terminal does it: to every process of the group.
    os.killpg(run.process.pid, signal.SIGINT)
    interrupted = time.monotonic()
    code, out, err = run.finish(timeout_s=30)
    assert time.monotonic() - interrupted < 15
    assert code == 130, err
    assert "Run interrupted after" in out
    assert "metrics.jsonl" in out
    assert "checkpoints/step_" in out
    # The engines sampled from the merged weights, and those had moved: parity would have ended the run otherwise.
    rows = _rows(metrics)
    assert all((row["parity/max"] or 0.0) < 1e-3 and row["learner/update_to_weight"] > 0 for row in rows)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints" / "step_000001").rglob("*.safetensors")}
    assert saved == {"model.safetensors", "adapter_model.safetensors"}
    assert "Traceback" not in err
    ledger = _rows(tmp_path / "run" / "ledger.jsonl")
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["groups"]
    assert (
        counts["submitted"] == len(ledger) == sum(counts[name] for name in ("trained", "filtered", "stale", "failed"))
    )
    assert run.left() == []


def test_train_of_two_engines_and_two_ranks_updates_both_and_shares_every_batch(
    tiny_model: str, tmp_path: Path
) -> None:
    # Five groups a step, which two ranks share all the same.
    run = _Run(
        _config(
            tmp_path,
            tiny_model,
            rollout={"replicas": 2, "cpus": 0.4, "threads": 1},
            learner={"replicas": 2, "cpus": 0.4, "threads": 1, "lr": 1e-2},
            reference={"cpus": 0.1, "threads": 1},
            reward={"replicas": 2},
            pipeline={"steps": 3, "groups_per_step": 5},
        )
    )
    code, out, err = run.finish(timeout_s=280)
    assert code == 0, err
    folder = tmp_path / "run"
    metrics, ledger = (_rows(folder / f"{name}.jsonl") for name in ("metrics", "ledger"))
    assert [row["outcome"] for row in ledger].count("trained") == 3 * 5
    # Both sampled, and after each update hold the learner's weights; parity and checksums would have ended the run otherwise.
    records = [read_step(path) for path in sorted((folder / "steps").iterdir())]
    assert {group.replica for record in records for group in record.groups} == {0, 1}
    assert all(row["learner/update_to_weight"] > 0 for row in metrics)
    # A step whose groups all began with older weights compares none.
    compared = [row["parity/max"] for row in metrics if row["parity/max"] is not None]
    assert compared and max(compared) < 1e-3
    trained = [
        [b.group_id for plans, _ in r.shares for p in plans for m in p.micro_batches for b in m] for r in records
    ]
    assert all(len(set(groups)) == 5 for groups in trained)
    assert all({bool(plans[0].micro_batches[0]) for plans, _ in record.shares} == {True} for record in records)
    trace = json.loads((folder / "timeline.json").read_text())
    names = {event["pid"]: event["args"]["name"] for event in trace if event["ph"] == "M"}
    assert {"rollout/0", "rollout/1", "learner"} <= set(names.values())
    assert run.left() == []


@pytest.mark.slow
def test_train_of_an_engine_that_computes_otherwise_ends_before_anything_is_trained(
    tiny_model: str, tmp_path: Path
) -> None:
    run = _Run(_config(tmp_path, tiny_model, rollout={"actor": "my_plugins:OddRollout"}, eval={"every": 0}))
    code, _, err = run.finish(timeout_s=250)
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: parity is 0.002 between the learner and rollout/0 at version 0; ", line)
    assert "Traceback" not in err
    assert _rows(tmp_path / "run" / "metrics.jsonl") == []
    assert run.left() == []


@pytest.mark.slow
def test_train_reward_that_raises_stops_the_run_with_its_most_frequent_cause(tiny_model: str, tmp_path: Path) -> None:
    run = _Run(_config(tmp_path, tiny_model, reward={"actor": "my_plugins:FailingReward"}))
    code, _, err = run.finish(timeout_s=250)
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "reward.max_error_rate" in line
    assert re.search(r"the most frequent cause, (\d+) of \1, was: ValueError: the verifier is out of order", line)
    assert "Traceback" not in err
    ledger = _rows(tmp_path / "run" / "ledger.jsonl")
    assert {row["outcome"] for row in ledger} <= {"failed"}
    assert run.left() == []


@pytest.mark.slow
def test_train_ends_the_groups_of_an_update_that_was_left_out_as_failed_and_goes_on(
    tiny_model: str, tmp_path: Path
) -> None:
    learner = {"actor": "my_plugins:PoisonedLearner", "updates_per_batch": 2}
    run = _Run(_config(tmp_path, tiny_model, learner=learner, pipeline={"steps": 2}, eval={"every": 0}))
    code, _, err = run.finish(timeout_s=250)
    assert code == 0, err
    metrics, ledger = (_rows(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "ledger"))
    assert [row["learner/skipped"] for row in metrics] == [1, 0]
    first, second = ([name for name in row if name.startswith(("objective/", "learner/", "loss"))] for row in metrics)
    assert first == second
    # Two updates of two groups a step; the first of the first step did not take place.
    failed = [row for row in ledger if row.get("cause") == "its update was left out"]
    assert len(failed) == 2
    assert [row["outcome"] for row in ledger].count("trained") == 6
    assert sum(row["step"] == 1 for row in ledger) == 2
    said = [f"an update of step 1 was left out: the loss of group {row['group_id']} is not finite" for row in failed]
    assert any(line in err for line in said)
