"""A step's record, written by a real actor of Ray: it is there, or the run ends with the reason."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from maspo_ray.errors import RunError
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
from maspo_ray.pipeline.record_queue import RecordQueue
from maspo_ray.run_dir.paths import RunPaths
from maspo_ray.run_dir.step_record import read_step

pytestmark = [pytest.mark.engine, pytest.mark.ray]


class _Fleet:
    @staticmethod
    def create_here(actor_class: type) -> Any:
        return ray.remote(actor_class).options(num_cpus=0).remote()


def _record(folder: Path) -> RunPaths:
    """Has the record of a step of one group written."""
    ids = np.arange(3, 7, dtype=np.int32)
    completion = Completion(ids, np.zeros(4, np.float32), (VersionSpan(2, 0, 4),), "stop", "")
    rollout = Rollout(CompletionFacts.of(completion), Verdict.from_reward(1.0))
    payload = ray.put(SampledGroup(Prompt("rows/5", "", ids, ""), (completion,)))
    group = Group(5, "rows/5", payload, 4, 2, 0, (rollout,), (11,))
    batch, paths = [Experience(group, (1.0,), None)], RunPaths(folder)

    async def write() -> None:
        fleet: Any = _Fleet()
        recorder = RecordQueue(fleet, paths, timeout_s=60.0)
        await recorder.submit(3, 2, batch, pack(batch, 1, 100, False))
        await recorder.finish()

    asyncio.run(write())
    return paths


def test_record_is_on_disk_when_the_recorder_has_finished(own_ray: None, tmp_path: Path) -> None:
    record = read_step(_record(tmp_path).step_record(3))
    assert (record.step, record.version) == (3, 2)


def test_record_that_cannot_be_written_ends_the_run_with_the_cause(own_ray: None, tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("a file where the folder would be")
    with pytest.raises(
        RunError, match=r"^RecordWriter failed while writing the record of step 3: (NotADirectory|FileExists)Error: "
    ):
        _record(tmp_path)
