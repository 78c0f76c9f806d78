"""What the controller costs: the real pipeline before simulated actors, in virtual time, 16,384 groups of 8 samples in flight.

    python -m bench.control_plane        (about 8 minutes)

controller_ms_per_group        CPU of the controller's process for a group, at 1,024 rollout and as many reward actors: from its prompt to
                               its line in the ledger, with the other actors' simulation taken off
growth_64_to_1024              that figure at 1,024 actors / at 64
memory_slope_bytes_per_group   of Python's live memory against groups that have ended, at 1,024 actors

Real are `Pipeline`, `RolloutPool`, `StalenessGate`, `GroupLedger`, `ReadyBuffer`, `PromptStream`, `Journal`, `Timeline`, `pack` and the
rollout hosts; simulated are the engines in these, the rewards and the learner (`bench/simulated.py`). A group is one call and one answer,
as in a run; its samples end one by one, so that each is scored by itself. A fifth of the groups is filtered and refilled, some go past the
staleness bound, some samples cannot be scored.

The simulation's own cost, the hosts' with it, is what the same actors take when a plain loop asks them for as many groups, awaits every
answer and does nothing with it. `with_simulation` is the figure with nothing taken off. Sizes run in turn; the least and the most stand
beside the median.

Memory is what tracemalloc counts, in a run of its own since counting slows it: RSS comes in pages that the allocator keeps, and blocks
(`sys.getallocatedblocks`) have no size. That run has 1,024 groups in flight. It is taken after each weight update, at a full garbage
collection, so that as many groups are in flight each time, from when the first of them have left to when the last are admitted. The slope
is by least squares, with its standard error.

Ray's client is in none of this (`bench.scale_out` measures it), nor is the record of each step (`logging.steps`), whose references go to an
actor of Ray's.
"""

import argparse
import asyncio
import gc
import json
import logging
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from bench.simulated import Behaviour, SimulatedFleet, VirtualLoop, simulated_config, simulated_pipeline
from maspo_ray.experience import Prompt, Sampling
from maspo_ray.hosts.messages import SampleRequest
from maspo_ray.pipeline.garbage import collecting_rarely
from maspo_ray.pipeline.loop import Pipeline

SIZES = (64, 1024)
GROUPS_PER_STEP, MAX_STALENESS, SAMPLES, RANKS = 4096, 3, 8, 64
IN_FLIGHT = GROUPS_PER_STEP * (MAX_STALENESS + 1)
REPEATS, STEPS = 3, 4
# A smaller step, of which there are more looks: what is in flight moves less from one to the next.
MEMORY_GROUPS_PER_STEP, MEMORY_STEPS, MEMORY_FIRST_LOOK = 256, 64, 8


@dataclass(frozen=True, slots=True)
class Driven:
    """A run's CPU for each of its groups, and how these ended."""

    ms_per_group: float
    groups: dict[str, int]


def make_prompts() -> list[Prompt]:
    ids = np.arange(200, dtype=np.int32)
    return [Prompt(f"bench/{i}", "", ids, "") for i in range(10_000)]


def in_virtual_time(main: Callable[[VirtualLoop], Coroutine[Any, Any, Driven]]) -> Driven:
    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop))


def drive(
    engines: int,
    steps: int,
    groups_per_step: int = GROUPS_PER_STEP,
    watch: Callable[[SimulatedFleet, Pipeline], None] | None = None,
) -> Driven:
    """Runs the real pipeline for so many steps."""

    async def main(loop: VirtualLoop) -> Driven:
        fleet = SimulatedFleet(loop, engines, engines, RANKS, Behaviour())
        config = simulated_config(
            Path(folder), steps=steps, groups_per_step=groups_per_step, max_staleness=MAX_STALENESS
        )
        pipeline, journal, _ = await simulated_pipeline(config, fleet, make_prompts())
        if watch is not None:
            watch(fleet, pipeline)
        started = process_time()
        await pipeline.run()
        taken = process_time() - started
        journal.close()
        groups = pipeline.group_counts
        return Driven(1e3 * taken / groups["submitted"], groups)

    with tempfile.TemporaryDirectory() as folder:
        return in_virtual_time(main)


