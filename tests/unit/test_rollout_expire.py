"""A group that is ended for its age, whenever that comes: the stream's last objects say so, or it is whole. Without an engine."""

import asyncio
from typing import Any

import numpy as np
import pytest

from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import ModelConfig, RolloutConfig
from maspo_ray.experience import Completion, Prompt, VersionSpan

PROMPT = Prompt("test/0", "", np.zeros(3, np.int32), None)


class _Slow(VLLMRollout):
    """Its samples end when they are told to."""

    def __init__(self) -> None:
        super().__init__(model=ModelConfig(path="m"), rollout=RolloutConfig(), max_model_tokens=8, threads=1, seed=0)
        self.may_end = [asyncio.Event() for _ in range(3)]

    async def _complete(self, group: Any, prompt: Any, *arguments: Any) -> Completion:
        sample = arguments[2]
        group.version = 4
        await self.may_end[sample].wait()
        tokens = np.zeros(2, np.int32)
        return Completion(tokens, np.zeros(2, np.float32), (VersionSpan(4, 0, 2),), "stop", "", sample)


async def _objects(engine: _Slow, expire_after: int, oldest_version: int, ending: int) -> list[list[Any]]:
    """Returns what a stream of three gives, of which some may end, with an `expire` after so many objects."""
    stream = engine.generate(PROMPT, temperature=1.0, max_new_tokens=2, seeds=[1, 2, 3])
    for event in engine.may_end[:ending]:
        event.set()
    objects = [await anext(stream) for _ in range(expire_after)]
    if expire_after == 0:
        first = asyncio.ensure_future(anext(stream))
        for _ in range(3):
            await asyncio.sleep(0)
        await engine.expire(oldest_version)
        objects.append(await first)
    else:
        await engine.expire(oldest_version)
    return objects + [value async for value in stream]


@pytest.mark.parametrize("expire_after", [1, 2])
def test_expire_while_completions_are_on_their_way_ends_the_rest_and_says_so(expire_after: int) -> None:
    async def run() -> list[list[Any]]:
        return await _objects(_Slow(), expire_after, oldest_version=5, ending=1)

    objects = asyncio.run(run())
    assert [len(value) for value in objects] == [1, 1, 0, 0]


def test_expire_of_a_group_none_of_which_has_ended_says_so() -> None:
    async def run() -> list[list[Any]]:
        return await _objects(_Slow(), 0, oldest_version=5, ending=0)

    assert asyncio.run(run()) == [[], []]


@pytest.mark.parametrize(("oldest_version", "ending"), [(4, 3), (5, 3)])
def test_expire_of_what_is_young_enough_or_has_all_ended_leaves_the_stream_whole(
    oldest_version: int, ending: int
) -> None:
    async def run() -> list[list[Any]]:
        return await _objects(_Slow(), 1, oldest_version, ending)

    objects = asyncio.run(run())
    assert sum(len(value) for value in objects[0::2]) == 3
