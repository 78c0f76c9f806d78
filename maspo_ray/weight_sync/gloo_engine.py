"""Weight transfer over Gloo, for where there is no GPU: the engine in vLLM's worker. Its trainer-side twin is `gloo_trainer`'s.

Promise: the same calls in the same order as vLLM's `nccl` backend, registered beside it under the name `gloo`, so that neither the
learner nor the pipeline know which of them carries the weights; and before them one more, `stage_weights`, by which the bytes
arrive while the engine still generates. vLLM imports this module in the engine's process through `worker_extension_cls` (see
`GlooWorkerExtension`), before it builds its transfer engine.
"""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from maspo_ray.weight_sync.buckets import Bucket, cut_buckets
from maspo_ray.weight_sync.checksum import WeightDigest

BUCKET_BYTES = 2**20
"""Most matrices are larger, and are sent from where they lie: a copy costs about a third of what a broadcast on one machine does."""


class Buffers:
    """A buffer for each bucket, kept from one update to the next: new memory costs its first touch, which is most of a copy."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def of(self, buckets: Sequence[Bucket]) -> list[torch.Tensor]:
        """Returns a tensor [num_bytes] uint8 for each bucket."""
        if [bucket.num_bytes for bucket in buckets] != [len(buffer) for buffer in self._buffers]:
            self._buffers = [torch.empty(bucket.num_bytes, dtype=torch.uint8) for bucket in buckets]
        return self._buffers


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join the transfer group; the trainer is rank 0, workers start at `rank_offset`."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass(kw_only=True)
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The parameters of one round, in the order in which they are sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def buckets(self, bucket_bytes: int) -> list[Bucket]:
        dtypes = [getattr(torch, name) for name in self.dtype_names]
        return cut_buckets(zip(self.names, dtypes, self.shapes, strict=True), bucket_bytes)


def join_group(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroupGloo:
    """Returns a process group of its own, beside any that torch.distributed has as its default.

    Gloo is bound to the interface that routes to the master: by default it takes the host's name, which need not resolve.
    """
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        own_address = probe.getsockname()[0]
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=own_address)]
    options._timeout = timeout
    return ProcessGroupGloo(PrefixStore("maspo_ray/weights", store), rank, world_size, options)


def start_broadcast(group: ProcessGroupGloo, buffer: torch.Tensor) -> Any:
    options = BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([buffer], options)  # type: ignore[attr-defined]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives while the engine generates, loads while it is paused."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: ProcessGroupGloo | None = None
    _bucket_bytes: int = BUCKET_BYTES
    loaded_checksum: str = ""
    """Of the weights that were loaded last, as they came."""
    _staged: tuple[tuple[Bucket, torch.Tensor, Any], ...] = ()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self._buffers = Buffers()
        config = self.parallel_config
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        self._bucket_bytes = init_info.bucket_bytes
        self._group = join_group(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def stage(self, update_info: GlooUpdateInfo) -> None:
        """Begins to receive, on Gloo's own threads, and returns at once."""
        group = self._group
        assert group is not None, "init_transfer_engine comes before stage"
        # Each bucket has a buffer of its own: the layerwise reload keeps views of it until the layer is complete.
        buckets = update_info.buckets(self._bucket_bytes)
        buffers = self._buffers.of(buckets)
        works = [start_broadcast(group, buffer) for buffer in buffers]
        self._staged = tuple(zip(buckets, buffers, works, strict=True))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        staged, self._staged = self._staged, ()
        assert [e.name for bucket, *_ in staged for e in bucket.entries] == update_info.names, "stage comes first"

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for bucket, buffer, work in staged:
                work.wait()
                yield from bucket.views(buffer)

        digest = WeightDigest()
        # In one call: each makes a table of all parameters.
        self.model.load_weights(digest.watch(received()))  # type: ignore[operator]
        self.loaded_checksum = digest.hex()

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_lm_head(self.model)

    def shutdown(self) -> None:
        self._group = None


def repack_tied_lm_head(model: torch.nn.Module) -> None:
    """Packs a tied output layer again after a reload.

    vLLM 0.32 on CPU multiplies by a prepacked copy of each weight. The reload packs what was loaded, and a tied `lm_head` is
    loaded through the embedding: its copy stays the old one, with only a warning. Can go when vLLM packs it itself.
    """
    lm_head = getattr(model, "lm_head", None)
    method = getattr(lm_head, "quant_method", None)
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False) and method is not None:
        method.process_weights_after_loading(lm_head)


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Makes a reload pack the experts' weights again.

    vLLM 0.32 on CPU multiplies by experts that are padded and prepacked when their kernel is made; with a kernel from before, a reload
    leaves them as the checkpoint has them. Can go when vLLM packs what it reloads.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


class GlooWorkerExtension:
    """Named as vLLM's `worker_extension_cls`, so that importing it registers the engine in the engine's process.

    An entry point of group `vllm.general_plugins` would need the project to be installed, which `ray job submit` with a
    working directory does not do.
    """

    weight_transfer_engine: GlooWeightTransferEngine

    def weight_checksum(self) -> str:
        """Returns the checksum of what was loaded last: of the linear layers' weights vLLM keeps packed copies alone on a CPU."""
        return self.weight_transfer_engine.loaded_checksum

    def stage_weights(self, update_info: dict[str, Any]) -> None:
        """Called on the worker, between two steps of the engine: vLLM's own `update_weights` wants it paused."""
        self.weight_transfer_engine.stage(GlooUpdateInfo(**update_info))


if "gloo" not in WeightTransferEngineFactory._registry:
    # Imported again in the same process, it is there already.
    WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
