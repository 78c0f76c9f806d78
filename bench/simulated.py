"""What stands behind a Ray handle, simulated in virtual time, for the real controller to drive.

Promise: engines, reward actors and learner ranks answer as real ones do, after log-normal times; a day of theirs passes in seconds,
because the loop's clock jumps to the next timer when nothing is ready. The rollout hosts are the real ones: only the engines in them are
simulated. What they did is kept in `SimulatedFleet`, so that the controller's books can be held against it. Owns no tokens and no
measurement.
"""

import asyncio
import heapq
import io
import math
import random
import selectors
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from maspo_ray.config import RunConfig
from maspo_ray.data.samplers import UniformSampler
from maspo_ray.data.stream import PromptStream
from maspo_ray.experience import (
    Completion,
    Outcome,
    Prompt,
    PublishReport,
    SampledGroup,
    UpdateReport,
    Verdict,
    VersionSpan,
)
from maspo_ray.fleet.loading import load_late_policy
from maspo_ray.groups.intake import Intake
from maspo_ray.hosts.engine_table import EngineTable
from maspo_ray.hosts.messages import SampleRequest
from maspo_ray.hosts.rollout_host import Answer, RolloutHost
from maspo_ray.pipeline.loop import Pipeline
from maspo_ray.rollouts.error_watch import ErrorWatch
from maspo_ray.rollouts.pool import RolloutPool
from maspo_ray.run_dir.journal import Journal


class _Waiting(selectors.DefaultSelector):
    """Never waits: while nothing is ready the clock jumps to what comes next, an answer or a timer of the loop.

    Answers have a heap of their own, since a timer of asyncio costs more than much of what is measured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._timers_in_a_row = 0
        self.answers: list[tuple[float, int, asyncio.Future[Any], Any]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        comes_at = self.answers[0][0] if self.answers else math.inf
        timer_at = math.inf if timeout is None else self.now + timeout
        assert min(comes_at, timer_at) < math.inf, "nothing is ready, and nothing is to come; the run hangs"
        # A watch over waits has a timer always.
        self._timers_in_a_row = 0 if comes_at <= timer_at else self._timers_in_a_row + 1
        assert self._timers_in_a_row < 100_000, "nothing but timers is to come; the run hangs"
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


class Call:
    """Stands for the answer of an actor's method."""

    __slots__ = ("_running",)

    def __init__(self, running: Coroutine[Any, Any, Any]) -> None:
        self._running = running

    def __await__(self) -> Generator[Any, None, Any]:
        return self._running.__await__()


class Payload:
    """Stands for a group's payload in the object store; there once its call has ended."""

    __slots__ = ("_call", "__weakref__")

    def __init__(self, call: "asyncio.Task[Answer]") -> None:
        self._call = call

    @property
    def value(self) -> SampledGroup:
        group = self._call.result()[0]
        assert group is not None
        return group

    def __await__(self) -> Generator[Any, None, SampledGroup]:
        yield from self._call.__await__()
        return self.value


class _RemoteMethod:
    """A method of an actor, called as Ray does."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, **_: Any) -> "_RemoteMethod":
        return self


_Fate = list[str]
_FATE: ContextVar[_Fate] = ContextVar("fate")
"""What the reward will say of a group's completions, which the engine writes into their texts: it knows of no groups."""
_RIGHT, _WRONG, _FAILS = "right", "wrong", "fails"
_VERDICTS = {
    _RIGHT: Verdict.from_reward(1.0),
    _WRONG: Verdict.from_reward(0.0),
    _FAILS: Verdict.unscored(Outcome.ERROR, "simulated"),
}
_LONGEST = 1 << 17
_NEVER_S = 1e9
"""A deadline that the slowest of log-normal times keeps."""
_TOKENS, _LOGPROBS = np.zeros(_LONGEST, np.int32), np.zeros(_LONGEST, np.float32)


