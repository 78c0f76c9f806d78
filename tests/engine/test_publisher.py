"""Publishing to sets of rollout actors: their order, what is said of one that does not answer, and how one is replaced. Real transfer
groups; engines where it is said."""

import copy
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rollouts import make_prompt, sample, start_rollout
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm.distributed.weight_transfer import ModuleSource, WeightSource
from vllm.distributed.weight_transfer.base import ParamMeta

from maspo_ray.errors import ActorFailed, ActorGone, ActorLate
from maspo_ray.experience import Completion
from maspo_ray.fleet.transfer_sets import transfer_sets
from maspo_ray.weight_sync import gloo_trainer
from maspo_ray.weight_sync.gloo_engine import GlooUpdateInfo, join_group, start_broadcast
from maspo_ray.weight_sync.publisher import RolloutClient, WeightPublisher

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TIMEOUT_S = 1.5
PROMPT = np.array([5, 9, 13], dtype=np.int32)


class _Call:
    def __init__(self, function: Any) -> None:
        self._function = function

    def remote(self, *arguments: Any) -> Any:
        result = self._function(*arguments)
        return result if isinstance(result, ray.ObjectRef) else ray.put(result)


class _Engine:
    """What a rollout actor does with a broadcast, in this process, behind what looks like its handle."""

    def __init__(self, name: str, events: list[str], silent_in: str | None = None) -> None:
        self._name = name
        self._events = events
        self._silent_in = silent_in
        self.received: dict[str, torch.Tensor] = {}

    def __getattr__(self, method: str) -> _Call:
        if method == self._silent_in:
            # Pickled by value: a worker does not find this module.
            silent = ray.remote(lambda: __import__("time").sleep(60)).options(num_cpus=0)
            return _Call(lambda *_: silent.remote())
        return _Call(getattr(self, f"_{method}"))

    def _init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        rank, size = info["rank_offset"], info["world_size"]
        self._bucket_bytes = info["bucket_bytes"]
        # On a thread: nobody's join returns before all have begun theirs.
        self._joined = ThreadPoolExecutor(1).submit(
            join_group, info["master_address"], info["master_port"], rank, size, TIMEOUT_S
        )

    def _stage_weights(self, info: dict[str, Any]) -> None:
        buckets = GlooUpdateInfo(**info).buckets(self._bucket_bytes)
        buffers = [torch.empty(bucket.num_bytes, dtype=torch.uint8) for bucket in buckets]
        self._staged = [
            (*pair, start_broadcast(self._joined.result(), pair[1])) for pair in zip(buckets, buffers, strict=True)
        ]

    def _start_weight_update(self) -> None:
        self._events.append(f"{self._name} paused")

    def _update_weights(self, info: dict[str, Any]) -> None:
        for bucket, buffer, work in self._staged:
            work.wait()
            self.received |= dict(bucket.views(buffer))

    def _finish_weight_update(self, version: int) -> None:
        self._events.append(f"{self._name} at {version}")

    def _check(self) -> Any:
        return None


@pytest.fixture(scope="module")
def model(own_ray: None) -> Iterator[torch.nn.Module]:
    yield torch.nn.Linear(4, 3)


def _publisher(model: torch.nn.Module, engines: list[_Engine], *sets: tuple[int, ...]) -> WeightPublisher:
    publisher = WeightPublisher(ModuleSource(model), "gloo", 0, "127.0.0.1", TIMEOUT_S)
    for replicas in sets:
        publisher.connect(replicas, [engines[replica] for replica in replicas], 1)
    return publisher


def test_publish_to_a_set_pauses_its_engines_alone(model: torch.nn.Module) -> None:
    events: list[str] = []
    engines = [_Engine("first", events), _Engine("second", events)]
    publisher = _publisher(model, engines, (0,), (1,))
    for version in (0, 1):
        reports = [publisher.publish(version, (replica,)) for replica in (0, 1)]
    assert events[4:] == ["first paused", "first at 1", "second paused", "second at 1"]
    assert all(torch.equal(engine.received["weight"], model.weight) for engine in engines)
    for report in reports:
        [(paused, resumed)] = report.pauses
        assert 0 < paused < resumed < report.seconds


