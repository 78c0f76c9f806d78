"""Publishing to several rollout actors: their order, and what is said of one that does not answer. Real transfer groups, no engine."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch
from vllm.distributed.weight_transfer import ModuleSource

from maspo_ray.errors import ActorFailed, ActorLate
from maspo_ray.weight_sync.gloo_engine import GlooUpdateInfo, join_group, start_broadcast
from maspo_ray.weight_sync.publisher import WeightPublisher

pytestmark = [pytest.mark.engine, pytest.mark.ray]
TIMEOUT_S = 1.5


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
