"""The learner's end of a weight update: publish version v to every rollout actor.

Promise: when `publish` returns, every engine samples from the new weights and stamps them with the version; when it cannot, it
raises within its deadline and names the actor that did not answer. What carries the bytes is vLLM's transfer engine for the
backend; nothing here knows which.
"""

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from maspo_ray.config import UpdateOrder
from maspo_ray.errors import RunError
from maspo_ray.experience import PublishReport
from maspo_ray.weight_sync import free_port


class RolloutClient:
    """vLLM's `VLLMWeightSyncClient` over independent rollout actors, which change their weights together.

    vLLM's own Ray client gives every handle the same rank offset, which is right for the data-parallel ranks of one engine;
    ours are engines of their own, so each is told its own offset. It also carries the version, which the `nccl` engine's
    `finish_weight_update()` does not pass on.

    Args:
        first: the replica of the first handle.

    Attributes:
        version: what the next update is stamped with.
        paused: when the engines stopped for the last update and when they went on, by `perf_counter`.
    """

    def __init__(
        self,
        handles: Sequence[Any],
        workers_per_engine: int,
        timeout_s: float,
        first: int = 0,
    ) -> None:
        self._handles = list(handles)
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s
        self._first = first
        self.version = 0
        self.paused = (0.0, 0.0)

    @property
    def num_engines(self) -> int:
        return len(self._handles)

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
            RunError: one does not give it, and is named.
        """
        self._wait([handle.check.remote() for handle in self._handles], "receiving weights")

    def _wait(self, calls: list[Any], doing: str) -> None:
        done, late = ray.wait(calls, num_returns=len(calls), timeout=self._timeout_s)
        names = {call: f"rollout/{i}" for i, call in enumerate(calls, self._first)}
        for call in done:
            try:
                ray.get(call)
            except RayTaskError as error:
                cause = error.cause
                raise RunError(f"{names[call]} failed while {doing}: {type(cause).__name__}: {cause}") from error
            except RayActorError as error:
                raise RunError(f"{names[call]} died while {doing}: {' '.join(str(error).split())}") from None
        if late:
            raise RunError(
                f"{', '.join(names[call] for call in late)} did not answer within {self._timeout_s:g} s while {doing}. See its log, "
                "or raise pipeline.weight_sync_timeout_s."
            )


class WeightPublisher:
    """One rank's part in publishing; rank 0 is the sender.

    Args:
        source: this rank's weights; iterating it may be a collective among the learner's ranks.
        clients: each with a transfer group of its own; they change their weights one after the other.
        master_address: rank 0's address as the rollout actors reach it.
    """

    def __init__(
        self,
        source: WeightSource,
        clients: Sequence[RolloutClient],
        backend: str,
        rank: int,
        master_address: str,
        timeout_s: float,
    ) -> None:
        self._clients = list(clients)
        sizes = [1 + client.num_workers for client in clients]
        infos = _trainer_init_infos(backend, rank, master_address, sizes, timeout_s)
        self._engines: list[TrainerWeightTransferEngine] = [
            WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
            for info, client in zip(infos, clients, strict=True)
        ]

    def publish(self, version: int) -> PublishReport:
        """Sends the weights as `version`. Called on every rank; the report is of rank 0, which alone sends."""
        started = perf_counter()
        for client, engine in zip(self._clients, self._engines, strict=True):
            client.version = version
            engine.send_weights()
        pauses = [
            (client.paused[0] - started, client.paused[1] - started)
            for client in self._clients
            for _ in range(client.num_engines)
        ]
        return PublishReport(perf_counter() - started, tuple(pauses))

    def shutdown(self) -> None:
        for engine in self._engines:
            engine.shutdown()


def clients_of(
    handles: Sequence[Any], workers_per_engine: int, update: UpdateOrder, timeout_s: float
) -> list[RolloutClient]:
    """Returns one client for all rollout actors, or one for each, so that the others generate while it changes its weights."""
    size = len(handles) if update == "together" else 1
    return [
        RolloutClient(handles[first : first + size], workers_per_engine, timeout_s, first)
        for first in range(0, len(handles), size)
    ]


def _trainer_init_infos(
    backend: str, rank: int, master_address: str, world_sizes: Sequence[int], timeout_s: float
) -> list[TrainerInitInfo]:
    """Returns what opens this rank's end of transfer groups of such sizes."""
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return [
            NCCLTrainerInitInfo(master_address=master_address, master_port=free_port(), world_size=size, rank=rank)
            for size in world_sizes
        ]
    from maspo_ray.weight_sync.gloo_engine import Buffers, GlooTrainerInitInfo

    # They send one after the other.
    buffers = Buffers()
    return [
        GlooTrainerInitInfo(
            master_address=master_address,
            master_port=free_port(),
            world_size=size,
            timeout_s=timeout_s,
            rank=rank,
            buffers=buffers,
        )
        for size in world_sizes
    ]
