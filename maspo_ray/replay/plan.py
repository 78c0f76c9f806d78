"""What replaying a step takes: found in the run's folder, or named as what is not there, before anything starts.

Promise: a `ReplayPlan` that exists names files that are there. Imports neither torch nor ray.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maspo_ray.config import RunConfig, load_config
from maspo_ray.errors import ConfigError
from maspo_ray.preflight import check_model
from maspo_ray.run_dir.checkpoint import state_of
from maspo_ray.run_dir.paths import RunPaths
from maspo_ray.run_dir.step_record import ranks_of


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """Steps `start + 1` to `step`, from the learner's state after `start`.

    Attributes:
        state: of the learner after step `start`; None at the start of the run, where it is the config's model and a new optimizer.
        saved: the model that the run saved after `step`.
        rows: the run's metrics of each of its steps.
        ranks: of the run's learner.
    """

    config: RunConfig
    paths: RunPaths
    start: int
    step: int
    state: Path | None
    saved: Path
    rows: Mapping[int, Mapping[str, Any]]
    ranks: int

    @property
    def is_exact(self) -> bool:
        """Whether the same step must come out bit for bit; on a GPU sums are added up in an order that varies."""
        return self.config.model.dtype == "float32" and self.config.learner.gpus == 0


def plan_replay(run_dir: Path, step: int, start: int | None = None, overrides: Sequence[str] = ()) -> ReplayPlan:
    """Returns how to replay a step of a run.

    Args:
        start: the step after which to begin; by default the newest after which the run saved a checkpoint, 0 if there is none.
        overrides: flags over the run's config, such as where the model is now.

    Raises:
        ConfigError: something that it takes is not there.
    """
    paths = RunPaths(run_dir)
    if not paths.config.is_file() or not paths.metrics.is_file():
        raise ConfigError(
            f"RUN_DIR is {run_dir}; it holds no run ({paths.config.name}, {paths.metrics.name}). Give the folder of one."
        )
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(
            f"RUN_DIR is {run_dir}; a replay saves its model there for a while, and it cannot be written to. Copy it."
        )
    config = load_config(paths.config, overrides)
    # For the learner alone, whatever the engine's attention takes.
    check_model(config.model, "cuda")
    rows = _rows(paths.metrics)
    if step not in rows:
        made = (
            f"the run made steps 1 to {max(rows)}. Give one of them" if rows else "the run made none. Give another run"
        )
        raise ConfigError(f"--step is {step}; {made}.")
    saved = _saved_model(paths, step, config)
    start = _start(step, start, config.checkpoint.every)
    state = state_of(paths.checkpoint(start)) if start else None
    ranks = _ranks(paths, range(start + 1, step + 1))
    return ReplayPlan(config, paths, start, step, state, saved, rows, ranks)


def _rows(metrics: Path) -> dict[int, dict[str, Any]]:
    """Returns the metrics by step; a last line that was cut off is none."""
    rows = {}
    for line in metrics.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row["step"]] = row
    return rows


def _saved_model(paths: RunPaths, step: int, config: RunConfig) -> Path:
    folders = [folder for folder in paths.path.glob("checkpoints/step_*") if folder.name[5:].isdigit()]
    after = {int(folder.name[5:]): folder for folder in folders}
    after.setdefault(config.pipeline.steps, paths.final)
    there = {number: folder for number, folder in sorted(after.items()) if any(folder.glob("*.safetensors"))}
    if step in there:
        return there[step]
    others = f"Replay one of {', '.join(map(str, there))}, or train" if there else "Train"
    raise ConfigError(
        f"--step is {step}; no model that the run saved after it is there, so there is nothing to compare with. {others} with "
        "checkpoint.every 1."
    )


def _start(step: int, start: int | None, every: int) -> int:
    if start is None:
        return (step - 1) // every * every if every else 0
    if not 0 <= start < step:
        raise ConfigError(
            f"--start is {start}; it must be a step before --step ({step}), or 0, the start of the run. Change it."
        )
    return start


def _ranks(paths: RunPaths, steps: range) -> int:
    """Returns how many ranks made the steps, all of whose records are there."""
    if not paths.step_record(1).parent.is_dir():
        raise ConfigError(
            f"RUN_DIR is {paths.path}; the run kept no records of its steps. Train with logging.steps true."
        )
    return {ranks_of(paths.step_record(step)) for step in steps}.pop()
