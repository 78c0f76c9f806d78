"""What stands behind a Ray handle, simulated in virtual time, for the real controller to drive.

Promise: rollout actors, reward actors and learner ranks answer as real ones do, in the same objects and order, after log-normal times; a
day of theirs passes in seconds, because the loop's clock jumps to the next timer when nothing is ready. What they did is kept in
`SimulatedFleet`, so that the controller's books can be held against it. Owns no tokens and no measurement.
"""

import asyncio
import heapq
import io
import math
import random
import selectors
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from maspo_ray.config import RunConfig
from maspo_ray.data.prompts import PromptStream
from maspo_ray.data.samplers import UniformSampler
from maspo_ray.evaluation.parity import ParityCheck
from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Outcome,
    Prompt,
    PublishReport,
    UpdateReport,
    Verdict,
    VersionSpan,
)
from maspo_ray.fleet.loading import load_door
from maspo_ray.pipeline.loop import Pipeline
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.folder import RunFolder
from maspo_ray.run_dir.history import RunHistory
from maspo_ray.run_dir.progress import Progress
from maspo_ray.run_dir.timeline import Timeline


class _Waiting(selectors.DefaultSelector):
    """Never waits: while nothing is ready the clock jumps to what comes next, an answer or a timer of the loop.

    Answers have a heap of their own, since a timer of asyncio costs more than much of what is measured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.answers: list[tuple[float, int, asyncio.Future[Any], Any]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        comes_at = self.answers[0][0] if self.answers else math.inf
        timer_at = math.inf if timeout is None else self.now + timeout
        assert min(comes_at, timer_at) < math.inf, "nothing is ready, and nothing is to come; the run hangs"
        self.now = min(comes_at, timer_at)
        if comes_at <= timer_at:
            _, _, future, value = heapq.heappop(self.answers)
            if not future.done():
                future.set_result(value)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while it has nothing to do.

    Attributes:
        clock: is `time` without a Python call of its own, as a real clock is: the timeline asks very often.
    """

    def __init__(self) -> None:
        self._waiting = _Waiting()
        self._num_answers = 0
        self.clock = partial(getattr, self._waiting, "now")
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.now

    def answer(self, after_s: float, value: Any) -> "asyncio.Future[Any]":
        """Returns a future that will have the value."""
        future: asyncio.Future[Any] = self.create_future()
        self._num_answers += 1
        heapq.heappush(self._waiting.answers, (self._waiting.now + after_s, self._num_answers, future, value))
        return future


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the actors behave.

    Attributes:
        median_s: of the time that a completion takes; `sigma` is that of its logarithm.
        tokens_per_s: of one completion.
        score_s: median of a reward's time.
        train_s: a step of the learner.
        publish_s: a weight update.
        filtered_share: of groups whose rewards are all equal.
        unscored_share: of completions that the reward fails on.
        unscorable_share: of groups that it fails on throughout.
        skipped_share: of updates that are left out.
    """

    median_s: float = 60.0
    sigma: float = 0.7
    tokens_per_s: float = 20.0
    score_s: float = 0.3
    train_s: float = 90.0
    publish_s: float = 10.0
    filtered_share: float = 0.2
    unscored_share: float = 0.01
    unscorable_share: float = 0.0
    skipped_share: float = 0.0
    seed: int = 0


class Ref:
    """Stands for an object in the object store; there at once."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self.value


class Call:
    """Stands for the answer of an actor that takes its time."""

    __slots__ = ("_answer",)

    def __init__(self, answer: "asyncio.Future[Any]") -> None:
        self._answer = answer

    def future(self) -> "asyncio.Future[Any]":
        return self._answer


class _Payload:
    """Stands for the completion that a stream yields, which is made only where somebody looks at it.

    Attributes:
        version: of the weights that it was begun with.
        verdict: what the reward will say of it.
    """

    __slots__ = ("sample", "num_tokens", "version", "verdict")

    def __init__(self, sample: int, num_tokens: int, version: int, verdict: Verdict) -> None:
        self.sample = sample
        self.num_tokens = num_tokens
        self.version = version
        self.verdict = verdict

    def __await__(self) -> Generator[None, None, list[Completion]]:
        yield from ()
        tokens, logprobs = np.zeros(self.num_tokens, np.int32), np.zeros(self.num_tokens, np.float32)
        spans = (VersionSpan(self.version, 0, self.num_tokens),)
        return [Completion(tokens, logprobs, spans, "stop", "", self.sample)]


