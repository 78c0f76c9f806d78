"""Bad input on the command line: one clear line each, exit code 2, in seconds, and nothing is started or written."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from maspo_ray.cli import main

# The promises are 5 s and, where the cluster must be asked, 15 s; the rest is for a machine that does other things beside.
LIMIT_S = 15.0
CLUSTER_LIMIT_S = 45.0

REWARDS = """
class Good:
    def __init__(self, max_words=3): ...

    def score(self, prompt, completions):
        return [0.0 for _ in completions]

class Lacking:
    def setup(self): ...

class WrongSignature:
    def score(self, prompt): ...
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `run.yaml` is right in every way: the tests break one thing each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rewards_of_a_user", raising=False)
    (tmp_path / "rewards_of_a_user.py").write_text(REWARDS)
    _write_model(tmp_path / "model", head_size=32)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    tree = {
        "model": {"path": "model", "dtype": "float32"},
        "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "chat_template": False, "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "reward": {"actor": "rewards_of_a_user:Good"},
        "run_dir": "out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def _write_model(folder: Path, head_size: int, tokenizer: bool = True) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 4 * head_size, "num_attention_heads": 4}))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")


def _write_tokenizer(folder: Path, unknown: str = "=") -> None:
    """Writes a tokenizer and a config that can be loaded: prompts are tokenised before Ray is asked for anything."""
    vocabulary = {letter: i for i, letter in enumerate("0123456789+=")}
    tree = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(tree))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


Case = tuple[Callable[[Path], object] | None, list[str], str]


def _without_tokenizer(folder: Path) -> None:
    _write_model(folder / "bare", head_size=32, tokenizer=False)


def _with_small_heads(folder: Path) -> None:
    _write_model(folder / "small", head_size=16)


def _rows(*lines: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "broken.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _finished_run(folder: Path) -> None:
    (folder / "out" / "final").mkdir(parents=True)
    (folder / "out" / "metrics.jsonl").write_text('{"step": 1}\n')


def _folder_for_a_timeline(folder: Path) -> None:
    (folder / "out" / "timeline.json").mkdir(parents=True)


def _flagged(folder: Path) -> None:
    """The same faults in the file as the flags of other cases give."""
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    tree["rollout"] |= {"temprature": 1.0}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))


GOOD_ROW = '{"prompt": "1+1=", "answer": "2"}'
BROKEN = ["--data.train.path", "broken.jsonl"]

