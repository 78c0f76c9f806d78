"""Completions → verdicts, beside the engine that sampled them.

Promise: a completion is sent to a reward actor within a few milliseconds of its end, together with those of its group that end in the same
moment, and straight from the rollout host: neither its tokens nor the call pass through the controller. Every completion gets one verdict,
or the scoring raises: a reward actor that has died, or has answered nothing for longer than its deadlines allow.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from maspo_ray.errors import ActorLate
from maspo_ray.experience import Completion, Prompt, Verdict
from maspo_ray.hosts.engine_table import EngineTable

TOGETHER_S = 0.005
"""Completions of a group that end within so long are scored by one call."""


@dataclass(frozen=True, slots=True)
class TimedCall:
    """A call to a reward actor, by the host's clock."""

    replica: int
    started: float
    ended: float


ScoreFunction = Callable[[int, Prompt, Sequence[Completion]], Awaitable[list[Verdict]]]
"""Calls a replica of the reward: replica, prompt, completions → a verdict for each."""


class Scorer:
    """Sends completions to the least loaded reward actor.

    Args:
        score: calls the actor of a replica; handles are its affair.
        deadline_s: how long a replica that has calls may answer none of them.
    """

    def __init__(self, num_replicas: int, score: ScoreFunction, deadline_s: float, clock: Callable[[], float]) -> None:
        self._table = EngineTable(num_replicas)
        self._score = score
        self._deadline_s = deadline_s
        self._clock = clock

    async def verdicts(self, prompt: Prompt, completions: Sequence[Completion]) -> tuple[list[Verdict], TimedCall]:
        """Returns a verdict for each completion, and how the call went.

        Raises:
            ActorLate: the reward actor answers nothing any more.
            ActorError: it failed or died.
        """
        started = self._clock()
        replica = self._table.take(len(completions), started)
        assert replica is not None, "no reward actor is up"
        call = asyncio.create_task(self._ask(replica, prompt, completions))
        try:
            verdicts = await self._in_time(replica, call)
        finally:
            # One that is given up says nothing of the replica, which others wait for too.
            answered_at = self._clock() if call.done() else None
            call.cancel()
            self._table.give_back(replica, len(completions), answered_at)
        return verdicts, TimedCall(replica, started, self._clock())

    async def _ask(self, replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        return await self._score(replica, prompt, completions)

    async def _in_time(self, replica: int, call: asyncio.Task[list[Verdict]]) -> list[Verdict]:
        while True:
            # Its turn may only come after other calls: as long as these are answered, it is not late.
            silent_s = self._table.silences(self._clock())[replica]
            done, _ = await asyncio.wait([call], timeout=max(0.0, self._deadline_s - silent_s))
            if done:
                return call.result()
            silent_s = self._table.silences(self._clock())[replica]
            if silent_s >= self._deadline_s:
                raise ActorLate(
                    f"reward/{replica} has answered nothing for {silent_s:.0f} s, though reward.timeout_s ends each completion long "
                    "before: its code holds the process. Mend the reward, or lower what one call of it does.",
                    "reward",
                    replica,
                )
