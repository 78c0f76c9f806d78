"""Groups → reference log-probs, over the reference actors.

Promise: handles payloads by reference alone; the least loaded actor takes the next group, and one that has work and answers nothing for
longer than `reference.timeout_s` ends the run, by name.
"""

import asyncio
from typing import Any

from maspo_ray.errors import RunError
from maspo_ray.experience import Group
from maspo_ray.fleet.calls import failures_named, late_error
from maspo_ray.fleet.handles import Handles
from maspo_ray.hosts.engine_table import EngineTable
from maspo_ray.run_dir.timeline import Timeline


class ReferencePool:
    """Sends groups to reference actors.

    Args:
        timeout_s: how long an actor with work may answer nothing.
    """

    def __init__(self, actors: Handles, timeline: Timeline, timeout_s: float) -> None:
        self._actors = actors
        self._table = EngineTable(actors.count("reference")) if actors.count("reference") else None
        self._timeline = timeline
        self._timeout_s = timeout_s

    async def logprobs(self, group: Group) -> Any:
        """Returns what refers to a group's log-probs under the reference policy, None where a run has no reference."""
        if self._table is None:
            return None
        tokens = sum(group.prompt_tokens + rollout.facts.num_tokens for rollout in group.rollouts)
        replica = self._table.take(tokens, self._now())
        if replica is None:
            raise RunError("no reference actor is up. See their logs.")
        track = self._timeline.track(f"reference/{replica}")
        # None for a call that failed or was given up, which is no sign of life.
        answered_at: float | None = None
        try:
            with failures_named(track.actor, "scoring"), track.span("score"):
                call = self._actors.handle("reference", replica).completion_logprobs.options(num_returns=2)
                logprobs, num_tokens = call.remote(group.payload)
                await num_tokens
                answered_at = self._now()
        finally:
            self._table.give_back(replica, tokens, answered_at)
        return logprobs

    async def check_silence(self) -> None:
        """Raises where an actor is late.

        Raises:
            ActorLate: it has answered nothing for longer than it may.
        """
        silences = self._table.silences(self._now()) if self._table is not None else {}
        for replica, silent_s in silences.items():
            if silent_s > self._timeout_s:
                raise late_error(
                    f"reference/{replica}",
                    f"reference/{replica} has scored nothing for {silent_s:.0f} s, though it has groups to score; reference.timeout_s is "
                    f"{self._timeout_s:g}. Raise that if it is too short.",
                )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
