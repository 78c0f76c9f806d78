"""A step again, from the learner's state before it and the record of what it consumed.

Promise: only the learner is started, with as many ranks as the run had; it is given what it was given then, and what comes of it is
compared with what the run saved, parameter by parameter.
"""

import asyncio
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from maspo_ray.fleet.fleet import Fleet
from maspo_ray.fleet.loading import load_role
from maspo_ray.fleet.placement import RoleDemand
from maspo_ray.fleet.ray_session import connected
from maspo_ray.fleet.reservation import reserve, wait_for_cluster
from maspo_ray.replay.model_difference import ModelDifference, model_difference
from maspo_ray.replay.plan import ReplayPlan
from maspo_ray.run_dir.metrics import combine_updates
from maspo_ray.run_dir.step_record import read_step
from maspo_ray.stop_signals import cancelled_by_signals, stop_signals


def replay(plan: ReplayPlan, note: Callable[[str], None]) -> ModelDifference:
    """Replays a step; returns how far its model is from the one that the run saved.

    Args:
        note: is told of each step, in a line.

    Raises:
        ConfigError: the cluster does not hold the learner; a record cannot be read.
        RunError: it could not be replayed.
    """
    learner, placement = plan.config.learner, plan.config.placement
    classes = {"learner": load_role(plan.config, "learner")}
    demand = RoleDemand("learner", plan.ranks, None, learner.gpus, learner.cpus)
    with stop_signals(), connected(placement) as may_grow:
        placed = wait_for_cluster([demand], placement.wait_s if may_grow else 0.0)
        reservation = reserve(placed, placement.wait_s)
        try:
            return asyncio.run(_replay(plan, Fleet(plan.config, classes, placed, reservation), note))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            reservation.release()


async def _replay(plan: ReplayPlan, fleet: Fleet, note: Callable[[str], None]) -> ModelDifference:
    try:
        with cancelled_by_signals():
            await fleet.setup(lambda _: None)
            if plan.state is not None:
                await fleet.learner.load_state(plan.state)
            for step in range(plan.start + 1, plan.step + 1):
                note(_line(step, await _step(plan, fleet, step), plan.rows[step]))
            # Where learner ranks on other nodes see it too.
            with tempfile.TemporaryDirectory(prefix=".replay-", dir=plan.paths.path.resolve()) as folder:
                await fleet.learner.save(Path(folder))
                return model_difference(Path(folder), plan.saved)
    finally:
        await fleet.shutdown()


async def _step(plan: ReplayPlan, fleet: Fleet, step: int) -> dict[str, float]:
    """Makes a step as its record says; returns the learner's metrics."""
    record = read_step(plan.paths.step_record(step))
    reports = await fleet.learner.train(record.version, record.shares)
    return combine_updates([report.metrics for report in reports])


def _line(step: int, metrics: Mapping[str, float], row: Mapping[str, Any]) -> str:
    figures = [
        f"{shown} {_number(metrics.get(name))} (in the run {_number(row.get(name))})"
        for name, shown in (("loss", "loss"), ("learner/grad_norm", "gradient norm"))
    ]
    return f"step {step}: {', '.join(figures)}"


def _number(value: float | None) -> str:
    """Returns a figure; of a step whose updates were all left out there is none, which a row says by null and the learner by NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.9g}"
