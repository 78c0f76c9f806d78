"""Runs an engine inside its rollout actor: what every engine needs alike stands here, once.

Promise: a request comes out whole, as `Ended` with every completion scored, or as `Expired`, or it raises. A completion begins when it has
one of the engine's places (`rollout.max_concurrent_requests`, probes first), under the weights that the engine then holds; its group is
ended when these have become too old to be trained on. No completion begins while weights change; those that run go on through the change.
An engine's class samples one completion from token ids and takes weights; it knows of none of this.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from maspo_ray.errors import RunError
from maspo_ray.experience import Completion, CompletionFacts, SampledGroup, Verdict, VersionSpan
from maspo_ray.hosts.idle import IdleMeter
from maspo_ray.hosts.messages import Beat, Ended, Expired, Priority, SampleRequest, ScoreCall
from maspo_ray.hosts.places import Places
from maspo_ray.hosts.scorer import TOGETHER_S, ScoreFunction, Scorer, TimedCall
from maspo_ray.protocols import RolloutEngine

Answer = tuple[SampledGroup | None, Ended | Expired]
"""A payload for the object store, and what the controller may know of it."""


class RolloutHost:
    """Holds one engine of the user's class. All calls to it come through here.

    Args:
        engine_class: a `RolloutEngine`; arguments, its constructor's.
        max_concurrent_requests: completions in flight at once.
        score_deadline_s: see `Scorer`.
    """

    def __init__(
        self,
        engine_class: type,
        arguments: dict[str, Any],
        max_concurrent_requests: int,
        score_deadline_s: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._engine: RolloutEngine = engine_class(**arguments)
        self._score_deadline_s = score_deadline_s
        self._clock = clock
        # A completion without a place waits here and not in the engine: it is to begin with the weights that are current then.
        self._places = Places(max_concurrent_requests)
        # Clear while weights change.
        self._steady = asyncio.Event()
        self._version = 0
        self._running: dict[int, _RunningGroup] = {}
        self._scorer: Scorer | None = None
        self._idle = IdleMeter(clock())
        self._tokens, self._ended = 0, 0

    async def setup(self) -> None:
        await self._engine.setup()
        self._steady.set()

    async def connect_rewards(self, num_replicas: int, score: ScoreFunction) -> None:
        """Takes what completions are scored by from here on."""
        self._scorer = Scorer(num_replicas, score, self._score_deadline_s, self._clock)

    async def sample(self, request: SampleRequest) -> Answer:
        """Samples and scores a request's completions; returns them, and what the controller may know of them."""
        scorer = self._scorer if request.scored else None
        assert scorer is not None or not request.scored, "connect_rewards comes before what is to be scored"
        group = _RunningGroup(request, scorer, self._clock)
        self._running[request.request_id] = group
        self._idle.started(self._clock(), len(request.seeds))
        try:
            await group.run(self._complete)
            if group.expired:
                return None, Expired()
            return group.answer()
        finally:
            del self._running[request.request_id]
            self._idle.finished(self._clock(), group.unfinished)

    async def beat(self, oldest_version: int | None = None) -> Beat:
        """Ends groups that are too old to be trained on; returns what the host did since it was last asked.

        Args:
            oldest_version: training requests of which a completion began with older weights are ended. None ends nothing.
        """
        if oldest_version is not None:
            for group in list(self._running.values()):
                group.expire(oldest_version)
        idle_s, of_s = self._idle.take(self._clock())
        beat = Beat(idle_s, of_s, self._tokens, self._ended, {i: g.unfinished for i, g in self._running.items()})
        self._tokens, self._ended = 0, 0
        return beat

    async def _complete(self, group: "_RunningGroup", seed: int | None) -> Completion:
        """Returns a completion, once there is a place for it and the weights are steady."""
        request = group.request
        async with self._places.at(request.priority):
            while not self._steady.is_set():
                # Awoken by the end of one update, it may find that the next has begun.
                await self._steady.wait()
            began_with = self._version
            if group.began_with is None:
                group.began_with = began_with
            completion = await self._engine.sample(
                request.prompt.token_ids, sampling=request.sampling, seed=seed, cache_key=f"v{began_with}"
            )
        self._tokens += len(completion.token_ids)
        self._ended += 1
        self._idle.finished(self._clock(), 1)
        group.unfinished -= 1
        return date_first_span(completion, began_with)

    async def check(self) -> None:
        """Returns when the engine has given a sign of life; raises where it has died."""
        await self._engine.check()

    async def weight_checksum(self) -> str | None:
        """Returns what changes when the engine's weights do, None where the engine cannot say."""
        return await self._engine.weight_checksum()

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer_engine(init_info)

    async def stage_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.stage_weights(update_info)

    async def start_weight_update(self) -> None:
        self._steady.clear()
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, weight_version: int) -> None:
        await self._engine.finish_weight_update(weight_version)
        self._version = weight_version
        self._steady.set()

    async def shutdown(self) -> None:
        await self._engine.shutdown()


