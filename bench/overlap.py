"""What asynchrony gains: steps of a run whose generation and learning go on at once, against the same work one after the other.

    python -m bench.overlap

Runs `maspo train` on SmolLM2 (`make smollm2` makes the model), each engine with one thread, completions of given lengths, with
`max_staleness` 0 and with more, in turn; and reads what the runs wrote down. No group is filtered, and none may be too old: the work is
the same. With 0 each phase has the machine to itself, so that such a run also says what generation and learning take alone.

step_over_bound           a step of the asynchronous run / the longer of generation alone and learning alone (with its publish)
generation_over_learning  of the two, each alone: how far the phases are from balanced
speedup_over_synchronous  a step with max_staleness 0 / a step of the asynchronous run
long_tail_speedup         the same where one completion in 50 is 20 times as long as the others
repeats_exactly           whether the balanced runs with max_staleness 0 had the same losses and gradient norms, to the last bit

Each repeat runs all four; the least and the most stand beside the median.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.vllm_rollout import VLLMRollout
from maspo_ray.experience import Sampling

ONE_IN, TIMES_LONGER = 50, 20


class FixedLengths(VLLMRollout):
    """An engine whose completions have given lengths, by the order in which they were asked for, so that equal parts of two runs have as
    many long ones.

    Args:
        tokens: of a completion.
        tail_tokens: of each 50th.
    """

    def __init__(self, *, tokens: int, tail_tokens: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokens = tokens
        self._tail_tokens = tail_tokens
        self._num_asked = 0

    def _parameters(self, sampling: Sampling, seed: int | None) -> Any:
        parameters = super()._parameters(sampling, seed)
        parameters.ignore_eos = True
        self._num_asked += 1
        parameters.max_tokens = self._tail_tokens if self._num_asked % ONE_IN == 0 else self._tokens
        return parameters


@dataclass(frozen=True, slots=True)
class Scenario:
    """Lengths in tokens; how many requests the engine works on at once, by which its speed is set."""

    groups_per_step: int
    tokens: int
    tail_tokens: int
    concurrent_requests: int
    max_staleness: int


SCENARIOS = {
    # A step's 32 completions are three rounds of the engine, also where they are alone.
    "balanced": Scenario(4, 16, 16, 11, 2),
    "long tails": Scenario(4, 8, 8 * TIMES_LONGER, 16, 8),
}


@dataclass(frozen=True, slots=True)
class Times:
    """Mean seconds of a run's steps, those at its ends left out.

    Attributes:
        step: from one to the next.
        waited: for the batch; with `max_staleness` 0, generation alone.
        learned: training and publishing.
    """

    step: float
    waited: float
    learned: float


def run(config: str, scenario: Scenario, max_staleness: int, steps: int, folder: Path) -> list[dict[str, float]]:
    """Returns the rows of a run's metrics."""
    args = json.dumps({"tokens": scenario.tokens, "tail_tokens": scenario.tail_tokens})
    overrides = {
        "run_dir": folder,
        "pipeline.steps": steps,
        "pipeline.groups_per_step": scenario.groups_per_step,
        "pipeline.max_staleness": max_staleness,
        "pipeline.parity_every": 0,
        "pipeline.filter_zero_variance": "false",
        "eval.every": 0,
        "data.eval": "null",
        "rollout.actor": "bench.overlap:FixedLengths",
        "rollout.args": args,
        "rollout.max_new_tokens": scenario.tail_tokens,
        "rollout.max_concurrent_requests": scenario.concurrent_requests,
        "rollout.threads": 1,
        "learner.threads": 1,
        "learner.lr": 1e-7,
        "checkpoint.save_final": "false",
        "logging.progress": "off",
        "logging.curves": "false",
        "logging.tensorboard": "false",
    }
    flags = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-m", "maspo_ray", "train", config, *flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def times_of(rows: list[dict[str, float]], max_staleness: int) -> Times:
    """Returns the times of a run's middle: in its first steps the engine fills the pipeline, in its last it has nothing to do."""
    middle = rows[1 + max_staleness : len(rows) - max_staleness]
    steps = [row["time/step_s"] for row in middle]
    return Times(
        statistics.mean(steps),
        statistics.mean(row["time/learner_wait_share"] * row["time/step_s"] for row in middle),
        statistics.mean(row["time/train_s"] + row["time/publish_s"] for row in middle),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/smollm2/run.yaml")
    parser.add_argument("--steps", type=int, default=8, help="of each run, besides those at its ends")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    seen: dict[str, list[list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name in options.scenarios:
                scenario = SCENARIOS[name]
                found = {}
                for bound in (0, scenario.max_staleness):
                    folder = Path(scratch) / f"{name}-{bound}-{repeat}".replace(" ", "-")
                    rows = run(options.config, scenario, bound, options.steps + 1 + 2 * bound, folder)
                    too_old = sum(row["groups/stale"] for row in rows)
                    assert not too_old, (
                        f"{too_old:.0f} groups were dropped for their age: raise the scenario's max_staleness"
                    )
                    found[bound] = times_of(rows, bound)
                    if bound == 0 and name == "balanced":
                        seen.setdefault(name, []).append([(row["loss"], row["learner/grad_norm"]) for row in rows])
                alone, together = found[0], found[scenario.max_staleness]
                longer = max(alone.waited, alone.learned)
                print(
                    f"{name}: generation alone {alone.waited:.2f} s, learning alone {alone.learned:.2f} s, one after the other "
                    f"{alone.step:.2f} s; at once (max_staleness {scenario.max_staleness}) {together.step:.2f} s, of which waited "
                    f"{together.waited:.2f} s",
                    flush=True,
                )
                if name == "balanced":
                    ratios.setdefault("step_over_bound", []).append(together.step / longer)
                    ratios.setdefault("speedup_over_synchronous", []).append(alone.step / together.step)
                    ratios.setdefault("generation_over_learning", []).append(alone.waited / alone.learned)
                else:
                    ratios.setdefault("long_tail_speedup", []).append(alone.step / together.step)
    figures = {name: statistics.median(values) for name, values in ratios.items()}
    spread = {name: [min(values), max(values)] for name, values in ratios.items()}
    for name, value in figures.items():
        print(f"{name:26s} {value:6.3f}  ({spread[name][0]:.3f} to {spread[name][1]:.3f})")
    repeats = all(rows == runs[0] for runs in seen.values() for rows in runs)
    print(f"{'repeats_exactly':26s} {repeats}  ({options.repeats} runs of each)")
    print(json.dumps({"bench": "overlap", **figures, "repeats_exactly": repeats, "spread": spread}))


if __name__ == "__main__":
    main()
