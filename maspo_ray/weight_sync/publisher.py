"""The learner's end of a weight update: publish version v to a set of rollout actors.

Promise: when `publish` returns, every engine of the set samples from the new weights and stamps them with the version; when it cannot,
it raises within its deadline and names the actor that did not answer. A set is connected by itself, and again when one of its actors
was replaced. What carries the bytes is vLLM's transfer engine for the backend; nothing here knows which. Which actors make a set is
decided elsewhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo

from maspo_ray.actor_failures import CULPRIT_S, actor_error
from maspo_ray.errors import ActorGone, ActorLate
from maspo_ray.experience import PublishReport
from maspo_ray.weight_sync import Backend, free_port


class RolloutClient:
    """vLLM's `VLLMWeightSyncClient` over independent rollout actors, which change their weights together.

    vLLM's own Ray client gives every handle the same rank offset, which is right for the data-parallel ranks of one engine;
    ours are engines of their own, so each is told its own offset. It also carries the version, which the `nccl` engine's
    `finish_weight_update()` does not pass on.

    Args:
        replicas: the actors' numbers, in the order of their handles.
        timeout_s: for each call.

    Attributes:
        version: what the next update is stamped with.
        paused: when the engines stopped for the last update and when they went on, by `perf_counter`.
    """

    def __init__(
        self, replicas: Sequence[int], handles: Sequence[Any], workers_per_engine: int, timeout_s: float
    ) -> None:
        self._names = [f"rollout/{replica}" for replica in replicas]
        self._handles = list(handles)
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s
        self.version = 0
        self.paused = (0.0, 0.0)

    @property
    def num_workers(self) -> int:
        return len(self._handles) * self._workers_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._wait(
            [
                handle.init_weight_transfer_engine.remote(
                    {**init_info, "rank_offset": init_info["rank_offset"] + i * self._workers_per_engine}
                )
                for i, handle in enumerate(self._handles)
            ],
            "joining the transfer group",
        )

    def stage_weights(self, update_info: dict[str, Any]) -> None:
        self._wait(
            [handle.stage_weights.remote(update_info) for handle in self._handles], "beginning to receive weights"
        )

    def start_weight_update(self) -> None:
        self.paused = (perf_counter(), math.inf)
        self._wait([handle.start_weight_update.remote() for handle in self._handles], "pausing")

    def update_weights(self, update_info: Any) -> None:
        self._wait([handle.update_weights.remote(update_info) for handle in self._handles], "receiving weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        calls = [handle.finish_weight_update.remote(self.version) for handle in self._handles]
        self._wait(calls, f"taking up version {self.version}")
        self.paused = (self.paused[0], perf_counter())

    def check(self) -> None:
        """Asks every engine for a sign of life.

        Raises:
            ActorError: one does not give it, and is named.
        """
        self._wait([handle.check.remote() for handle in self._handles], "receiving weights")

    def _wait(self, calls: list[Any], doing: str) -> None:
        try:
            # Raises as soon as one fails: the others may hang because of it.
            ray.get(calls, timeout=self._timeout_s)
            return
        except RayError:
            done, late = ray.wait(calls, num_returns=len(calls), timeout=CULPRIT_S)
        names = dict(zip(calls, self._names, strict=True))
        failed = []
        for call in done:
            try:
                ray.get(call)
            except RayError as error:
                failure = actor_error(error, names[call], doing)
                # The engine's own traceback, for the learner's log.
                failure.__cause__ = error
                failed.append(failure)
        if failed:
            raise next((error for error in failed if isinstance(error, ActorGone)), failed[0])
        if late:
            silent = [names[call] for call in late]
            raise ActorLate.of(
                silent[0],
                f"{', '.join(silent)} did not answer within {self._timeout_s:g} s while {doing}. Raise "
                "pipeline.weight_sync_timeout_s if it is too short.",
            )


class _WholeSource(WeightSource):
    """A source that can be run to its end when a transfer fails: where iterating it is a collective, the other ranks are in it, and would
    wait for this one."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._rest: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        return self._source.metadata()

    def begin(self) -> None:
        """The next iteration is of a new transfer."""
        self._rest = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._rest = iter(self._source)
        return self._rest

    def finish(self) -> None:
        """Goes through what the transfer has not, also where it failed before it began."""
        for _ in self if self._rest is None else self._rest:
            pass


class WeightPublisher:
    """One rank's part in publishing; rank 0 is the sender.

    Args:
        source: this rank's weights; iterating it may be a collective among the learner's ranks.
        master_address: rank 0's address as the rollout actors reach it.
        timeout_s: for each call to an engine.
    """

    def __init__(
        self, source: WeightSource, backend: Backend, rank: int, master_address: str, timeout_s: float
    ) -> None:
        self._source = _WholeSource(source)
        self._timeout_s = timeout_s
        self._trainer_end = _trainer_end(backend, rank, master_address, timeout_s)
        self._groups: dict[tuple[int, ...], tuple[RolloutClient, TrainerWeightTransferEngine]] = {}

    def connect(self, replicas: tuple[int, ...], handles: Sequence[Any], workers_per_engine: int) -> None:
        """Opens a transfer group to rollout actors; closes those that any of them was in. Called on every rank."""
        for known in [known for known in self._groups if set(known) & set(replicas)]:
            self._groups.pop(known)[1].shutdown()
        client = RolloutClient(replicas, handles, workers_per_engine, self._timeout_s)
        info = self._trainer_end(1 + client.num_workers)
        engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)
        self._groups[replicas] = client, engine

    def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport:
        """Sends the weights as `version` to a connected set. Called on every rank; the report is of rank 0, which alone sends."""
        started = perf_counter()
        client, engine = self._groups[replicas]
        client.version = version
        self._source.begin()
        try:
            engine.send_weights()
        except BaseException:
            self._source.finish()
            raise
        paused, resumed = client.paused
        return PublishReport(perf_counter() - started, ((paused - started, resumed - started),) * len(replicas))

    def shutdown(self) -> None:
        for _, engine in self._groups.values():
            engine.shutdown()


def _trainer_end(
    backend: Backend, rank: int, master_address: str, timeout_s: float
) -> Callable[[int], TrainerInitInfo]:
    """Returns what says how to open this rank's end of a transfer group, given the group's size."""
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return lambda world_size: NCCLTrainerInitInfo(
            master_address=master_address, master_port=free_port(), world_size=world_size, rank=rank
        )
    from maspo_ray.weight_sync.gloo_engine import Buffers
    from maspo_ray.weight_sync.gloo_trainer import GlooTrainerInitInfo

    # Groups send one after the other, so that all can use the same.
    buffers = Buffers()
    return lambda world_size: GlooTrainerInitInfo(
        master_address=master_address,
        master_port=free_port(),
        world_size=world_size,
        timeout_s=timeout_s,
        rank=rank,
        buffers=buffers,
    )
