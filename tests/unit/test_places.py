"""Places of an engine: never more than there are, by priority and then by turn, and none is lost whoever is cancelled when."""

import asyncio
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from maspo_ray.hosts.places import Places


async def _settle() -> None:
    """Lets everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


class _Guests:
    """Tasks that take a place and hold it until they are told to leave."""

    def __init__(self, num_places: int) -> None:
        self.places = Places(num_places)
        self.num_places = num_places
        self.entered: list[int] = []
        self.inside: set[int] = set()
        self.leave: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []

    def arrive(self, priority: int) -> int:
        self.leave.append(asyncio.Event())
        self.tasks.append(asyncio.create_task(self._stay(len(self.tasks), priority)))
        return len(self.tasks) - 1

    async def _stay(self, guest: int, priority: int) -> None:
        async with self.places.at(priority):
            self.entered.append(guest)
            self.inside.add(guest)
            assert len(self.inside) <= self.num_places
            try:
                await self.leave[guest].wait()
            finally:
                self.inside.remove(guest)

    async def all_places_are_free(self) -> bool:
        """Whether as many as there are can be taken at once, and no more."""
        for _ in range(self.num_places):
            await asyncio.wait_for(self.places.take(0), 1.0)
        more = asyncio.ensure_future(self.places.take(0))
        await _settle()
        full = not more.done()
        more.cancel()
        return full


def test_places_are_given_by_priority_and_in_turn_among_equals() -> None:
    async def run() -> list[int]:
        guests = _Guests(1)
        for priority in (1, 1, 1, 0, 2, 0):
            guests.arrive(priority)
            await _settle()
        for _ in range(6):
            guests.leave[guests.entered[-1]].set()
            await _settle()
        await asyncio.gather(*guests.tasks)
        return guests.entered

    # The first finds it free; then those of 0 in turn, those of 1, and that of 2.
    assert asyncio.run(run()) == [0, 3, 5, 1, 2, 4]


def test_places_one_that_fails_within_gives_its_place_back() -> None:
    async def run() -> bool:
        guests = _Guests(1)
        try:
            async with guests.places.at(0):
                raise ValueError
        except ValueError:
            return await guests.all_places_are_free()

    assert asyncio.run(run())


def test_places_one_cancelled_as_it_is_given_the_place_passes_it_on() -> None:
    async def run() -> tuple[list[int], bool]:
        guests = _Guests(1)
        for _ in range(3):
            guests.arrive(0)
            await _settle()
        guests.tasks[0].cancel()
        # The first runs its last lines and gives the place to the second, which has not run since.
        while guests.inside:
            await asyncio.sleep(0)
        guests.tasks[1].cancel()
        await _settle()
        assert guests.tasks[1].cancelled()
        guests.leave[2].set()
        await guests.tasks[2]
        return guests.entered, await guests.all_places_are_free()

    assert asyncio.run(run()) == ([0, 2], True)


@dataclass(frozen=True)
class _Event:
    """What happens next.

    Attributes:
        kind: 0, 1 or 2 for an arrival of that priority; "leave" for a guest that has done; "cancel" for any.
        which: of those that it can happen to.
        turns: of the event loop that pass before the next.
    """

    kind: int | str
    which: int
    turns: int


EVENTS = st.lists(
    st.builds(_Event, st.sampled_from([0, 1, 2, "leave", "cancel"]), st.integers(0, 30), st.integers(0, 3)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(num_places=st.integers(1, 3), events=EVENTS)
def test_places_whoever_is_cancelled_when_none_is_lost_and_none_is_given_twice(
    num_places: int, events: list[_Event]
) -> None:
    async def run() -> None:
        guests = _Guests(num_places)
        for event in events:
            under_way = [i for i, task in enumerate(guests.tasks) if not task.done()]
            if isinstance(event.kind, int):
                guests.arrive(event.kind)
            elif under_way:
                guest = under_way[event.which % len(under_way)]
                if event.kind == "leave":
                    guests.leave[guest].set()
                else:
                    guests.tasks[guest].cancel()
            for _ in range(event.turns):
                await asyncio.sleep(0)
        await _settle()
        # No place stays empty while somebody waits.
        waiting = sum(not task.done() for task in guests.tasks) - len(guests.inside)
        assert len(guests.inside) == num_places or waiting == 0
        for leave in guests.leave:
            leave.set()
        ended = await asyncio.wait_for(asyncio.gather(*guests.tasks, return_exceptions=True), 1.0)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in ended)
        assert await guests.all_places_are_free()

    asyncio.run(run())
