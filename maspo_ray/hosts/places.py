"""Places in an engine, given to whoever is first by priority.

Promise: at most `num_places` are taken at once; a place that is given back goes to the waiting request of the lowest priority number, and
among equals to the one that came first; one that is cancelled while it waits takes none.
"""

import asyncio
from heapq import heappop, heappush
from types import TracebackType


class Places:
    """Counts the places of an engine."""

    def __init__(self, num_places: int) -> None:
        self._free = num_places
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._num_asked = 0

    def at(self, priority: int) -> "_Place":
        """Returns a context manager that waits for a place and holds it within."""
        return _Place(self, priority)

    async def take(self, priority: int) -> None:
        if self._free > 0:
            # Nobody waits while a place is free.
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_asked += 1
        heappush(self._waiting, (priority, self._num_asked, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                # The place was given in the moment of the cancellation.
                self.give_back()
            raise

    def give_back(self) -> None:
        while self._waiting:
            turn = heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class _Place:
    __slots__ = ("_places", "_priority")

    def __init__(self, places: Places, priority: int) -> None:
        self._places = places
        self._priority = priority

    async def __aenter__(self) -> None:
        await self._places.take(self._priority)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._places.give_back()