# What is broken in the folder, the flags, and how the line begins.
CASES: dict[str, Case] = {
    "unknown key in the file": (_flagged, [], "rollout.temprature is 1.0; there is no such key. Did you mean rollout.temperature?"),
    "unknown key": (None, ["--objective.alhpa", "1"], "--objective.alhpa is given; there is no such key. Did you mean objective.alpha?"),
    "wrong type": (None, ["--pipeline.steps", "many"], "pipeline.steps is 'many'; input should be a valid integer"),
    "temperature 0": (None, ["--rollout.temperature", "0"], "rollout.temperature is '0'; a greedy policy has no log-probs to learn from, so it must be above 0. Set it"),
    "group of one": (None, ["--rollout.group_size", "1"], "rollout.group_size is 1; the grpo advantage compares the completions of a group, so it needs at least 2. Set"),
    "negative staleness": (None, ["--pipeline.max_staleness", "-1"], "pipeline.max_staleness is '-1'; input should be greater than or equal to 0. Change"),
    "batch and updates": (None, ["--learner.updates_per_batch", "3"], "pipeline.groups_per_step is 16; it must divide by learner.updates_per_batch (3). Set it to 18."),
    "no module": (None, ["--reward.actor", "no_such:Reward"], "reward.actor is no_such:Reward; there is no module no_such. Run from"),
    "no class": (None, ["--reward.actor", "rewards_of_a_user:Nobody"], "reward.actor is rewards_of_a_user:Nobody; module rewards_of_a_user has no class Nobody. Name one"),
    "lacks a method": (None, ["--reward.actor", "rewards_of_a_user:Lacking"], "reward.actor is rewards_of_a_user:Lacking; the class has no method score, which RewardActor needs. Add score"),
    "wrong signature": (None, ["--reward.actor", "rewards_of_a_user:WrongSignature"], "reward.actor is rewards_of_a_user:WrongSignature; its method score(self, prompt) cannot be called as RewardActor says. Give it"),
    "misspelt argument of a reward": (None, ["--reward.args", '{"max_word": 1}'], "reward.args.max_word is 1; Good takes no such argument. Did you mean max_words?"),
    "lacks a learner's method": (None, ["--learner.actor", "rewards_of_a_user:Good"], "learner.actor is rewards_of_a_user:Good; the class has no method rendezvous, which LearnerActor needs. Add"),
    "no model folder": (None, ["--model.path", "nowhere"], "model.path is nowhere; there is no such folder. Give a folder"),
    "no tokenizer": (_without_tokenizer, ["--model.path", "bare"], "model.path is bare; the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json). Save"),
    "head size": (_with_small_heads, ["--model.path", "small"], "model.path is small; its attention heads are of size 16, but vLLM on CPU takes only 32, 64,"),
    "no data file": (None, ["--data.train.path", "no.jsonl"], "data.train.path is no.jsonl; there is no such file. Give"),
    "no held-out file": (None, ["--data.eval.kind", "jsonl", "--data.eval.path", "no.jsonl"], "data.eval.path is no.jsonl; there is no such file. Give"),
    "empty data file": (_rows(), BROKEN, "data.train.path is broken.jsonl; it is empty. Give"),
    "blank data file": (_rows("", "  "), BROKEN, "data.train.path is broken.jsonl; it is empty. Give"),
    "broken JSON": (_rows(GOOD_ROW, "{not json"), BROKEN, "data.train.path is broken.jsonl; line 2 is not JSON ("),
    "no answer column": (_rows(GOOD_ROW, '{"prompt": "1+2="}'), BROKEN, "data.train.path is broken.jsonl; line 2 lacks the column answer (it has prompt). Set data.train.answer_column or set"),
    "prompt without text": (_rows('{"prompt": "   ", "answer": "1"}', GOOD_ROW), BROKEN, "data.train.path is broken.jsonl; line 1 has a prompt without text. Mend it or set"),
    "lone surrogate": (_rows(GOOD_ROW, '{"prompt": "1\\ud83d+2=", "answer": "3"}'), BROKEN, "data.train.path is broken.jsonl; line 2 has a prompt that is no valid text (\\ud83d is half a surrogate pair). Mend it"),
    "list in the answer column": (_rows('{"prompt": "1+1=", "answer": ["2"]}', GOOD_ROW), [*BROKEN, "--reward.actor", "actors.rewards.exact_match:ExactMatchReward"],
        "data.train.path is broken.jsonl; line 1 has the answer ['2'], a list; ExactMatchReward takes a text that is not blank, or a whole number. Mend it, set data.train.answer_column, take another"),
    "another reward's data": (None, ["--reward.actor", "actors.rewards.reasoning_gym:ReasoningGymReward"], "data.train.path is rows.jsonl; line 1 has the answer '2', a text; ReasoningGymReward needs data of kind reasoning_gym. Mend"),
    "staleness that no object store holds": (None, ["--pipeline.max_staleness", "100000", "--pipeline.steps", "200000"], "pipeline.max_staleness is 100000; so 1,600,016 groups may be under way at once, up to"),
    "steps that no object store holds": (None, ["--pipeline.groups_per_step", "1000000"], "pipeline.groups_per_step is 1000000; so 2,000,000 groups may be under way at once, up to"),
    "timeline that cannot be written": (_folder_for_a_timeline, [], "run_dir is out; out/timeline.json cannot be written to. Remove it, or give a new run_dir."),
    "finished run": (_finished_run, [], "run_dir is out; it already holds a finished run. Give a new run_dir or remove it."),
}  # fmt: skip


def _contents(folder: Path) -> dict[str, bytes | None]:
    """Returns every file and folder; compiled modules are Python's own affair."""
    found = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def _assert_one_error_line(stderr: str, begins: str) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {begins}")
    assert line.endswith((".", "?"))


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_starts_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, case: str
) -> None:
    break_it, flags, begins = CASES[case]
    if break_it is not None:
        break_it(folder)
    before, started = _contents(folder), time.monotonic()
    assert main([command, "run.yaml", *flags]) == 2
    took_s = time.monotonic() - started
    out, err = capsys.readouterr()
    _assert_one_error_line(err, begins)
    assert out == ""
    assert _contents(folder) == before
    assert not ray.is_initialized()
    assert took_s < LIMIT_S


def test_tokenizer_that_cannot_be_loaded_is_one_line_and_starts_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(folder)
    assert main(["train", "run.yaml"]) == 2
    _assert_one_error_line(capsys.readouterr().err, "model.path is model; its tokenizer cannot be read (")
    assert _contents(folder) == before and not ray.is_initialized()