def drive_plainly(engines: int, count: int) -> Driven:
    """Asks the same actors for as many groups, half of IN_FLIGHT at once: the others of a run are ready and wait for the learner."""

    async def main(loop: VirtualLoop) -> Driven:
        fleet = SimulatedFleet(loop, engines, engines, RANKS, Behaviour())
        await fleet.start()
        places, prompt, sampling = asyncio.Semaphore(IN_FLIGHT // 2), make_prompts()[0], Sampling(1.0, 1)

        async def group(number: int) -> None:
            request = SampleRequest(number, prompt, sampling, (None,) * SAMPLES)
            _, answer = fleet.handle("rollout", number % engines).sample.remote(request)
            await answer
            places.release()

        started = process_time()
        with collecting_rarely():
            async with asyncio.TaskGroup() as tasks:
                for number in range(count):
                    await places.acquire()
                    tasks.create_task(group(number))
        return Driven(1e3 * (process_time() - started) / count, {})

    return in_virtual_time(main)


def memory_slope(engines: int) -> dict[str, float]:
    """Returns the slope of live memory against ended groups, over those that ended between the first and the last look."""
    looks: list[tuple[int, int]] = []

    def watch(fleet: SimulatedFleet, pipeline: Pipeline) -> None:
        def look(version: int) -> None:
            if MEMORY_FIRST_LOOK <= version < MEMORY_STEPS - MAX_STALENESS:
                gc.collect()
                counts = pipeline.group_counts
                ended = sum(counts.values()) - counts["submitted"]
                looks.append((ended, tracemalloc.get_traced_memory()[0]))

        fleet.on_publish = look

    tracemalloc.start()
    drive(engines, MEMORY_STEPS, MEMORY_GROUPS_PER_STEP, watch)
    tracemalloc.stop()
    ended, live = np.array(looks, dtype=np.float64).T
    (slope, _), covariance = np.polyfit(ended, live, 1, cov=True)
    return {
        "slope": float(slope),
        "error": float(covariance[0, 0] ** 0.5),
        "groups": float(ended[-1] - ended[0]),
        "live_mb": float(live.mean() / 1e6),
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):8.3f}  ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # Simulated failures are logged as real ones are; here they are none.
    logging.disable(logging.WARNING)
    gross: dict[int, list[float]] = {size: [] for size in SIZES}
    plain: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(REPEATS):
        for size in SIZES:
            driven = drive(size, STEPS)
            gross[size].append(driven.ms_per_group)
            plain[size].append(drive_plainly(size, driven.groups["submitted"]).ms_per_group)
    memory = memory_slope(SIZES[-1])
    net = {size: [a - b for a, b in zip(gross[size], plain[size], strict=True)] for size in SIZES}
    growth = [b / a for a, b in zip(*net.values(), strict=True)]
    gross_growth = [b / a for a, b in zip(*gross.values(), strict=True)]

    ended = ", ".join(f"{count:,} {name}" for name, count in driven.groups.items())
    print(f"{IN_FLIGHT:,} groups of {SAMPLES} in flight, {RANKS} learner ranks; a run: {ended}")
    print(f"{'ms of CPU a group':36s}" + "".join(f"{f'{size:,} actors':>28s}" for size in SIZES))
    for name, figures in (("controller", net), ("with the simulation", gross), ("the simulation alone", plain)):
        print(f"{name:36s}" + "".join(f"{spread(figures[size]):>28s}" for size in SIZES))
    print(f"{'growth, controller':36s}{spread(growth)}")
    print(f"{'growth, with the simulation':36s}{spread(gross_growth)}")
    print(
        f"{'memory, bytes a group':36s}{memory['slope']:8.1f}  ± {memory['error']:.1f} over {memory['groups']:,.0f} groups, "
        f"{memory['live_mb']:.0f} MB live"
    )
    print(
        json.dumps(
            {
                "bench": "control_plane",
                "controller_ms_per_group": statistics.median(net[SIZES[-1]]),
                "controller_ms_per_group_64": statistics.median(net[SIZES[0]]),
                "with_simulation_ms_per_group": statistics.median(gross[SIZES[-1]]),
                "growth_64_to_1024": statistics.median(growth),
                "growth_with_simulation": statistics.median(gross_growth),
                "memory_slope_bytes_per_group": memory["slope"],
                "memory_slope_error": memory["error"],
                "spread": {
                    "controller_ms_per_group": [min(net[SIZES[-1]]), max(net[SIZES[-1]])],
                    "with_simulation_ms_per_group": [min(gross[SIZES[-1]]), max(gross[SIZES[-1]])],
                    "growth_64_to_1024": [min(growth), max(growth)],
                },
            }
        )
    )


if __name__ == "__main__":
    main()
