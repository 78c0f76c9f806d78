"""A learner of the user's own that hangs in a step: the call ends by its deadline and says which rank, in what, and by which key."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from maspo_ray.config import PlacementConfig, RunConfig
from maspo_ray.errors import RunError
from maspo_ray.fleet.fleet import Fleet
from maspo_ray.fleet.loading import load_actor_class
from maspo_ray.fleet.placement import RoleDemand, plan
from maspo_ray.fleet.ray_session import connected
from maspo_ray.fleet.reservation import cluster_nodes, reserve

pytestmark = pytest.mark.ray
STEP_TIMEOUT_S = 1.5

LEARNER = """
import time


class HangingLearner:
    def __init__(self, *, rank, hanging_ranks, **given):
        self._hangs = rank in hanging_ranks

    def rendezvous(self):
        return "127.0.0.1", 1

    def setup(self, master_address, master_port):
        pass

    def train_step(self, version, plans, *payloads):
        if self._hangs:
            time.sleep(3600)
        return [f"trained at {version}"]

    def shares_prompts(self):
        return True

    def completion_logprobs(self, pairs):
        return []

    def connect(self, rollout_handles, workers_per_engine, update, backend, timeout_s):
        pass

    def publish(self, version):
        pass

    def save(self, folder):
        pass

    def save_state(self, folder):
        pass

    def load_state(self, folder):
        pass

    def shutdown(self):
        pass
"""


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    os.environ.pop("RAY_ADDRESS", None)
    with connected(PlacementConfig(object_store_gib=0.1)):
        yield


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's module lies and the command is given."""
    (tmp_path / "hanging_learner.py").write_text(LEARNER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _config(folder: Path, hanging_ranks: list[int]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "none", "dtype": "float32"},
            "data": {"train": {"kind": "jsonl", "path": "none.jsonl"}},
            "reward": {"actor": "hanging_learner:HangingLearner"},
            "learner": {
                "actor": "hanging_learner:HangingLearner",
                "args": {"hanging_ranks": hanging_ranks},
                "replicas": 2,
                "cpus": 0.1,
            },
            "pipeline": {"groups_per_step": 2, "step_timeout_s": STEP_TIMEOUT_S},
            "run_dir": str(folder / "run"),
        }
    )


async def _train_step(fleet: Fleet) -> Any:
    """Returns what the learner's first rank returns of a step without a batch."""
    return await fleet.learners_each("train_step", [(7, ()), (7, ())])


def _step_of_a_fleet(config: RunConfig) -> tuple[Any, float, list[int]]:
    """Starts the learner's ranks, makes one step, and ends them.

    Returns:
        The step's answer or its error, the seconds that it took, and the ids of the ranks' processes.
    """
    classes = {"learner": load_actor_class("learner", config.learner.actor)}
    ranks = config.learner.replicas
    planned = plan([RoleDemand("learner", ranks, None, 0, config.learner.cpus)], cluster_nodes())
    reservation = reserve(planned, wait_s=30)
    fleet = Fleet(config, classes, planned, reservation)
    try:
        asyncio.run(fleet.setup(lambda note: None))
        pids = ray.get([h.__ray_call__.remote(lambda _: os.getpid()) for h in fleet.of_role("learner")])
        started = time.monotonic()
        try:
            answer: Any = asyncio.run(_train_step(fleet))
        except RunError as error:
            answer = error
        return answer, time.monotonic() - started, pids
    finally:
        asyncio.run(fleet.shutdown())
        reservation.release()


def test_train_step_in_time_returns_what_rank_0_returns(own_ray: None, user_folder: Path) -> None:
    answer, seconds, _ = _step_of_a_fleet(_config(user_folder, []))
    assert answer == ["trained at 7"]
    assert seconds < STEP_TIMEOUT_S


@pytest.mark.parametrize("rank", [0, 1])
def test_train_step_that_hangs_ends_by_step_timeout_s_and_names_the_rank_and_the_key(
    own_ray: None, user_folder: Path, rank: int
) -> None:
    answer, seconds, pids = _step_of_a_fleet(_config(user_folder, [rank]))
    assert isinstance(answer, RunError)
    [line] = str(answer).splitlines()
    assert f"learner/{rank}" in line and f"learner/{1 - rank}" not in line
    assert "train" in line and "pipeline.step_timeout_s" in line and f"{STEP_TIMEOUT_S:g} s" in line
    assert STEP_TIMEOUT_S <= seconds < STEP_TIMEOUT_S + 3
    # Nothing of it is left: the rank that hangs does not end by itself.
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
