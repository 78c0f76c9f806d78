"""What Ray's client costs the controller for a group of 8 completions, with a real local Ray and the real rollout hosts.

    python -m bench.scale_out

client_ms_per_group        CPU of the controller's process, all its threads, for a group: `RolloutPool.sample` and Ray's client under it
through_controller_ms      the same where each completion comes to the controller by itself, as facts beside a reference, and is scored
                           by a call of the controller's: what a host that scores beside its engine saves

Real are Ray, `RolloutHost`, `Scorer`, `RewardHost`, `RolloutPool` and the objects' sizes (2,048 tokens a completion); only the engine is
not: its completions end after random times, far enough from each other that few travel together. Both ways run in turn, over the same
actors' processes, several times; the least and the most stand beside the median. What is not in it: the rest of the controller
(`bench.control_plane`), and a cluster's network.
"""

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import process_time
from typing import Any

import numpy as np
import ray

from maspo_ray.config import PlacementConfig
from maspo_ray.experience import Completion, CompletionFacts, Prompt, Sampling, Verdict, VersionSpan
from maspo_ray.fleet.environment import import_path
from maspo_ray.fleet.ray_session import connected
from maspo_ray.fleet.reward_calls import RewardCalls
from maspo_ray.hosts.engine_table import EngineTable
from maspo_ray.hosts.reward_host import RewardHost
from maspo_ray.hosts.rollout_host import RolloutHost
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.timeline import Timeline

SAMPLES, TOKENS = 8, 2048
APART_S = 0.05
"""Completions of a group end so far from each other, in the mean."""


def completion(text: str = " " * 4 * TOKENS) -> Completion:
    tokens, logprobs = np.zeros(TOKENS, np.int32), np.zeros(TOKENS, np.float32)
    return Completion(tokens, logprobs, (VersionSpan(0, 0, TOKENS),), "stop", text)


class SleepingEngine:
    """A `RolloutEngine` whose completions end one after the other."""

    async def setup(self) -> None:
        pass

    async def sample(self, token_ids: Any, *, sampling: Any, seed: int | None, cache_key: str) -> Completion:
        await asyncio.sleep(random.uniform(0, 2 * APART_S * SAMPLES))
        return completion()


class OneByOne:
    """A rollout actor that hands each completion to the controller, which has it scored."""

    async def generate(self, _: Any) -> AsyncIterator[Any]:
        ends = [asyncio.sleep(random.uniform(0, 2 * APART_S * SAMPLES)) for _ in range(SAMPLES)]
        for ended in asyncio.as_completed(ends):
            await ended
            yield [completion()]
            yield [CompletionFacts(TOKENS, 0, 0, "stop")]


class RightReward:
    """Finds every completion right."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [1.0] * len(completions)


class Actors:
    """Rollout actors by replica, as a fleet has them."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)

    def handle(self, role: str, replica: int) -> Any:
        return self._handles[replica]

    def count(self, role: str) -> int:
        return len(self._handles)


def start(actor_class: type, *arguments: Any) -> Any:
    environment = {"env_vars": {"PYTHONPATH": import_path()}}
    return ray.remote(actor_class).options(num_cpus=0, max_concurrency=4096, runtime_env=environment).remote(*arguments)


async def cpu_ms(group: Callable[[], Awaitable[None]], groups: int, at_once: int) -> float:
    """Returns this process's CPU for each of so many groups."""
    places = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with places:
            await group()

    await one()
    started = process_time()
    await asyncio.gather(*(one() for _ in range(groups)))
    return 1e3 * (process_time() - started) / groups


async def measure(hosts: list[Any], plain: list[Any], rewards: list[Any], options: Any) -> dict[str, list[float]]:
    """Returns each way's milliseconds of the repeats."""
    await asyncio.gather(*(host.setup.remote() for host in hosts))
    await asyncio.gather(*(host.connect_rewards.remote(len(rewards), RewardCalls(rewards)) for host in hosts))
    pool = RolloutPool(
        Actors(hosts), EngineTable(len(hosts)), ErrorWatch(1.0), Timeline(lambda event: None), 3600.0, 60.0
    )
    prompt, sampling = Prompt("bench/0", "", np.arange(200, dtype=np.int32), ""), Sampling(1.0, TOKENS)

    async def by_hosts() -> None:
        sampled = await pool.sample(prompt, sampling, [None] * SAMPLES)
        assert sampled is not None and len(sampled.rollouts) == SAMPLES

    async def through_controller() -> None:
        number = random.randrange(len(plain))
        reference = ray.put(prompt)
        scored: list[Awaitable[list[Verdict]]] = []
        objects = plain[number].generate.options(num_returns="streaming").remote(reference)
        async for payload in objects:
            facts: list[CompletionFacts] = await (await anext(objects))
            assert len(facts) == 1
            reward = rewards[random.randrange(len(rewards))]
            scored.append(asyncio.wrap_future(reward.score.remote(reference, payload).future()))
        for verdicts in scored:
            await verdicts

    found: dict[str, list[float]] = {"hosts": [], "controller": []}
    for _ in range(options.repeats):
        found["hosts"].append(await cpu_ms(by_hosts, options.groups, options.at_once))
        found["controller"].append(await cpu_ms(through_controller, options.groups, options.at_once))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--groups", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=32)
    options = parser.parse_args()
    with connected(PlacementConfig(object_store_gib=0.5)):
        hosts = [start(RolloutHost, SleepingEngine, {}, 4096, 600.0) for _ in range(2)]
        plain = [start(OneByOne) for _ in range(2)]
        rewards = [start(RewardHost, RightReward, {}, 60.0) for _ in range(2)]
        found = asyncio.run(measure(hosts, plain, rewards, options))
    ratios = [old / new for old, new in zip(found["controller"], found["hosts"], strict=True)]
    rows = {
        "client, ms a group": found["hosts"],
        "through the controller, ms a group": found["controller"],
        "ratio": ratios,
    }
    print(
        f"{options.groups} groups of {SAMPLES} completions of {TOKENS:,} tokens that end one by one, {options.repeats} repeats"
    )
    for name, values in rows.items():
        print(f"{name:36s}{statistics.median(values):8.2f}  ({min(values):.2f} to {max(values):.2f})")
    print(
        json.dumps(
            {
                "bench": "scale_out",
                "client_ms_per_group": statistics.median(found["hosts"]),
                "through_controller_ms": statistics.median(found["controller"]),
                "spread": {
                    "client_ms_per_group": [min(found["hosts"]), max(found["hosts"])],
                    "through_controller_ms": [min(found["controller"]), max(found["controller"])],
                },
            }
        )
    )


if __name__ == "__main__":
    main()
