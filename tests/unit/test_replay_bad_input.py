"""`maspo replay` of what is not there: one clear line each, exit code 2, before Ray is started."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from maspo_ray.cli import main
from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Experience,
    Group,
    Prompt,
    Rollout,
    SampledGroup,
    Verdict,
    VersionSpan,
)
from maspo_ray.packing import pack
from maspo_ray.replay.model_difference import ModelDifference
from maspo_ray.replay.plan import plan_replay
from maspo_ray.run_dir.checkpoint import STATE, begin_checkpoint, end_checkpoint
from maspo_ray.run_dir.paths import RunPaths
from maspo_ray.run_dir.step_record import write_step


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of five steps, with a checkpoint after every second, as far as a replay looks at it before it starts."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"hidden_size": 128, "num_attention_heads": 4}')
    (model / "tokenizer.json").write_text("{}")
    paths = RunPaths(tmp_path / "run")
    paths.path.mkdir()
    tree = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": {"path": "rows.jsonl", "kind": "jsonl"}, "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "pipeline": {"steps": 5},
        "checkpoint": {"every": 2},
    }
    paths.config.write_text(yaml.safe_dump(tree))
    paths.metrics.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 6)))
    for step in range(1, 6):
        _record(paths, step)
    for step in (2, 4):
        partial = begin_checkpoint(paths.checkpoint(step))
        (partial / STATE).mkdir(parents=True)
        (partial / STATE / "rank_0.pt").write_bytes(b"12345678")
        _model(partial)
        end_checkpoint(partial, paths.checkpoint(step))
    _model(paths.final)
    return paths.path


def _model(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"weight": np.zeros(2, np.float32)}, folder / "model.safetensors")


def _record(paths: RunPaths, step: int) -> None:
    prompt = Prompt("rows/0", "", np.array([1, 2], np.int32), "")
    logprobs = np.array([-0.5, -1.0], np.float32)
    completion = Completion(np.array([3, 4], np.int32), logprobs, (VersionSpan(0, 0, 2),), "stop", "")
    rollout = Rollout(CompletionFacts.of(completion), Verdict.from_reward(1.0))
    batch = [Experience(Group(0, "rows/0", "payload", 2, 0, 0, (rollout,)), (0.5,))]
    values = {"payload": SampledGroup(prompt, (completion,))}
    write_step(paths.step_record(step), step, step - 1, batch, pack(batch, 1, 64, True), values)


def _without(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        for name in names:
            path = run / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    return remove


def _cut_off(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-4])


def _without_models(run: Path) -> None:
    _without("checkpoints", "final")(run)


STATE_2 = "checkpoints/step_000002/state/rank_0.pt"
CHECKPOINT = "the checkpoint is run/checkpoints/step_000002; "

# What is broken in the run's folder, the flags, and how the line begins.
CASES: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    "no run": (shutil.rmtree, ["--step", "2"], "RUN_DIR is run; it holds no run (config.yaml, metrics.jsonl). Give"),
    "no config": (_without("config.yaml"), ["--step", "2"], "RUN_DIR is run; it holds no run"),
    "step 0": (None, ["--step", "0"], "--step is 0; the run made steps 1 to 5. Give one of them."),
    "step after the last": (None, ["--step", "6"], "--step is 6; the run made steps 1 to 5. Give one of them."),
    "no step made": (lambda run: (run / "metrics.jsonl").write_text(""), ["--step", "1"], "--step is 1; the run made none."),
    "no model after it": (None, ["--step", "3"], "--step is 3; no model that the run saved after it is there, so there is nothing to compare with. Replay one of 2, 4, 5, or train with checkpoint.every 1."),
    "its model is gone": (_without("checkpoints/step_000004"), ["--step", "4"], "--step is 4; no model that the run saved after it is there"),
    "no model at all": (_without_models, ["--step", "4"], "--step is 4; no model that the run saved after it is there, so there is nothing to compare with. Train with"),
    "the checkpoint before is gone": (_without("checkpoints/step_000002"), ["--step", "4"], CHECKPOINT + "it is gone. Restore it, or begin at another step with --start"),
    "a file of the state is gone": (_without(STATE_2), ["--step", "4"], CHECKPOINT + "its state/rank_0.pt is gone. Restore"),
    "the state is cut off": (_cut_off(STATE_2), ["--step", "4"], CHECKPOINT + "its state/rank_0.pt has 4 of 8 bytes. Restore"),
    "a model without a state": (_without("checkpoints/step_000002/state_files.json"), ["--step", "4"], CHECKPOINT + "it has no list of the learner's state (state_files.json). Restore"),
    "start after the step": (None, ["--step", "4", "--start", "4"], "--start is 4; it must be a step before --step (4), or 0, the start of the run."),
    "start without a checkpoint": (None, ["--step", "4", "--start", "3"], "the checkpoint is run/checkpoints/step_000003; it is gone."),
    "no records": (_without("steps"), ["--step", "4"], "RUN_DIR is run; the run kept no records of its steps. Train with logging.steps true."),
    "a record is gone": (_without("steps/step_000003.npz"), ["--step", "4"], "the step's record is run/steps/step_000003.npz; there is no such file. Restore it."),
    "a record is cut off": (_cut_off("steps/step_000004.npz"), ["--step", "4"], "the step's record is run/steps/step_000004.npz; it cannot be read"),
    "the model is gone": (_without("../model"), ["--step", "4"], "model.path is "),
    "unknown key": (None, ["--step", "4", "--learner.lrr", "1"], "--learner.lrr is given; there is no such key. Did you mean learner.lr?"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_replay_bad_input_is_one_line_and_starts_nothing(
    case: tuple[Callable[[Path], None] | None, list[str], str],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it, flags, line = case
    if break_it is not None:
        break_it(run)
    # Importing what starts Ray would fail.
    monkeypatch.setitem(sys.modules, "maspo_ray.replay.replay", None)
    assert main(["replay", "run", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {line}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "difference", "code"),
    [
        ([], ModelDifference(0.0, None, 2), 0),
        ([], ModelDifference(1e-9, "weight", 2), 1),
        # Where it need not be the same bit for bit, how far it is apart is for the user to judge.
        (["--model.dtype", "bfloat16"], ModelDifference(1e-9, "weight", 2), 0),
    ],
)
def test_replay_that_differs_fails_where_it_must_not_and_says_where(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    difference: ModelDifference,
    code: int,
) -> None:
    monkeypatch.setattr("maspo_ray.replay.replay.replay", lambda plan, note: difference)
    assert main(["replay", "run", "--step", "4", *flags]) == code
    out, err = capsys.readouterr()
    shown = "1e-09 (weight)" if difference.tensor else "0"
    assert out.splitlines()[-1] == f"max |Δ parameter|: {shown}"
    assert err.startswith("error: step 4 came out otherwise than in the run") if code else err == ""


@pytest.mark.parametrize(
    ("step", "start", "begins", "saved"),
    [
        (2, None, 0, "checkpoints/step_000002"),
        (4, None, 2, "checkpoints/step_000004"),
        (4, 0, 0, "checkpoints/step_000004"),
        (5, None, 4, "final"),
        (5, 2, 2, "final"),
    ],
)
def test_replay_begins_at_the_newest_checkpoint_before_the_step_unless_told(
    run: Path, step: int, start: int | None, begins: int, saved: str
) -> None:
    plan = plan_replay(Path("run"), step, start)
    assert (plan.start, plan.saved) == (begins, Path("run") / saved)
    assert plan.state == (Path("run") / "checkpoints" / f"step_{begins:06d}" / "state" if begins else None)
    assert (plan.ranks, plan.rows[step]["loss"], plan.is_exact) == (1, 0.5, True)


def test_replay_needs_no_checkpoint_to_begin_at_the_start(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert plan_replay(run, 5, 0).state is None


def test_checkpoint_that_was_being_saved_when_the_run_ended_is_none(run: Path) -> None:
    partial = begin_checkpoint(run / "checkpoints" / "step_000003")
    (partial / STATE).mkdir(parents=True)
    _model(partial)
    assert plan_replay(run, 4).start == 2
    # What is left of it is not taken into the next.
    assert not begin_checkpoint(run / "checkpoints" / "step_000003").exists()
