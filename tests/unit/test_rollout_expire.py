"""A request that is ended for its age, whenever that comes: it says so, or it comes out whole."""

import asyncio

import pytest
from rollout_house import House, moment_passes, run, settle, whole

from maspo_ray.hosts.messages import Expired, Priority
from maspo_ray.hosts.rollout_host import Answer


async def _expired(house: House, answer: asyncio.Task[Answer], oldest_version: int) -> bool:
    """Returns whether a beat ends a request; it is not done before."""
    await settle()
    assert not answer.done()
    await house.host.beat(oldest_version)
    await settle()
    if not answer.done():
        return False
    assert answer.result() == (None, Expired())
    return True


def test_expiry_ends_what_began_with_older_weights_and_frees_its_places() -> None:
    async def test(house: House) -> None:
        await house.update(4)
        old = house.ask(5, 6, 7)
        await settle()
        house.engine.of(6).end()
        await house.update(5)
        young = house.ask(8)
        assert not await _expired(house, young, 5)
        assert old.result() == (None, Expired())
        assert [house.engine.of(seed).completion.cancelled() for seed in (5, 6, 7, 8)] == [True, False, True, False]
        # What was about to be scored is not.
        await moment_passes()
        assert house.reward.calls == []
        house.engine.of(8).end()
        assert whole(await young) == ([8], [8.0])
        assert await house.all_places_are_free(4)

    run(test, places=4)


@pytest.mark.parametrize(("oldest_version", "ends"), [(4, False), (5, True)])
def test_expiry_is_by_the_version_that_the_first_completion_began_with(oldest_version: int, ends: bool) -> None:
    async def test(house: House) -> bool:
        await house.update(4)
        answer = house.ask(5, 6)
        await settle()
        # The second gets its place while weights change, and begins with the newer.
        await house.host.start_weight_update()
        house.engine.of(5).end()
        await settle()
        await house.host.finish_weight_update(5)
        await settle()
        assert [asked.cache_key for asked in house.engine.asked] == ["v4", "v5"]
        return await _expired(house, answer, oldest_version)

    assert run(test, places=1) is ends


def test_expiry_leaves_what_has_not_begun() -> None:
    async def test(house: House) -> Answer:
        probe, waiting = house.ask(1, priority=Priority.PROBE), house.ask(5)
        assert not await _expired(house, waiting, 9)
        house.engine.of(1).end()
        await probe
        house.engine.of(5).end()
        return await waiting

    assert whole(run(test, places=1)) == ([5], [5.0])


def test_expiry_leaves_what_has_all_ended_and_is_being_scored() -> None:
    async def test(house: House) -> Answer:
        house.reward.open[0].clear()
        answer = house.ask(5, 6)
        await settle()
        house.engine.of(5).end()
        house.engine.of(6).end()
        assert not await _expired(house, answer, 9)
        house.reward.open[0].set()
        return await answer

    assert whole(run(test)) == ([5, 6], [5.0, 6.0])


def test_expiry_ends_a_group_of_which_a_part_is_being_scored() -> None:
    async def test(house: House) -> None:
        house.reward.open[0].clear()
        answer = house.ask(5, 6)
        await settle()
        house.engine.of(5).end()
        await moment_passes()
        assert house.reward.seeds == [[5]]
        assert await _expired(house, answer, 9)
        assert house.reward.given_up == [[5]]

    run(test)


def test_expiry_never_ends_a_probe() -> None:
    async def test(house: House) -> Answer:
        answer = house.ask(5, priority=Priority.PROBE)
        assert not await _expired(house, answer, 9)
        house.engine.of(5).end()
        return await answer

    assert whole(run(test)) == ([5], [5.0])
