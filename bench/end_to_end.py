"""A whole asynchronous run of this project against TRL's `GRPOTrainer` with transformers' generation, in completions trained on a second.

    python -m bench.end_to_end

SmolLM2-135M (`make smollm2` makes the model) in float32 on all cores; 8 groups of 8 completions a step, of at most 24 tokens and ended
by the model where it ends them, behind prompts of 40 tokens. Each side runs in a process of its own, in turn, with the same allocator
and the same OpenMP settings. TRL is not among this project's dependencies: without it the bench says so and ends.

samples_per_s             completions that `maspo train` trains on / wall time of its steps. Left out are the first two, in which engines
                          warm up and the pipeline fills, and the last ones, `max_staleness` of them, in which the engine has nothing to do
trl_samples_per_s         the same of TRL's steps after the second
trl_speedup_end_to_end    the first / the second, each repeat by itself

TRL takes the fastest of some micro-batches, found in the first repeat. No group is filtered on either side, so that both train on all that
they generate; what an evaluation costs is in neither; our check at start that learner and engine agree stays on. The mean length of the
completions is printed for both, since it is what the work depends on.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import trl_side
from maspo_ray.experience import Completion, Prompt
from maspo_ray.fleet.environment import CPU_ALLOCATOR, PASSIVE_WAITS

GROUPS, MAX_NEW_TOKENS, PROMPT_TOKENS = 8, 24, 40
MICRO_BATCHES = (16, 32, 64)
WARM_UP = 2
QUESTION = "What is {} + {}?"


def text_parity(text: str) -> float:
    """Returns 1 where a text has an even number of characters, else 0: of 8 different completions hardly ever all alike."""
    return float(len(text) % 2 == 0)


class TextParityReward:
    """See `maspo_ray.protocols.RewardActor`."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [text_parity(completion.text) for completion in completions]


@dataclass(frozen=True, slots=True)
class Step:
    """A training step.

    Attributes:
        samples: completions that it trained on.
        seconds: of wall time.
        mean_tokens: of its completions.
    """

    samples: int
    seconds: float
    mean_tokens: float


def samples_per_s(steps: Sequence[Step], left_out_at_end: int = 0) -> float:
    """Returns samples / seconds over the steps after the warm-up.

    Args:
        left_out_at_end: steps that do not count either.
    """
    counted = steps[WARM_UP : len(steps) - left_out_at_end]
    return sum(step.samples for step in counted) / sum(step.seconds for step in counted)


def write_prompts(model: str, path: Path, count: int) -> None:
    """Writes rows of a prompt and an answer, each prompt of exactly `PROMPT_TOKENS` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(0)
    rows = []
    for a, b in ((rng.randint(10, 99), rng.randint(10, 99)) for _ in range(count)):
        messages = [{"role": "user", "content": QUESTION.format(a, b)}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = len(tokenizer(text)["input_ids"])
        assert tokens == PROMPT_TOKENS, f"a prompt has {tokens} tokens: {text!r}"
        rows.append(json.dumps({"prompt": text, "answer": str(a + b)}))
    path.write_text("\n".join(rows) + "\n")


def run_config(base: Path, model: str, prompts: Path, steps: int, threads: int) -> dict[str, Any]:
    """Returns the config of our side: the example's settings of speed, this bench's task."""
    config: dict[str, Any] = yaml.safe_load(base.read_text())
    config["model"] |= {"path": model, "dtype": "float32"}
    config["data"] = {
        "train": {"kind": "jsonl", "path": str(prompts)},
        # The prompts are templated text already.
        "chat_template": False,
        "max_prompt_tokens": PROMPT_TOKENS,
    }
    config["rollout"] |= {"group_size": trl_side.GROUP_SIZE, "max_new_tokens": MAX_NEW_TOKENS, "threads": threads}
    config["reward"] = {"actor": "bench.end_to_end:TextParityReward"}
    # So small that the lengths of the completions stay as they are.
    config["learner"] |= {"threads": threads, "lr": 1e-7, "warmup_steps": 0}
    config["objective"] = {"kind": "grpo"}
    config["pipeline"] |= {"steps": steps, "groups_per_step": GROUPS, "parity_every": 0, "filter_zero_variance": False}
    config["eval"] = {"every": 0}
    config["checkpoint"] = {"save_final": False}
    config["logging"] = {"progress": "off", "curves": False, "tensorboard": False}
    return config


def steps_of_run(folder: Path) -> list[Step]:
    """Returns the steps of a run of ours, from its folder."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    # The step of a group is null unless it was trained.
    trained = Counter(row["step"] for row in ledger)
    return [
        Step(trained[row["step"]] * trl_side.GROUP_SIZE, row["time/step_s"], row["completion/tokens_mean"])
        for row in rows
    ]


