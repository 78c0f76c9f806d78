"""Actors that hang, on a real Ray: the wait has a name, and ends by its deadline. Engines and rewards are the test's own."""

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from maspo_ray.config import PlacementConfig
from maspo_ray.errors import ActorLate
from maspo_ray.experience import Prompt, Sampling
from maspo_ray.fleet.ray_session import connected
from maspo_ray.fleet.reward_calls import RewardCalls
from maspo_ray.hosts.engine_table import EngineTable
from maspo_ray.hosts.reward_host import RewardHost
from maspo_ray.hosts.rollout_host import RolloutHost
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.timeline import Timeline

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
PROMPT = Prompt("p/0", "", np.zeros(3, np.int32), "")
PLUGINS = """
import asyncio
import time

import numpy as np

from maspo_ray.experience import Completion, VersionSpan


class Engine:
    async def setup(self):
        pass

    async def sample(self, token_ids, *, sampling, seed, cache_key):
        if seed == 1:
            await asyncio.Event().wait()
        if seed == 2:
            time.sleep(3600)
        tokens = np.zeros(2, np.int32)
        return Completion(tokens, np.zeros(2, np.float32), (VersionSpan(0, 0, 2),), "stop", "")


class Reward:
    def __init__(self, blocks):
        self._blocks = blocks

    async def score(self, prompt, completions):
        if self._blocks:
            time.sleep(3600)
        return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "hanging_plugins.py").write_text(PLUGINS)
    os.environ.pop("RAY_ADDRESS", None)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{ROOT}:{folder}"
    with pytest.MonkeyPatch.context() as patch, connected(PlacementConfig(object_store_gib=0.1)):
        patch.syspath_prepend(folder)
        yield folder
    os.environ["PYTHONPATH"] = before


class _Actors:
    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def handle(self, role: str, replica: int) -> Any:
        return self._handles[replica]

    def count(self, role: str) -> int:
        return len(self._handles)


async def _sample(blocks: bool, seed: int, timeout_s: float, answer_s: float) -> int:
    """Returns how many completions came; looks after the engine as a run does."""
    from hanging_plugins import Engine, Reward  # type: ignore[import-not-found]

    hosts = ray.remote(RolloutHost).options(num_cpus=0, max_concurrency=20)
    host = hosts.remote(Engine, {}, 8, 1.0)
    reward = ray.remote(RewardHost).options(num_cpus=0, max_concurrency=20).remote(Reward, {"blocks": blocks}, 0.5)
    await host.setup.remote()
    await host.connect_rewards.remote(1, RewardCalls([reward]))
    pool = RolloutPool(_Actors([host]), EngineTable(1), ErrorWatch(1.0), Timeline(lambda _: None), timeout_s, answer_s)

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.1)
            await pool.check_silence()

    try:
        sampling = asyncio.ensure_future(pool.sample(PROMPT, Sampling(1.0, 2), [seed, 0]))
        watching = asyncio.ensure_future(watch())
        done, pending = await asyncio.wait([sampling, watching], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        for task in done:
            task.result()
        sampled = sampling.result()
        assert sampled is not None
        return len(sampled.rollouts)
    finally:
        for actor in (host, reward):
            ray.kill(actor)


def test_wait_for_actors_that_answer_ends_with_their_answer(folder: Path) -> None:
    assert asyncio.run(_sample(False, 0, timeout_s=30.0, answer_s=30.0)) == 2


def test_wait_for_an_engine_that_deadlocks_ends_by_rollout_timeout_s(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(
        ActorLate, match=r"^rollout/0 has ended no completion for \d+ s.* rollout.timeout_s is 2"
    ) as raised:
        asyncio.run(_sample(False, 1, timeout_s=2.0, answer_s=30.0))
    assert raised.value.actor == "rollout/0"
    assert time.monotonic() - started < 60


def test_wait_for_an_engine_that_blocks_its_actor_ends_by_the_deadline_of_a_sign_of_life(folder: Path) -> None:
    with pytest.raises(ActorLate, match=r"^rollout/0 did not answer within 1 s when asked how it fares") as raised:
        asyncio.run(_sample(False, 2, timeout_s=1.0, answer_s=1.0))
    assert raised.value.actor == "rollout/0"


def test_wait_for_an_async_reward_that_blocks_its_loop_ends_with_its_name(folder: Path) -> None:
    with pytest.raises(ActorLate, match=r"^reward/0 has answered nothing for \d+ s") as raised:
        asyncio.run(_sample(True, 0, timeout_s=30.0, answer_s=30.0))
    assert raised.value.actor == "reward/0"