class _Stream:
    """A group's completions as they end, each followed by its facts."""

    __slots__ = ("_fleet", "_running", "_started", "_version", "_ending", "_shown", "_coming")

    def __init__(
        self, fleet: "SimulatedFleet", running: "set[_Stream]", version: int, ending: list[tuple[float, _Payload]]
    ) -> None:
        self._fleet = fleet
        self._running = running
        self._started = fleet.loop.clock()
        self._version = version
        self._ending = ending
        self._shown: _Payload | None = None
        self._coming: asyncio.Future[Any] | None = None
        running.add(self)

    def __aiter__(self) -> "_Stream":
        return self

    def __anext__(self) -> Awaitable[Any]:
        if self._shown is not None:
            shown, self._shown, self._coming = self._shown, None, None
            facts = CompletionFacts(shown.num_tokens, shown.version, self._fleet.version, "stop", shown.sample)
            return Ref(Ref([facts] if shown is not _EXPIRED else []))
        if not self._ending:
            self._running.discard(self)
            return _END
        after_s, self._shown = self._ending.pop()
        self._coming = self._fleet.loop.answer(self._started + after_s - self._fleet.loop.clock(), self._shown)
        return self._coming

    def expire(self, oldest_version: int) -> None:
        """Ends what waits for its next completion, if it began before a version."""
        if self._version < oldest_version and self._coming is not None and not self._coming.done():
            self._running.discard(self)
            self._ending.clear()
            self._shown = _EXPIRED
            self._coming.set_result(_EXPIRED)


class _End:
    def __await__(self) -> Generator[None, None, None]:
        yield from ()
        raise StopAsyncIteration


_END = _End()
_EXPIRED = _Payload(0, 0, 0, Verdict.from_reward(0.0))
_UNSCORED = Verdict.unscored(Outcome.ERROR, "simulated")
_WRONG, _RIGHT = Verdict.from_reward(0.0), Verdict.from_reward(1.0)