def test_publish_to_a_set_of_two_sends_the_weights_to_both_in_one_group(model: torch.nn.Module) -> None:
    events: list[str] = []
    engines = [_Engine("first", events), _Engine("second", events)]
    report = _publisher(model, engines, (0, 1)).publish(0, (0, 1))
    assert events == ["first paused", "second paused", "first at 0", "second at 0"]
    assert all(torch.equal(engine.received["weight"], model.weight) for engine in engines)
    assert len(report.pauses) == 2


def test_publish_with_an_engine_that_does_not_begin_to_receive_names_it_in_time(model: torch.nn.Module) -> None:
    engines = [_Engine("first", []), _Engine("second", [], silent_in="stage_weights")]
    publisher = _publisher(model, engines, (0,), (1,))
    publisher.publish(0, (0,))
    started = time.monotonic()
    with pytest.raises(ActorLate, match=r"^rollout/1 did not answer within 1.5 s while beginning to receive weights"):
        publisher.publish(0, (1,))
    assert time.monotonic() - started < 4 * TIMEOUT_S


class _Computed(WeightSource):
    """Weights that are nowhere else, each of 2 MiB: the i-th is full of i."""

    def __init__(self) -> None:
        self._made: list[weakref.ref[Any]] = []
        self.held: list[int] = []

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(str(i), torch.float32, (2**19,)) for i in range(8)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(8):
            # numpy's memory, since it can be watched.
            weight = np.full(2**19, i, np.float32)
            self._made.append(weakref.ref(weight))
            tensor = torch.from_numpy(weight)
            del weight
            yield str(i), tensor
            del tensor
            self.held.append(sum(known() is not None for known in self._made))


def test_publish_holds_what_is_computed_only_while_it_is_under_way(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gloo_trainer, "_UNDER_WAY_BYTES", 2**21)
    source, engine = _Computed(), _Engine("first", [])
    publisher = WeightPublisher(source, "gloo", 0, "127.0.0.1", TIMEOUT_S)
    publisher.connect((0,), [engine], 1)
    publisher.publish(0, (0,))
    assert all(bool((weight == int(name)).all()) for name, weight in engine.received.items())
    # One that arrives, one that follows.
    assert len(engine.received) == 8 and max(source.held) <= 3


def test_publish_with_an_engine_that_does_not_pause_names_it(model: torch.nn.Module) -> None:
    publisher = _publisher(model, [_Engine("first", [], silent_in="start_weight_update")], (0,))
    with pytest.raises(ActorLate, match=r"^rollout/0 did not answer within 1.5 s while pausing. Raise pipeline\."):
        publisher.publish(0, (0,))


class _Dying(_Engine):
    """Its engine's process is gone in the middle of a transfer: the group breaks, and it says so when it is asked."""

    def _stage_weights(self, info: dict[str, Any]) -> None:
        del self._joined

    def _check(self) -> Any:
        # Pickled by value: a worker does not find this module.
        return ray.remote(lambda: {}["EngineDeadError"]).options(num_cpus=0).remote()


def test_publish_to_an_engine_that_is_gone_in_the_middle_names_it(model: torch.nn.Module) -> None:
    publisher = _publisher(model, [_Dying("first", [])], (0,))
    with pytest.raises(ActorFailed, match=r"^rollout/0 failed while receiving weights: .*EngineDeadError"):
        publisher.publish(0, (0,))