class _RunningGroup:
    """A request under way.

    Attributes:
        began_with: the oldest version that one of its completions began with; None before the first.
        unfinished: completions that have not ended.
        expired: whether it was ended for its age.
    """

    def __init__(self, request: SampleRequest, scorer: Scorer | None, clock: Callable[[], float]) -> None:
        self.request = request
        self.began_with: int | None = None
        self.unfinished = len(request.seeds)
        self.expired = False
        self._scorer = scorer
        self._clock = clock
        self._completions: list[Completion | None] = [None] * len(request.seeds)
        self._verdicts: list[Verdict | None] = [None] * len(request.seeds)
        self._calls: list[TimedCall] = []
        # Completions that have ended and go to the reward in one call; the first of them makes it.
        self._to_score: list[int] = []
        self._all_sampled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self, complete: Callable[["_RunningGroup", int | None], Awaitable[Completion]]) -> None:
        """Returns when all is sampled and scored, or `expire` has ended it.

        Args:
            complete: samples a completion with a seed.
        """

        async def one(sample: int, seed: int | None) -> None:
            self._completions[sample] = await complete(self, seed)
            if self.unfinished == 0:
                self._all_sampled.set()
            if self._scorer is not None:
                await self._score(self._scorer, sample)

        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = [tasks.create_task(one(i, seed)) for i, seed in enumerate(self.request.seeds)]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    def expire(self, oldest_version: int) -> None:
        """Ends the group if it is to be trained on, is not sampled whole yet, and a completion of it began with older weights."""
        trained = self.request.priority is Priority.TRAINING
        if trained and self.unfinished and self.began_with is not None and self.began_with < oldest_version:
            self.expired = True
            for task in self._tasks:
                task.cancel()

    def answer(self) -> Answer:
        completions = tuple(completion for completion in self._completions if completion is not None)
        assert len(completions) == len(self.request.seeds), "a completion is missing"
        verdicts = tuple(verdict for verdict in self._verdicts if verdict is not None)
        assert self._scorer is None or len(verdicts) == len(completions), "a verdict is missing"
        now = self._clock()
        calls = tuple(ScoreCall(call.replica, now - call.started, now - call.ended) for call in self._calls)
        facts = tuple(CompletionFacts.of(completion) for completion in completions)
        return SampledGroup(self.request.prompt, completions), Ended(facts, verdicts, calls)

    async def _score(self, scorer: Scorer, sample: int) -> None:
        """Scores a completion that has ended, and those that end soon after; or leaves it to the one before that is about to."""
        self._to_score.append(sample)
        if len(self._to_score) > 1:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(TOGETHER_S):
                await self._all_sampled.wait()
        samples, self._to_score = self._to_score, []
        completions = [completion for i in samples if (completion := self._completions[i]) is not None]
        verdicts, call = await scorer.verdicts(self.request.prompt, completions)
        if len(verdicts) != len(samples):
            raise RunError(f"reward/{call.replica} gave {len(verdicts)} verdicts for {len(samples)} completions")
        self._calls.append(call)
        for scored, verdict in zip(samples, verdicts, strict=True):
            self._verdicts[scored] = verdict


def date_first_span(completion: Completion, began_with: int) -> Completion:
    """Returns a completion whose first span is dated by the version at its beginning, where that is older than the engine's stamp.

    If an update lands before prefill, cached prompt blocks may still come from the older weights, which the engine's stamp of the first
    token does not say.

    Raises:
        ValueError: the engine stamps weights that it no longer had; such groups would go stale without end.
    """
    first, *rest = completion.spans
    if (oldest := min(span.version for span in completion.spans)) < began_with:
        raise ValueError(
            f"the engine stamped a token with version {oldest}; its completion began with version {began_with}. Mend the engine: "
            "finish_weight_update gives the version of what is sampled from there on."
        )
    if began_with == first.version:
        return completion
    spans = (VersionSpan(began_with, first.start, first.end), *rest)
    return Completion(completion.token_ids, completion.logprobs, spans, completion.finish_reason, completion.text)