def test_row_that_only_the_tokenizer_can_judge_is_named_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_tokenizer(folder / "model", unknown="none")
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "one+1=", "answer": "2"}\n')
    before = _contents(folder)
    assert main(["check", "run.yaml", "--placement.cpus_per_node", "4"]) == 0
    capsys.readouterr()
    assert main(["train", "run.yaml"]) == 2
    _assert_one_error_line(
        capsys.readouterr().err, "data.train.path is rows.jsonl; line 2 has a prompt that the tokenizer refuses ("
    )
    assert _contents(folder) == before and not ray.is_initialized()


def test_bad_rows_that_are_skipped_are_said_by_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _rows(GOOD_ROW, '{"prompt": "   ", "answer": "1"}', "{not json")(folder)
    assert main(["check", "run.yaml", *BROKEN, "--data.on_bad_row", "skip", "--placement.cpus_per_node", "4"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.train.path is broken.jsonl; left out 2 of 3 rows: line 3 is not JSON (Expecting")
    assert line.endswith("; line 2 has a prompt without text.")


def test_several_faults_have_a_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.path", "nowhere", "--data.train.path", "no.jsonl"]
    assert main(["train", "run.yaml", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" is ")[0] for line in lines] == ["error: model.path", "error: data.train.path"]


def test_resume_is_refused_and_not_ignored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run.yaml", "--resume"]) == 2
    _assert_one_error_line(capsys.readouterr().err, "--resume is given; resuming is not supported yet. Start a new run")
    assert not (folder / "out").exists()


def test_right_input_is_accepted_by_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Otherwise the cases above might be refused for what they have in common.
    before = _contents(folder)
    assert main(["check", "run.yaml", "--placement.cpus_per_node", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert yaml.safe_load(out.split("\nnode ")[0])["run_dir"] == "out"
    assert re.search(r"learner\s+0\s+0\s+1", out)
    assert _contents(folder) == before


# As a user meets it.


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return environment | {"PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.parametrize("case", ["unknown key", "lacks a method", "broken JSON", "finished run"])
def test_bad_input_to_the_command_is_answered_in_seconds(folder: Path, case: str) -> None:
    break_it, flags, begins = CASES[case]
    if break_it is not None:
        break_it(folder)
    before, started = _contents(folder), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "maspo_ray", "train", "run.yaml", *flags],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    took_s = time.monotonic() - started
    print(f"{case}: {took_s:.1f} s")
    assert done.returncode == 2
    _assert_one_error_line(done.stderr, begins)
    assert done.stdout == ""
    assert _contents(folder) == before
    assert took_s < LIMIT_S


class _Watch:
    """Sees every process that inherits a variable of the environment, whatever session or parent it has."""

    def __init__(self, variable: str, value: str) -> None:
        self._variable, self._value = variable, value
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.command_lines: set[str] = set()

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for process in self.alive():
                try:
                    self.command_lines.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(self._variable) == self._value:
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.mark.ray
def test_more_gpus_than_the_cluster_has_is_one_line_and_leaves_no_process(folder: Path) -> None:
    if psutil.LINUX and any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has GPUs")
    _write_tokenizer(folder / "model")
    token = uuid.uuid4().hex
    before, started = _contents(folder), time.monotonic()
    with _Watch("MASPO_TEST_RUN", token) as watch:
        done = subprocess.run(
            [sys.executable, "-m", "maspo_ray", "train", "run.yaml", "--rollout.gpus", "1", "--learner.gpus", "1"],
            cwd=folder,
            env=_environment() | {"MASPO_TEST_RUN": token},
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        took_s = time.monotonic() - started
    print(f"more GPUs than there are: {took_s:.1f} s")
    assert done.returncode == 2
    _assert_one_error_line(
        done.stderr, "learner.gpus is 1; 1 actor needs 1 GPU and the cluster has 0. Lower learner.gpus"
    )
    assert done.stdout == ""
    # Ray was asked, so that it was there; no actor was (an actor's process is called by its class, and Ray's own are here named).
    assert any("raylet" in line for line in watch.command_lines)
    of_ray = ("ray::IDLE", "ray::RuntimeEnvAgent", "ray::DashboardAgent")
    actors = [line for line in watch.command_lines if line.startswith("ray::") and not line.startswith(of_ray)]
    assert actors == []
    assert watch.alive() == []
    folders = {found for line in watch.command_lines for found in re.findall(r"/tmp/maspo-[^/\s]+", line)}
    assert len(folders) == 1 and not any(Path(found).exists() for found in folders)
    assert _contents(folder) == before
    assert took_s < CLUSTER_LIMIT_S