class _Counted(WeightSource):
    """Three weights, and how many of them were taken."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, torch.float32, (2,)) for name in "abc"]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            self.taken.append(name)
            yield name, torch.zeros(2)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_publish_that_fails_takes_every_weight_once_as_the_other_ranks_do(taken: int) -> None:
    source = _Counted()
    publisher = WeightPublisher(source, "gloo", 0, "127.0.0.1", TIMEOUT_S)

    def send() -> None:
        weights = iter(publisher._source) if taken else iter(())
        for _ in range(taken):
            next(weights)
        raise RuntimeError("connection closed by peer")

    engine: Any = SimpleNamespace(send_weights=send)
    publisher._groups[(0,)] = RolloutClient((0,), [None], 1, TIMEOUT_S), engine
    for _ in range(2):
        source.taken.clear()
        with pytest.raises(RuntimeError, match="closed by peer"):
            publisher.publish(0, (0,))
        assert source.taken == ["a", "b", "c"]


def _sample(engine: Any) -> list[Completion]:
    return sample(engine, make_prompt(*PROMPT.tolist()), [0, 1], max_new_tokens=8)


def _assert_sampled_by(trainer: PreTrainedModel, version: int, completions: list[Completion]) -> None:
    """The engine holds the trainer's weights, as `version`."""
    assert len(completions) == 2
    for completion in completions:
        assert [span.version for span in completion.spans] == [version]
        ids = torch.from_numpy(np.concatenate([PROMPT, completion.token_ids])).long()
        with torch.no_grad():
            logprobs = trainer(ids[None]).logits[0].log_softmax(-1)
        own = logprobs[:-1].gather(1, ids[1:, None])[len(PROMPT) - 1 :, 0].numpy()
        assert np.abs(own - completion.logprobs).max() < 1e-3


def _perturb(trainer: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="module")
def trainer(tiny_model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def engines(tiny_model: str, own_ray: None) -> Iterator[list[Any]]:
    """Two real engines; a test may put another in the place of one."""
    actors = [start_rollout(tiny_model) for _ in range(2)]
    ray.get([actor.setup.remote() for actor in actors])
    yield actors
    for actor in actors:
        ray.kill(actor)


def test_publish_together_reaches_two_engines_by_one_group(engines: list[Any], trainer: PreTrainedModel) -> None:
    publisher = WeightPublisher(ModuleSource(trainer), "gloo", 0, ray.util.get_node_ip_address(), 30.0)
    [both] = transfer_sets(2, "together")
    publisher.connect(both, engines, 1)
    for version in (1, 2):
        _perturb(trainer)
        assert len(publisher.publish(version, both).pauses) == 2
        for engine in engines:
            _assert_sampled_by(trainer, version, _sample(engine))


def test_engine_that_died_is_replaced_by_itself_while_the_other_goes_on(
    tiny_model: str, engines: list[Any], trainer: PreTrainedModel
) -> None:
    publisher = WeightPublisher(ModuleSource(trainer), "gloo", 0, ray.util.get_node_ip_address(), 30.0)
    first, second = transfer_sets(2, "rolling")
    publisher.connect(first, engines[:1], 1)
    publisher.connect(second, engines[1:], 1)
    for replicas in (first, second):
        publisher.publish(3, replicas)
    before = copy.deepcopy(trainer)
    for engine in engines:
        _assert_sampled_by(before, 3, _sample(engine))

    ray.kill(engines[1])
    with pytest.raises(ActorGone, match=r"^rollout/1 was lost while beginning to receive weights: ") as raised:
        publisher.publish(4, second)
    assert raised.value.actor == "rollout/1"
    engines[1] = start_rollout(tiny_model)
    up, meanwhile = engines[1].setup.remote(), 0
    while ray.wait([up], timeout=0)[1]:
        _assert_sampled_by(before, 3, _sample(engines[0]))
        meanwhile += 1
    ray.get(up)
    assert meanwhile > 0
    _perturb(trainer)
    publisher.connect(second, engines[1:], 1)
    publisher.publish(4, second)
    _assert_sampled_by(trainer, 4, _sample(engines[1]))
    _assert_sampled_by(before, 3, _sample(engines[0]))
    # Its group is as it was.
    publisher.publish(4, first)
    _assert_sampled_by(trainer, 4, _sample(engines[0]))
    publisher.shutdown()
