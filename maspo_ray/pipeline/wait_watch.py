"""Looks at what a run waits for, as long as it runs.

Promise: no wait is without a name: one that lasts longer than a few typical steps is said, and an actor that is silent for longer than its
deadline ends the run.
"""

import asyncio

from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.rollouts.references import ReferencePool
from maspo_ray.run_dir.journal import Journal

_LOOK_EVERY_S = 1.0


async def watch_waits(journal: Journal, pool: RolloutPool, references: ReferencePool) -> None:
    """Looks again and again, without end.

    Raises:
        ActorError: an actor is silent for longer than it may be, or gone.
    """
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        journal.say_long_waits()
        references.check_silence()
        await pool.check_silence()
