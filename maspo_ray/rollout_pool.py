"""Prompts → rollouts: each completion goes to a reward actor the moment it is there.

Promise: handles references and small facts, never tokens; a group's samples go to one engine, the one with the fewest outstanding
tokens, so that they share the prompt's prefill; a reward that fails costs its own completion, and too many of them end the run.
"""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np

from maspo_ray.errors import RunError
from maspo_ray.experience import CompletionFacts, Outcome, Rollout, Verdict
from maspo_ray.fleet import named, naming
from maspo_ray.idle import IdleMeter
from maspo_ray.timeline import Timeline

_log = logging.getLogger(__name__)

_WINDOW = 256
_FEWEST_TO_JUDGE = 32


class ErrorWatch:
    """Counts completions that could not be scored; raises when they are too large a share of the last 256."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._recent: deque[bool] = deque(maxlen=_WINDOW)
        self._recent_errors = 0
        self._first_cause: str | None = None
        self.errors = 0

    def add(self, verdict: Verdict) -> None:
        failed = verdict.outcome is not Outcome.SCORED
        if len(self._recent) == _WINDOW:
            self._recent_errors -= self._recent[0]
        self._recent.append(failed)
        self._recent_errors += failed
        if not failed:
            return
        self.errors += 1
        if self.errors.bit_count() == 1:
            # At the first, second, fourth, eighth …: a cause that repeats must not drown the rest.
            _log.warning("completions that could not be scored: %d; the latest: %s", self.errors, verdict.cause)
        self._first_cause = self._first_cause or verdict.cause
        share = self._recent_errors / len(self._recent)
        if len(self._recent) >= _FEWEST_TO_JUDGE and share > self._max_error_rate:
            raise RunError(
                f"{self._recent_errors} of the last {len(self._recent)} completions could not be scored, more than "
                f"reward.max_error_rate ({self._max_error_rate:g}) allows; the first cause was: {self._first_cause}. "
                "Mend the reward, or raise reward.max_error_rate."
            )


class RolloutPool:
    """Sends prompts to rollout actors and completions to reward actors."""

    def __init__(self, rollout: Sequence[Any], reward: Sequence[Any], errors: ErrorWatch, timeline: Timeline) -> None:
        self._rollout = list(rollout)
        self._reward = itertools.cycle(enumerate(reward))
        self._timeline = timeline
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
        failure = f"rollout/{engine} failed to generate"
        stream = (
            self._rollout[engine]
            .generate.options(num_returns="streaming")
            .remote(prompt, temperature=temperature, max_new_tokens=max_new_tokens, seeds=list(seeds))
        )
        rollouts: list[Rollout] = []
        scoring: deque[tuple[Any, list[CompletionFacts], asyncio.Future[list[Verdict]]]] = deque()
        try:
            self.idle.started(engine, monotonic())
            try:
                with naming(failure), self._timeline.span(f"rollout/{engine}", "generate", samples=len(seeds)):
                    async for payload in stream:
                        following = await anext(stream, None)
                        # Where nothing follows, the payload is the engine's error. It was also seen once, with Ray 2.60, that a
                        # stream ended without its last object though its task had succeeded: then the completions themselves
                        # say what is known of them.
                        facts: list[CompletionFacts] = (
                            [CompletionFacts.of(c) for c in await payload] if following is None else await following
                        )
                        if not facts:
                            return None
                        self._outstanding_tokens[engine] -= cost * len(facts)
                        outstanding -= cost * len(facts)
                        for fact in facts:
                            self.tokens_generated += fact.num_tokens
                        scoring.append((payload, facts, self._score(prompt, payload, len(facts))))
                        while scoring and scoring[0][2].done():
                            payload, facts, call = scoring.popleft()
                            with naming("the reward failed"):
                                rollouts += self._judged(payload, facts, call.result())
            finally:
                self.idle.finished(engine, monotonic())
            with naming("the reward failed"):
                for payload, facts, call in scoring:
                    rollouts += self._judged(payload, facts, await call)
        finally:
            self._outstanding_tokens[engine] -= outstanding
            for *_, call in scoring:
                if not call.cancel() and not call.cancelled():
                    # An error that nobody asked for is logged by asyncio.
                    call.exception()
        rollouts.sort(key=lambda rollout: rollout.facts.sample)
        if len(rollouts) != len(seeds):
            raise RunError(f"{failure}: {len(rollouts)} of {len(seeds)} completions came. See its log.")
        assert [rollout.facts.sample for rollout in rollouts] == list(range(len(seeds))), "a sample came twice"
        return tuple(rollouts)

    async def expire(self, oldest_version: int) -> None:
        """Lets every engine end what has tokens older than `oldest_version`; their `sample` returns None."""
        calls = [engine.expire.remote(oldest_version) for engine in self._rollout]
        await asyncio.gather(*(named(f"rollout/{i} failed to expire", call) for i, call in enumerate(calls)))

    def _score(self, prompt: Any, payload: Any, count: int) -> "asyncio.Future[list[Verdict]]":
        """Has a payload's completions scored, without a task to wait for each: a controller has very many of them."""
        replica, reward = next(self._reward)
        span = self._timeline.span(f"reward/{replica}", "score", completions=count)
        span.begin()
        call = asyncio.wrap_future(reward.score.remote(prompt, payload).future())
        call.add_done_callback(span.end)
        return call

    def _judged(self, payload: Any, facts: Sequence[CompletionFacts], verdicts: Sequence[Verdict]) -> Iterator[Rollout]:
        """Yields a payload's completions with their verdicts."""
        for i, (fact, verdict) in enumerate(zip(facts, verdicts, strict=True)):
            self._errors.add(verdict)
            yield Rollout(payload, i, fact, verdict)
