"""A Ray of the run's own: its logs stay where an error may have begun in an actor, and only there."""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray._private.worker

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ActorGone, ConfigError, RunError
from maspo_ray.fleet.calls import await_named
from maspo_ray.fleet.ray_session import connected

pytestmark = pytest.mark.ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
PLACEMENT = PlacementConfig(object_store_gib=0.1)


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (RunError("an actor failed"), True),
        (KeyError("a bug of our own"), True),
        (ConfigError("pipeline.steps is 0"), False),
        (KeyboardInterrupt(), False),
        (None, False),
    ],
    ids=["run error", "bug", "config error", "interruption", "no error"],
)
def test_logs_of_an_own_ray_stay_for_what_may_have_begun_in_an_actor(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, is_kept: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, logs = Path(), Path()
    try:
        with connected(PLACEMENT):
            logs = Path(ray._private.worker._global_node.get_logs_dir_path())
            folder = logs.parents[1]
            assert any(logs.iterdir())
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    try:
        assert folder.exists() is is_kept
        if error is not None and is_kept:
            assert error.__notes__ == [f"the actors' logs are in {folder}/session_latest/logs"]
            assert any(logs.glob("raylet*"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Idle:
    async def wait(self) -> None:
        await asyncio.sleep(60.0)


def test_actor_that_ray_ends_to_save_memory_is_gone_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    memory = psutil.virtual_memory()
    # Below what is in use, so that Ray takes the node to be out of memory at once.
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{memory.used / memory.total / 100:.4f}")
    with pytest.raises(ActorGone) as raised, connected(PLACEMENT):
        idle: Any = ray.remote(Idle).options(num_cpus=0).remote()
        asyncio.run(asyncio.wait_for(await_named("rollout/0", "generating", idle.wait.remote()), 50.0))
    line = str(raised.value)
    assert line.startswith("rollout/0 was lost while generating: ") and "memory" in line and "\n" not in line
    shutil.rmtree(Path(raised.value.__notes__[0].removeprefix("the actors' logs are in ")).parents[1])
