"""Writes what each step consumes, beside the learner that consumes it.

Promise: tokens go to the file by reference, the controller looks at none; one step's record is being written at a time,
and one that cannot be written ends the run with its cause. What a record holds is `step_record`'s.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maspo_ray.experience import Experience
from maspo_ray.fleet.calls import await_named, await_within
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.run_dir.paths import RunPaths
from maspo_ray.run_dir.step_record import Share, number_references, write_step


class RecordWriter:
    """An actor and not a task: Ray 2.60 ends a worker that is idle for a second, and starting one anew costs a second of CPU a step."""

    def write(
        self,
        path: Path,
        step: int,
        version: int,
        batch: Sequence[Experience],
        shares: Sequence[Share],
        *values: Any,
    ) -> None:
        """Writes the record of a step whose references are numbered (`number_references`); `values` are what they refer to, in the order
        of their numbers."""
        write_step(path, step, version, batch, shares, dict(enumerate(values)))


class RecordQueue:
    """Has a step's record written while the learner makes the step.

    Args:
        timeout_s: how long the run waits for a record where it has nothing else to do.
    """

    def __init__(self, fleet: Fleet, folder: RunPaths, timeout_s: float) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self._writer = fleet.create_here(RecordWriter)
        self._writing: tuple[int, Any] | None = None

    async def submit(self, step: int, version: int, batch: Sequence[Experience], shares: Sequence[Share]) -> None:
        """Begins to write a step's record, once the record before is on disk.

        Args:
            shares: of each rank, as `pack` made them of the batch.
        """
        await self.finish()
        path = self._folder.step_record(step).resolve()
        own, own_shares, references = number_references(batch, shares)
        self._writing = step, self._writer.write.remote(path, step, version, own, own_shares, *references)

    async def finish(self) -> None:
        """Waits until what was submitted is on disk.

        Raises:
            RunError: it could not be written.
        """
        if self._writing is None:
            return
        (step, written), self._writing = self._writing, None
        late = f"the record of step {step} was not written within pipeline.step_timeout_s"
        call = await_named(RecordWriter.__name__, f"writing the record of step {step}", written)
        await await_within(self._timeout_s, late, call)