class Bench:
    """Runs the sides."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self._options = options
        self._scratch = scratch
        self._prompts = scratch / "prompts.jsonl"
        write_prompts(options.model, self._prompts, 512)
        self._environment = {
            **os.environ,
            **CPU_ALLOCATOR,
            "OMP_NUM_THREADS": str(options.threads),
            **PASSIVE_WAITS,
            # Ray starts its workers at a nice value of 15: whatever else runs on the machine would slow our side alone.
            "RAY_worker_niceness": "0",
            "HF_HUB_OFFLINE": "1",
        }

    def _run(self, *arguments: str) -> str:
        """Returns what a module printed."""
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment)
        if done.returncode:
            sys.exit(done.stderr)
        return done.stdout

    def ours(self, name: str) -> tuple[list[Step], int]:
        """Returns the steps of a run, and how many at its end do not count."""
        options = self._options
        config = run_config(options.config, options.model, self._prompts, options.steps, options.threads)
        path, folder = self._scratch / f"{name}.yaml", self._scratch / name
        path.write_text(yaml.safe_dump(config))
        self._run("maspo_ray", "train", str(path), "--run_dir", str(folder), *options.flags)
        written = yaml.safe_load((folder / "config.yaml").read_text())
        return steps_of_run(folder), written["pipeline"]["max_staleness"]

    def trl(self, rows: int) -> list[Step]:
        options = self._options
        sizes = {"rows": rows, "groups": GROUPS, "max_new_tokens": MAX_NEW_TOKENS, "steps": options.trl_steps}
        flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
        printed = self._run("bench.trl_training", "--model", options.model, "--prompts", str(self._prompts), *flags)
        found = json.loads(printed.splitlines()[-1])
        samples = GROUPS * trl_side.GROUP_SIZE
        return [Step(samples, *pair) for pair in zip(found["seconds"], found["lengths"], strict=True)]


def figures_of(repeats: Sequence[tuple[float, float]]) -> dict[str, list[float]]:
    """Returns the median, the least and the most of each figure.

    Args:
        repeats: samples/s of ours and of TRL's.
    """
    values = {
        "samples_per_s": [ours for ours, _ in repeats],
        "trl_samples_per_s": [trl for _, trl in repeats],
        "trl_speedup_end_to_end": [ours / trl for ours, trl in repeats],
    }
    return {name: [statistics.median(found), min(found), max(found)] for name, found in values.items()}


def steps_text(side: str, steps: Sequence[Step], speed: float) -> str:
    seconds = ", ".join(f"{step.seconds:.1f}" for step in steps)
    tokens = statistics.mean(step.mean_tokens for step in steps)
    return f"{side}: {speed:.2f} samples/s, {tokens:.1f} tokens a completion; steps of {seconds} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("examples/smollm2/run.yaml"), help="our settings of speed")
    parser.add_argument("--model", default="examples/smollm2/model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each engine")
    parser.add_argument("--steps", type=int, default=12, help="of a run of ours")
    parser.add_argument("--trl_steps", type=int, default=5)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=MICRO_BATCHES, help="that TRL may choose from")
    parser.add_argument("--repeats", type=int, default=3)
    options, flags = parser.parse_known_args()
    options.flags = [flag for flag in flags if flag != "--"]
    if not trl_side.is_there():
        install = '.venv/bin/pip install "trl==1.16.*"'
        print(f"skipped: TRL is not installed; {install} adds it")
        print(json.dumps({"bench": "end_to_end", "skipped": "TRL is not installed", "install": install}))
        return
    if not Path(options.model, "config.json").is_file():
        sys.exit(f"--model is {options.model}; there is no model. Run `python examples/smollm2/prepare.py`.")
    repeats: list[tuple[float, float]] = []
    micro_batches: Sequence[int] = options.micro_batches
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        for repeat in range(options.repeats):
            steps, left_out = bench.ours(f"run-{repeat}")
            ours = samples_per_s(steps, left_out)
            print(steps_text("ours", steps, ours), flush=True)
            found = {}
            for rows in micro_batches:
                theirs = bench.trl(rows)
                found[rows] = samples_per_s(theirs)
                print(steps_text(f"TRL, micro-batches of {rows}", theirs, found[rows]), flush=True)
            fastest = max(found, key=found.__getitem__)
            micro_batches = (fastest,)
            repeats.append((ours, found[fastest]))
    figures = figures_of(repeats)
    print(f"{options.threads} threads, {options.repeats} repeats: median (least to most)")
    for name, (median, least, most) in figures.items():
        print(f"{name:24s} {median:7.3f}  ({least:.3f} to {most:.3f})")
    medians = {name: median for name, (median, _, _) in figures.items()}
    spread = {name: [least, most] for name, (_, least, most) in figures.items()}
    print(json.dumps({"bench": "end_to_end", **medians, "micro_batch": fastest, "spread": spread}))


if __name__ == "__main__":
    main()
