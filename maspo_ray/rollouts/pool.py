"""Prompts → rollouts, over the rollout actors.

Promise: handles payloads by reference and small facts, never tokens. A prompt's completions go to one engine, the least loaded that is
up, so that they share the prompt's prefill; its handle is looked up when the call is made. An engine that has work and ends no completion
for longer than `rollout.timeout_s` ends the run, by name.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maspo_ray.errors import ActorGone, RunError
from maspo_ray.experience import Prompt, Rollout, Sampling
from maspo_ray.fleet.calls import await_all, await_named, failures_named, late_error
from maspo_ray.fleet.handles import Handles
from maspo_ray.hosts.engine_table import EngineTable, ReplicaState
from maspo_ray.hosts.messages import Beat, Ended, Expired, Priority, SampleRequest
from maspo_ray.rollouts.error_watch import ErrorWatch, Purpose
from maspo_ray.run_dir.timeline import Timeline

_ASKED_TIMES = 20
"""An engine that is silent is asked so many times within its deadline how it fares, at most."""
_SHOWN = 4
"""Engines that a line of text names."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """What came of a prompt.

    Attributes:
        payload: refers to the `SampledGroup`.
        replica: of the engine that sampled it.
        ended: its facts and verdicts.
    """

    payload: Any
    replica: int
    ended: Ended

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return tuple(map(Rollout, self.ended.facts, self.ended.verdicts))


@dataclass(frozen=True, slots=True)
class Beats:
    """What all engines did since they were last asked: the mean of their idle shares, and all tokens of completions that ended."""

    idle_share: float
    tokens: int


@dataclass(slots=True)
class _Request:
    """What an engine was asked for and has not answered.

    Attributes:
        cost: the work of one of its completions, in tokens.
        unfinished: how many of them the table still counts.
        since: when it was asked.
    """

    replica: int
    cost: int
    unfinished: int
    since: float


@dataclass(slots=True)
class _Heard:
    """What an engine has said of itself."""

    idle_s: float = 0.0
    of_s: float = 0.0
    tokens: int = 0

    def add(self, beat: Beat) -> None:
        self.idle_s += beat.idle_s
        self.of_s += beat.of_s
        self.tokens += beat.tokens


class RolloutPool:
    """Sends prompts to rollout actors.

    Args:
        table: of the rollout actors, in the order of their replicas.
        timeout_s: how long an engine with work may end no completion; answer_s, how long it may take to answer `beat`.
    """

    def __init__(
        self,
        actors: Handles,
        table: EngineTable,
        errors: ErrorWatch,
        timeline: Timeline,
        timeout_s: float,
        answer_s: float,
    ) -> None:
        self._actors = actors
        self.table = table
        self._errors = errors
        self._timeline = timeline
        self._tracks = [timeline.track(f"rollout/{replica}") for replica in range(len(table))]
        self._timeout_s = timeout_s
        self._answer_s = answer_s
        self._request_ids = itertools.count()
        self._requests: dict[int, _Request] = {}
        # Of each engine, when it may be asked again how it fares, if it is silent.
        self._ask_after = dict.fromkeys(range(len(table)), 0.0)
        # Of each engine, since `beat` last told.
        self._heard = [_Heard() for _ in range(len(table))]

    async def sample(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seeds: Sequence[int | None],
        priority: Priority = Priority.TRAINING,
        *,
        scored: bool = True,
        replica: int | None = None,
    ) -> Sampled | None:
        """Returns a completion for each seed, in their order; None where `beat` has ended the group for its age.

        Args:
            seeds: of the sampling; None leaves it to the engine.
            replica: the engine to ask; by default the least loaded.
        """
        cost = len(prompt.token_ids) + sampling.max_new_tokens
        replica = self._take(cost * len(seeds), replica)
        request_id = next(self._request_ids)
        open_request = self._requests[request_id] = _Request(replica, cost, len(seeds), self._now())
        track = self._tracks[replica]
        # None for a call that failed or was given up, which is no sign of life.
        answered_at: float | None = None
        try:
            with failures_named(track.actor, "generating"), track.span("generate", samples=len(seeds)):
                request = SampleRequest(request_id, prompt, sampling, tuple(seeds), priority, scored)
                # The payload stays where it is; the engine's own word of it is looked at.
                payload, answer = self._actors.handle("rollout", replica).sample.options(num_returns=2).remote(request)
                said: Ended | Expired = await answer
                answered_at = self._now()
        except ActorGone:
            # What it has taken stays with it; nobody is sent to it any more.
            self.table.set_state([replica], ReplicaState.AWAY)
            raise
        finally:
            del self._requests[request_id]
            self.table.give_back(replica, cost * open_request.unfinished, answered_at)
        if isinstance(said, Expired):
            return None
        self._note_scoring(said)
        purpose: Purpose = "training" if priority is Priority.TRAINING else "evaluation"
        for verdict in said.verdicts:
            self._errors.add(verdict, purpose)
        return Sampled(payload, replica, said)

    def _take(self, work: int, replica: int | None) -> int:
        taken = self.table.take(work, self._now(), replica)
        if taken is None:
            raise RunError("no rollout actor is up. See their logs.")
        return taken

    def _note_scoring(self, said: Ended) -> None:
        now = self._timeline.now()
        for call in said.score_calls:
            track = self._timeline.track(f"reward/{call.replica}")
            track.add_past("score", now - call.started_before_s, now - call.ended_before_s)

    async def beat(self, oldest_version: int | None = None) -> Beats:
        """Asks every engine how it fares, and lets it end groups of which a completion began before a version: their `sample` returns None.

        Raises:
            ActorError: one is gone, or does not answer.
        """
        await self._hear(range(len(self.table)), oldest_version)
        heard, self._heard = self._heard, [_Heard() for _ in self._heard]
        shares = [one.idle_s / one.of_s for one in heard if one.of_s > 0]
        idle_share = sum(shares) / len(shares) if shares else float("nan")
        return Beats(idle_share, sum(one.tokens for one in heard))

    async def _hear(self, replicas: Sequence[int], oldest_version: int | None) -> None:
        """Takes up what engines say of themselves."""
        calls = {
            self._tracks[i].actor: await_named(
                self._tracks[i].actor,
                "saying how it fares",
                self._actors.handle("rollout", i).beat.remote(oldest_version),
            )
            for i in replicas
        }
        beats: list[Beat] = await await_all(
            self._answer_s, "when asked how it fares; the deadline is pipeline.weight_sync_timeout_s", calls
        )
        for replica, beat in zip(replicas, beats, strict=True):
            self._heard[replica].add(beat)
            # What is only being scored is the reward's, of which the host's scorer has the deadline.
            if beat.ended or not any(beat.unfinished.values()):
                self.table.hear(replica, self._now())
            for request_id, unfinished in beat.unfinished.items():
                self._lighten(request_id, unfinished)

    def _lighten(self, request_id: int, unfinished: int) -> None:
        """Takes off the table what a request's engine has done of it."""
        request = self._requests.get(request_id)
        if request is not None and unfinished < request.unfinished:
            self.table.lighten(request.replica, request.cost * (request.unfinished - unfinished))
            request.unfinished = unfinished

    def describe(self) -> str:
        """Returns where the requests are that have not ended, and how long the oldest has taken."""
        if not self._requests:
            return "none with an engine"
        counts = Counter(request.replica for request in self._requests.values())
        longest_s = self._now() - min(request.since for request in self._requests.values())
        most = ", ".join(f"{count} with rollout/{replica}" for replica, count in counts.most_common(_SHOWN))
        rest = f", and others with {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        return f"{most}{rest}; the oldest for {longest_s:.0f} s"

    async def check_silence(self) -> None:
        """Asks engines that have been silent for half of the time that they may be.

        Raises:
            ActorLate: one has ended no completion for longer than it may.
        """
        now = self._now()
        silent = [
            replica
            for replica, silent_s in self.table.silences(now).items()
            if silent_s > self._timeout_s / 2 and now >= self._ask_after[replica]
        ]
        if silent:
            self._ask_after |= dict.fromkeys(silent, now + self._timeout_s / _ASKED_TIMES)
            await self._hear(silent, None)
        for replica, silent_s in self.table.silences(self._now()).items():
            if silent_s > self._timeout_s:
                self.table.set_state([replica], ReplicaState.AWAY)
                raise late_error(
                    f"rollout/{replica}",
                    f"rollout/{replica} has ended no completion for {silent_s:.0f} s, though it has some under way; "
                    f"rollout.timeout_s is {self._timeout_s:g}. Raise that if it is too short.",
                )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
