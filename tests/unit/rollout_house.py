"""A rollout host over an engine and a reward whose every answer a test gives."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from maspo_ray.experience import Completion, Prompt, SampledGroup, Sampling, Verdict, VersionSpan
from maspo_ray.hosts import rollout_host
from maspo_ray.hosts.messages import Ended, Priority, SampleRequest
from maspo_ray.hosts.rollout_host import Answer, RolloutHost

PROMPT = Prompt("test/0", "", np.array([3, 4], np.int32), "4")
SAMPLING = Sampling(0.8, 16)
T = TypeVar("T")


class Asked:
    """A completion that an engine was asked for; the test ends it."""

    def __init__(self, seed: int | None, sampling: Sampling, cache_key: str, version: int) -> None:
        self.seed, self.sampling, self.cache_key, self.version = seed, sampling, cache_key, version
        self.completion: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()

    def end(self, tokens: int = 1, version: int | None = None) -> None:
        """Ends it with so many tokens, all its seed, as sampled by the weights of a version, by default of the one it began with."""
        version = self.version if version is None else version
        ids = np.full(tokens, self.seed or 0, np.int32)
        logprobs = np.full(tokens, -1.0, np.float32)
        self.completion.set_result(Completion(ids, logprobs, (VersionSpan(version, 0, tokens),), "stop", ""))


class Engine:
    """Notes what it is asked for.

    Attributes:
        asked: in the order in which it came.
        weights: the calls of updates.
    """

    def __init__(self, made: "list[Engine]") -> None:
        made.append(self)
        self.asked: list[Asked] = []
        self.weights: list[str] = []
        self.linger_s = 0.0
        self._version = 0

    async def setup(self) -> None:
        pass

    async def sample(
        self, token_ids: NDArray[np.int32], *, sampling: Sampling, seed: int | None, cache_key: str
    ) -> Completion:
        assert token_ids.tolist() == [3, 4]
        asked = Asked(seed, sampling, cache_key, self._version)
        self.asked.append(asked)
        try:
            return await asked.completion
        except asyncio.CancelledError:
            await asyncio.sleep(self.linger_s)
            raise

    def of(self, seed: int) -> Asked:
        [asked] = [asked for asked in self.asked if asked.seed == seed]
        return asked

    @property
    def running(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.completion.done()]

    async def start_weight_update(self) -> None:
        self.weights.append("start")

    async def finish_weight_update(self, weight_version: int) -> None:
        self.weights.append(f"finish {weight_version}")
        self._version = weight_version


class Reward:
    """Scores a completion with its first token, which is its seed, unless a replica is told to answer nothing.

    Attributes:
        calls: replica and seeds of each; given_up, seeds of those that nobody waits for any more.
        open: one for each replica; cleared, it answers nothing.
    """

    def __init__(self, replicas: int = 2) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.given_up: list[list[int]] = []
        self.open = [asyncio.Event() for _ in range(replicas)]
        for event in self.open:
            event.set()

    async def score(self, replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        assert prompt is PROMPT
        seeds = [int(completion.token_ids[0]) for completion in completions]
        self.calls.append((replica, seeds))
        try:
            await self.open[replica].wait()
        except asyncio.CancelledError:
            self.given_up.append(seeds)
            raise
        return [Verdict.from_reward(seed) for seed in seeds]

    @property
    def seeds(self) -> list[list[int]]:
        return [seeds for _, seeds in self.calls]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class House:
    """A host with its engine and its reward."""

    def __init__(self, host: RolloutHost, engine: Engine, reward: Reward) -> None:
        self.host, self.engine, self.reward = host, engine, reward
        self.num_requests = 0

    def ask(self, *seeds: int, priority: Priority = Priority.TRAINING, scored: bool = True) -> asyncio.Task[Answer]:
        """Begins a request with the next id, from 0."""
        request = SampleRequest(self.num_requests, PROMPT, SAMPLING, seeds, priority, scored)
        self.num_requests += 1
        return asyncio.create_task(self.host.sample(request))

    async def update(self, version: int) -> None:
        await self.host.start_weight_update()
        await self.host.finish_weight_update(version)

    async def all_places_are_free(self, num_places: int) -> bool:
        """Whether as many completions as the host has places run at once, and no more."""
        before = len(self.engine.asked)
        probe = self.ask(*range(num_places + 1), priority=Priority.PROBE, scored=False)
        await settle()
        began = len(self.engine.asked) - before
        probe.cancel()
        await settle()
        return began == num_places


MOMENT_S = 0.1
"""What `TOGETHER_S` is here: long enough for what a test does within it on a busy machine."""


async def moment_passes() -> None:
    """Lets what has ended be scored without the rest of its group."""
    await asyncio.sleep(1.5 * MOMENT_S)
    await settle()


async def settle() -> None:
    """Lets everything run that can without waiting."""
    for _ in range(10):
        await asyncio.sleep(0)


def run(
    test: Callable[[House], Awaitable[T]],
    places: int = 8,
    deadline_s: float = 60.0,
    clock: Callable[[], float] | None = None,
) -> T:
    """Returns what a test returns, over a host that is set up; nothing may have gone wrong beside it."""

    async def inner() -> T:
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        made: list[Engine] = []
        host = RolloutHost(Engine, {"made": made}, places, deadline_s, **({} if clock is None else {"clock": clock}))
        reward = Reward()
        await host.setup()
        await host.connect_rewards(len(reward.open), reward.score)
        found = await asyncio.wait_for(test(House(host, made[0], reward)), 10.0)
        await settle()
        assert not unhandled
        return found

    with patch.object(rollout_host, "TOGETHER_S", MOMENT_S):
        return asyncio.run(inner())


def whole(answer: Answer) -> tuple[list[int], list[float]]:
    """Returns seeds and rewards of a request that came out whole."""
    group, said = answer
    assert isinstance(group, SampledGroup) and isinstance(said, Ended)
    assert len(said.facts) == len(group.completions)
    assert [fact.num_tokens for fact in said.facts] == [len(c.token_ids) for c in group.completions]
    return [int(c.token_ids[0]) for c in group.completions], [verdict.reward for verdict in said.verdicts]