class SimulatedEngine:
    """A `RolloutEngine` whose completions take log-normal times."""

    def __init__(self, *, fleet: "SimulatedFleet") -> None:
        self._fleet = fleet
        self._version = 0

    async def setup(self) -> None:
        pass

    async def sample(self, token_ids: Any, *, sampling: Any, seed: int | None, cache_key: str) -> Completion:
        began_with = self._version
        after_s = next(self._fleet.completion_s)
        text = _FATE.get([_WRONG]).pop()
        await self._fleet.loop.answer(after_s, None)
        count = min(_LONGEST, max(1, int(after_s * self._fleet.behaviour.tokens_per_s)))
        self._fleet.tokens_ended.append(count)
        spans: tuple[VersionSpan, ...] = (VersionSpan(began_with, 0, count),)
        if self._version != began_with and count > 1:
            # It went on through an update.
            spans = (VersionSpan(began_with, 0, count - 1), VersionSpan(self._version, count - 1, count))
        return Completion(_TOKENS[:count], _LOGPROBS[:count], spans, "stop", text)

    async def check(self) -> None:
        pass

    async def weight_checksum(self) -> str | None:
        return str(self._fleet.weights_of(self._version))

    async def start_weight_update(self) -> None:
        pass

    async def finish_weight_update(self, weight_version: int) -> None:
        self._version = weight_version

    async def shutdown(self) -> None:
        pass


class SimulatedLearner:
    """Has what the pipeline asks of a `LearnerGroup`."""

    shares_prompts = True

    def __init__(self, fleet: "SimulatedFleet", ranks: int) -> None:
        self._fleet = fleet
        self.data_ranks = ranks

    async def train(self, version: int, shares: Sequence[Any]) -> list[UpdateReport]:
        fleet = self._fleet
        await asyncio.sleep(fleet.behaviour.train_s)
        updates = list(zip(*(plans for plans, _ in shares), strict=True))
        applied = [fleet.random.random() >= fleet.behaviour.skipped_share for _ in updates]
        fleet.changed_at += [version + 1] * any(applied)
        fleet.on_train(version, shares, applied)
        return [
            UpdateReport(
                {"tokens/trained": float(plans[0].batch_tokens) * done, "learner/skipped": float(not done)}, done, ()
            )
            for plans, done in zip(updates, applied, strict=True)
        ]

    async def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport:
        fleet = self._fleet
        await asyncio.sleep(fleet.behaviour.publish_s)
        for replica in replicas:
            await fleet.hosts[replica].start_weight_update()
            await fleet.hosts[replica].finish_weight_update(version)
        fleet.on_publish(version)
        return PublishReport(fleet.behaviour.publish_s, ((0.0, fleet.behaviour.publish_s),) * len(replicas))

    async def logprobs(self, pairs: Sequence[Any]) -> list[Any]:
        return [_LOGPROBS[: len(completion)] for _, completion in pairs]

    async def save(self, folder: Path) -> None:
        folder.mkdir()

    async def save_state(self, folder: Path) -> None:
        pass


