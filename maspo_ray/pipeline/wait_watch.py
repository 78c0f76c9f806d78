"""Looks at what a run waits for, as long as it runs.

Promise: no wait is without a name: one that lasts longer than a few typical steps is said, and an actor that is silent for longer than its
deadline ends the run.
"""

import asyncio
from collections.abc import Awaitable, Callable

from maspo_ray.run_dir.journal import Journal

_LOOK_EVERY_S = 1.0


async def watch_waits(journal: Journal, *checks: Callable[[], Awaitable[None]]) -> None:
    """Looks again and again, without end.

    Args:
        checks: each raises where an actor is silent for longer than it may be, or gone.
    """
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        journal.say_long_waits()
        for check in checks:
            await check()
