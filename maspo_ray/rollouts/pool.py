"""Prompts → rollouts: each completion goes to a reward actor the moment it is there.

Promise: handles references and small facts, never tokens; a group's samples go to one engine, the one with the fewest outstanding
tokens, so that they share the prompt's prefill; a reward that fails costs its own completion, and too many of them end the run.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from time import monotonic
from typing import Any

import numpy as np

from maspo_ray.errors import RunError
from maspo_ray.experience import CompletionFacts, Rollout, Verdict
from maspo_ray.fleet.calls import await_named, failures_named
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.idle import IdleMeter
from maspo_ray.run_dir.timeline import Timeline

_log = logging.getLogger(__name__)
_NAMING_REWARD = failures_named("reward", "scoring")
_BY_SAMPLE = attrgetter("facts.sample")


class RolloutPool:
    """Sends prompts to rollout actors and completions to reward actors."""

    def __init__(self, rollout: Sequence[Any], reward: Sequence[Any], errors: ErrorWatch, timeline: Timeline) -> None:
        self._rollout = [(actor, timeline.track(f"rollout/{i}")) for i, actor in enumerate(rollout)]
        self._reward = itertools.cycle([(actor, timeline.track(f"reward/{i}")) for i, actor in enumerate(reward)])
        self._errors = errors
        self._outstanding_tokens = np.zeros(len(self._rollout), np.int64)
        self.idle = IdleMeter(len(self._rollout), monotonic())
        self.tokens_generated = 0

    async def sample(
        self, prompt: Any, prompt_tokens: int, *, temperature: float, max_new_tokens: int, seeds: Sequence[int | None]
    ) -> tuple[Rollout, ...] | None:
        """Returns a rollout for each seed, in their order, all of one prompt; None where `expire` has ended it.

        Args:
            prompt: refers to the `Prompt`.
            seeds: of the sampling; None leaves it to the engine.
        """
        engine = int(self._outstanding_tokens.argmin())
        cost = prompt_tokens + max_new_tokens
        outstanding = cost * len(seeds)
        self._outstanding_tokens[engine] += outstanding
        actor, track = self._rollout[engine]
        failure = f"{track.actor} failed to generate"
        stream = actor.generate.options(num_returns="streaming").remote(
            prompt, temperature=temperature, max_new_tokens=max_new_tokens, seeds=list(seeds)
        )
        rollouts: list[Rollout] = []
        scoring: deque[tuple[Any, list[CompletionFacts], asyncio.Future[list[Verdict]]]] = deque()
        try:
            self.idle.started(engine, monotonic())
            try:
                with failures_named(track.actor, "generating"), track.span("generate", samples=len(seeds)):
                    async for payload in stream:
                        try:
                            facts: list[CompletionFacts] = await (await anext(stream))
                        except StopAsyncIteration:
                            # Then the payload is the engine's error. It was also seen once, with Ray 2.60, that a stream ended
                            # without its last object though its task had succeeded: then the completions themselves say what
                            # is known of them.
                            facts = [CompletionFacts.of(completion) for completion in await payload]
                        if not facts:
                            return None
                        done = cost * len(facts)
                        self._outstanding_tokens[engine] -= done
                        outstanding -= done
                        for fact in facts:
                            self.tokens_generated += fact.num_tokens
                        scoring.append((payload, facts, self._score(prompt, payload)))
                        while scoring and scoring[0][2].done():
                            scored, known, call = scoring.popleft()
                            with _NAMING_REWARD:
                                self._judge(rollouts, scored, known, call.result())
            finally:
                self.idle.finished(engine, monotonic())
            with _NAMING_REWARD:
                for scored, known, call in scoring:
                    self._judge(rollouts, scored, known, await call)
        finally:
            self._outstanding_tokens[engine] -= outstanding
            for *_, call in scoring:
                if not call.cancel() and not call.cancelled():
                    # An error that nobody asked for is logged by asyncio.
                    call.exception()
        rollouts.sort(key=_BY_SAMPLE)
        if len(rollouts) != len(seeds):
            raise RunError(f"{failure}: {len(rollouts)} of {len(seeds)} completions came. See its log.")
        assert [rollout.facts.sample for rollout in rollouts] == list(range(len(seeds))), "a sample came twice"
        return tuple(rollouts)

    async def expire(self, oldest_version: int) -> None:
        """Lets every engine end what has tokens older than `oldest_version`; their `sample` returns None."""
        calls = [(track, actor.expire.remote(oldest_version)) for actor, track in self._rollout]
        await asyncio.gather(*(await_named(track.actor, "expiring", call) for track, call in calls))

    def _score(self, prompt: Any, payload: Any) -> "asyncio.Future[list[Verdict]]":
        """Has a payload's completions scored, without a task to wait for each: a controller has very many of them."""
        reward, track = next(self._reward)
        span = track.span("score")
        span.begin()
        call = asyncio.wrap_future(reward.score.remote(prompt, payload).future())
        call.add_done_callback(span.end)
        return call

    def _judge(
        self, rollouts: list[Rollout], payload: Any, facts: Sequence[CompletionFacts], verdicts: Sequence[Verdict]
    ) -> None:
        """Adds a payload's completions with their verdicts."""
        for position, (fact, verdict) in enumerate(zip(facts, verdicts, strict=True)):
            self._errors.add(verdict)
            rollouts.append(Rollout(payload, position, fact, verdict))
