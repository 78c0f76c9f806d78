"""The learner's end of a weight update: publish version v to every rollout actor.

Promise: when `publish` returns, every engine samples from the new weights and stamps them with the version; when it cannot, it
raises within its deadline and names the actor that did not answer. What carries the bytes is vLLM's transfer engine for the
backend; nothing here knows which.
"""

from collections.abc import Sequence
from typing import Any

import ray
from vllm.distributed.weight_transfer import TrainerWeightTransferEngine, WeightSource, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerInitInfo

from maspo_ray.errors import RunError
from maspo_ray.weight_sync import free_port


class RolloutClient:
    """vLLM's `VLLMWeightSyncClient` over independent rollout actors.

    vLLM's own Ray client gives every handle the same rank offset, which is right for the data-parallel ranks of one engine;
    ours are engines of their own, so each is told its own offset. It also carries the version, which the `nccl` engine's
    `finish_weight_update()` does not pass on.
    """

    def __init__(self, handles: Sequence[Any], workers_per_engine: int, timeout_s: float) -> None:
        self._handles = list(handles)
        self._workers_per_engine = workers_per_engine
        self._timeout_s = timeout_s
        self.version = 0

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

    def start_weight_update(self) -> None:
        self._wait([handle.start_weight_update.remote() for handle in self._handles], "pausing")

    def update_weights(self, update_info: Any) -> None:
        self._wait([handle.update_weights.remote(update_info) for handle in self._handles], "receiving weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        calls = [handle.finish_weight_update.remote(self.version) for handle in self._handles]
        self._wait(calls, f"taking up version {self.version}")

    def _wait(self, calls: list[Any], doing: str) -> None:
        done, late = ray.wait(calls, num_returns=len(calls), timeout=self._timeout_s)
        ray.get(done)
        if late:
            names = ", ".join(f"rollout/{i}" for i, call in enumerate(calls) if call in late)
            raise RunError(
                f"{names} did not answer within {self._timeout_s:g} s while {doing}. See its log, or raise "
                "pipeline.weight_sync_timeout_s."
            )


class WeightPublisher:
    """One rank's part in publishing; rank 0 is the sender.

    Args:
        source: this rank's weights; iterating it may be a collective among the learner's ranks.
        master_address: rank 0's address as the rollout actors reach it.
    """

    def __init__(
        self,
        source: WeightSource,
        client: RolloutClient,
        backend: str,
        rank: int,
        master_address: str,
        timeout_s: float,
    ) -> None:
        self._client = client
        info = _trainer_init_info(backend, rank, master_address, 1 + client.num_workers, timeout_s)
        self._engine: TrainerWeightTransferEngine = WeightTransferTrainerFactory.trainer_init(
            info, client=client, source=source
        )

    def publish(self, version: int) -> None:
        """Sends the weights as `version`. Called on every rank."""
        self._client.version = version
        self._engine.send_weights()

    def shutdown(self) -> None:
        self._engine.shutdown()


def _trainer_init_info(
    backend: str, rank: int, master_address: str, world_size: int, timeout_s: float
) -> TrainerInitInfo:
    port = free_port()
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(master_address=master_address, master_port=port, world_size=world_size, rank=rank)
    from maspo_ray.weight_sync.gloo_engine import GlooTrainerInitInfo

    return GlooTrainerInitInfo(
        master_address=master_address, master_port=port, world_size=world_size, timeout_s=timeout_s, rank=rank
    )