class SimulatedFleet:
    """Has what the pipeline asks of a `Fleet`.

    Attributes:
        version: of the weights that the engines hold.
        on_train: is told the arguments of each `train_step`, one for each rank, and which of its updates are applied.
        on_publish: is told each version.
    """

    shares_prompts = True

    def __init__(self, loop: VirtualLoop, engines: int, rewards: int, ranks: int, behaviour: Behaviour) -> None:
        self.loop = loop
        self.behaviour = behaviour
        self.version = 0
        self.on_train: Callable[[Sequence[Any], Sequence[bool]], None] = lambda arguments, applied: None
        self.on_publish: Callable[[int], None] = lambda version: None
        self._random = random.Random(behaviour.seed)
        self._completion_s = _lognormal(behaviour.median_s, behaviour.sigma, behaviour.seed)
        self._score_s = _lognormal(behaviour.score_s, behaviour.sigma, behaviour.seed + 1)
        score = SimpleNamespace(remote=lambda _, payload: Call(loop.answer(next(self._score_s), [payload.verdict])))
        self._actors: dict[str, list[Any]] = {
            "rollout": [self._engine() for _ in range(engines)],
            "reward": [SimpleNamespace(score=score) for _ in range(rewards)],
            "reference": [],
            "learner": list(range(ranks)),
        }

    def _engine(self) -> SimpleNamespace:
        running: set[_Stream] = set()

        def generate(prompt: Any, **arguments: Any) -> _Stream:
            return self._generate(running, **arguments)

        def expire(oldest_version: int) -> Ref:
            for stream in list(running):
                stream.expire(oldest_version)
            return Ref(None)

        options = SimpleNamespace(remote=generate)
        return SimpleNamespace(
            generate=SimpleNamespace(options=lambda **_: options), expire=SimpleNamespace(remote=expire)
        )

    def of_role(self, role: str) -> list[Any]:
        return self._actors[role]

    @staticmethod
    def put(value: Any) -> Ref:
        return Ref(value)

    @staticmethod
    async def object_store_used_bytes() -> float:
        return 0.0

    def _generate(
        self,
        running: set[_Stream],
        *,
        temperature: float,
        max_new_tokens: int,
        seeds: Sequence[int | None],
    ) -> _Stream:
        rate, version = self.behaviour.tokens_per_s, self.version
        ending = [
            (after_s, _Payload(sample, max(1, int(after_s * rate)), version, verdict))
            for sample, (verdict, after_s) in enumerate(
                zip(self._verdicts(len(seeds)), self._completion_s, strict=False)
            )
        ]
        ending.sort(key=itemgetter(0), reverse=True)
        return _Stream(self, running, version, ending)

    def _verdicts(self, count: int) -> list[Verdict]:
        drawn, behaviour = self._random.random, self.behaviour
        if drawn() < behaviour.unscorable_share:
            return [_UNSCORED] * count
        if drawn() < behaviour.filtered_share:
            return [_WRONG] * count
        verdicts = [_WRONG, _RIGHT] * (count // 2) + [_WRONG] * (count % 2)
        if drawn() < behaviour.unscored_share * count:
            verdicts[int(drawn() * count)] = _UNSCORED
        return verdicts

    async def learners(self, method: str, *arguments: Any) -> Any:
        if method == "publish":
            await asyncio.sleep(self.behaviour.publish_s)
            self.version = arguments[0]
            self.on_publish(self.version)
            pauses = ((0.0, self.behaviour.publish_s),) * len(self.of_role("rollout"))
            return PublishReport(self.behaviour.publish_s, pauses)
        assert method == "completion_logprobs", f"the pipeline called learners({method!r})"
        return [np.zeros(len(completion), np.float32) for _, completion in arguments[0]]

    async def learners_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[UpdateReport]:
        assert method == "train_step", f"the pipeline called learners_each({method!r})"
        await asyncio.sleep(self.behaviour.train_s)
        updates = list(zip(*(plans for _, plans, *_ in arguments), strict=True))
        applied = [self._random.random() >= self.behaviour.skipped_share for _ in updates]
        self.on_train(arguments, applied)
        return [
            UpdateReport({"tokens/trained": float(plans[0].batch_tokens)}, done, ())
            for plans, done in zip(updates, applied, strict=True)
        ]


def _lognormal(median: float, sigma: float, seed: int) -> Iterator[float]:
    """Yields log-normal times without end."""
    drawn = np.random.default_rng(seed)
    while True:
        yield from drawn.lognormal(math.log(median), sigma, size=4096).tolist()


def simulated_config(folder: Path, **pipeline: Any) -> RunConfig:
    """Returns a config whose actors are never started; what they fail at is counted and does not end the run."""
    tree = {
        "model": {"path": "simulated", "dtype": "float32"},
        "data": {"train": {"kind": "jsonl", "path": "simulated.jsonl"}},
        "rollout": {"group_size": 8, "max_new_tokens": 8192},
        "reward": {"max_error_rate": 1.0},
        "learner": {"max_tokens_per_micro_batch": 32768, "max_skipped_updates": 1000},
        "pipeline": {"parity_every": 0} | pipeline,
        "logging": {"progress": "off", "tensorboard": False, "curves": False, "steps": False},
        "run_dir": str(folder),
    }
    return RunConfig.model_validate(tree)


def simulated_pipeline(
    config: RunConfig, fleet: SimulatedFleet, prompts: Sequence[Prompt], evaluator: Any = None
) -> tuple[Pipeline, RunFolder]:
    """Returns the real pipeline before simulated actors, and its open files; to be called within a `VirtualLoop`.

    Args:
        evaluator: does what an `Evaluator` does, or None.
    """
    folder: Any = RunFolder(config)
    shared: Any = fleet
    timeline = Timeline(folder.write_trace, fleet.loop.clock)
    errors = ErrorWatch(config.reward.max_error_rate)
    pool = RolloutPool(fleet.of_role("rollout"), fleet.of_role("reward"), errors, timeline)
    parity = ParityCheck(shared, prompts[:1], config.rollout, *config.parity_bound)
    sampler = UniformSampler(len(prompts), shuffle=True, seed=config.seed)
    stream = PromptStream(prompts, sampler, shuffle=True, seed=config.seed)
    door = load_door(config.pipeline)
    progress = Progress(config.pipeline.steps, "off", io.StringIO())
    history = RunHistory(config)
    return Pipeline(config, shared, pool, stream, evaluator, parity, folder, progress, history, timeline, door), folder