class SimulatedFleet:
    """Has what the pipeline asks of a `Fleet`.

    Attributes:
        hosts: the rollout hosts, which are the real ones.
        changed_at: the versions at which the learner's weights changed.
        tokens_ended: of each completion that ended.
        on_train: is told the version, the shares of each `train`, and which of its updates are applied.
        on_publish: is told each version.
    """

    def __init__(self, loop: VirtualLoop, engines: int, rewards: int, ranks: int, behaviour: Behaviour) -> None:
        self.loop = loop
        self.behaviour = behaviour
        self.changed_at: list[int] = []
        self.tokens_ended: list[int] = []
        self.on_train: Callable[[int, Sequence[Any], Sequence[bool]], None] = lambda version, shares, applied: None
        self.on_publish: Callable[[int], None] = lambda version: None
        self.random = random.Random(behaviour.seed)
        self.completion_s = _lognormal(behaviour.median_s, behaviour.sigma, behaviour.seed)
        self._score_s = _lognormal(behaviour.score_s, behaviour.sigma, behaviour.seed + 1)
        self._num_rewards = rewards
        self.learner = SimulatedLearner(self, ranks)
        self.transfer_sets = (tuple(range(engines)),)
        self.hosts = [
            RolloutHost(SimulatedEngine, {"fleet": self}, 1 << 30, _NEVER_S, clock=loop.clock) for _ in range(engines)
        ]
        self._handles = [self._handle(host) for host in self.hosts]

    async def start(self) -> None:
        """Sets up the hosts."""
        for host in self.hosts:
            await host.setup()
            await host.connect_rewards(self._num_rewards, lambda *call: self._score(*call))

    async def _score(self, replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        await self.loop.answer(next(self._score_s), None)
        return [_VERDICTS[completion.text] for completion in completions]

    def _handle(self, host: RolloutHost) -> SimpleNamespace:
        def sample(request: SampleRequest) -> tuple[Payload, Call]:
            before = _FATE.set(self._fate(len(request.seeds)))
            call = self.loop.create_task(host.sample(request))
            _FATE.reset(before)

            async def answer() -> Any:
                return (await call)[1]

            return Payload(call), Call(answer())

        return SimpleNamespace(
            sample=_RemoteMethod(sample),
            beat=_RemoteMethod(lambda oldest_version: Call(host.beat(oldest_version))),
            weight_checksum=_RemoteMethod(lambda: Call(host.weight_checksum())),
        )

    def handle(self, role: str, replica: int) -> Any:
        assert role == "rollout", f"the pipeline asked for a {role} actor"
        return self._handles[replica]

    def count(self, role: str) -> int:
        return {"rollout": len(self.hosts), "reward": self._num_rewards, "reference": 0}[role]

    def weights_of(self, version: int) -> int:
        """Returns the version at which the weights of a version last changed."""
        return max((changed for changed in self.changed_at if changed <= version), default=0)

    @staticmethod
    async def object_store_used_bytes() -> float:
        return 0.0

    def _fate(self, count: int) -> _Fate:
        drawn, behaviour = self.random.random, self.behaviour
        if drawn() < behaviour.unscorable_share:
            return [_FAILS] * count
        if drawn() < behaviour.filtered_share:
            return [_WRONG] * count
        fate = [_WRONG, _RIGHT] * (count // 2) + [_WRONG] * (count % 2)
        if drawn() < behaviour.unscored_share * count:
            fate[int(drawn() * count)] = _FAILS
        return fate


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
        # The slowest of log-normal times are no hang.
        "rollout": {"group_size": 8, "max_new_tokens": 8192, "timeout_s": _NEVER_S},
        "reward": {"max_error_rate": 1.0},
        "learner": {"max_tokens_per_micro_batch": 32768, "max_skipped_updates": 1000},
        "pipeline": {"parity_every": 0} | pipeline,
        "logging": {"progress": "off", "tensorboard": False, "curves": False, "steps": False},
        "run_dir": str(folder),
    }
    return RunConfig.model_validate(tree)


async def simulated_pipeline(
    config: RunConfig, fleet: SimulatedFleet, prompts: Sequence[Prompt], evaluator: Any = None
) -> tuple[Pipeline, Journal, RolloutPool]:
    """Returns the real pipeline before simulated engines, its journal and its pool; to be called within a `VirtualLoop`.

    Args:
        evaluator: does what an `Evaluator` does, or None.
    """
    await fleet.start()
    shared: Any = fleet
    journal = Journal(config, io.StringIO(), fleet.loop.clock)
    pipeline = config.pipeline
    pool = RolloutPool(
        shared,
        EngineTable(len(fleet.hosts)),
        ErrorWatch(config.reward.max_error_rate),
        journal.timeline,
        config.rollout.timeout_s,
        pipeline.weight_sync_timeout_s,
    )
    stream = PromptStream(
        prompts, UniformSampler(len(prompts), shuffle=True, seed=config.seed), shuffle=True, seed=config.seed
    )
    intake = Intake(
        pipeline.groups_per_step,
        pipeline.max_staleness,
        pipeline.steps,
        load_late_policy(pipeline),
        journal.ledger,
    )
    return Pipeline(config, shared, pool, stream, intake, evaluator, journal), journal, pool
