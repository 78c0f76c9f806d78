"""Weight transfer over Gloo, for where there is no GPU: an engine for vLLM's worker and its trainer-side twin.

Promise: the same calls in the same order as vLLM's `nccl` backend, registered beside it under the name `gloo`, so that the
learner and the rollout actor do not know which of them carries the weights. vLLM imports this module in the engine's process
through `worker_extension_cls` (see `GlooWorkerExtension`), before it builds its transfer engine.
"""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from maspo_ray.weight_sync.buckets import Bucket, cut_buckets

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20


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


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer-side twin of `GlooInitInfo`; `world_size` counts the trainer and all workers."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float
    bucket_bytes: int = BUCKET_BYTES


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


def _start_broadcast(group: ProcessGroupGloo, buffer: torch.Tensor) -> Any:
    options = BroadcastOptions()
    options.rootRank = 0
    return group.broadcast([buffer], options)  # type: ignore[attr-defined]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives bucket after bucket, loading one while the next arrives."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    _group: ProcessGroupGloo | None = None
    _bucket_bytes: int = BUCKET_BYTES

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        config = self.parallel_config
        rank = init_info.rank_offset + config.data_parallel_index * config.world_size + config.rank
        self._bucket_bytes = init_info.bucket_bytes
        self._group = join_group(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        assert self._group is not None, "init_transfer_engine comes before receive_weights"
        # Each bucket has a buffer of its own: the layerwise reload keeps views of it until the layer is complete.
        pending: tuple[Bucket, torch.Tensor, Any] | None = None
        for bucket in update_info.buckets(self._bucket_bytes):
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            work = _start_broadcast(self._group, buffer)
            self._load(pending)
            pending = (bucket, buffer, work)
        self._load(pending)

    def _load(self, pending: tuple[Bucket, torch.Tensor, Any] | None) -> None:
        if pending is not None:
            bucket, buffer, work = pending
            work.wait()
            self.model.load_weights(bucket.views(buffer))  # type: ignore[operator]

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


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side: rank 0 sends; the other ranks only take part in gathering what the source materialises."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(self, *, init_info: GlooTrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._bucket_bytes = init_info.bucket_bytes
        self._group: ProcessGroupGloo | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        assert source is not None, "the gloo backend sends the weights of a source"
        engine = cls(init_info=init_info, client=client, source=source)
        if engine.is_sender:
            worker_info = GlooInitInfo(
                master_address=init_info.master_address,
                master_port=init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                bucket_bytes=init_info.bucket_bytes,
                timeout_s=init_info.timeout_s,
            )
            engine._group = _together(
                lambda: client.init_weight_transfer_engine(asdict(worker_info)),
                lambda: join_group(
                    init_info.master_address, init_info.master_port, 0, init_info.world_size, init_info.timeout_s
                ),
            )
        return engine

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        info = GlooUpdateInfo(
            names=[m.name for m in meta],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
            shapes=[list(m.shape) for m in meta],
        )
        # Packed while the engines still generate: their pause is for the transfer alone, at the price of a copy of the weights.
        buffers = self._packed(meta)
        self.client.start_weight_update()
        _together(lambda: self.client.update_weights(asdict(info)), lambda: self._broadcast(buffers))
        self.client.finish_weight_update()

    def _packed(self, meta: list[ParamMeta]) -> list[torch.Tensor]:
        """Returns the buckets, filled. Where the source gathers, the other ranks take part."""
        assert self.source is not None
        weights = iter(self.source)
        buffers = []
        for bucket in cut_buckets(((m.name, m.dtype, m.shape) for m in meta), self._bucket_bytes):
            buffers.append(torch.empty(bucket.num_bytes, dtype=torch.uint8))
            _fill(bucket, buffers[-1], weights)
        # A source that gathers is a collective: run it to its end, as the other ranks do.
        assert next(weights, None) is None, "the source yields more than its metadata declares"
        return buffers

    def _broadcast(self, buffers: list[torch.Tensor]) -> None:
        assert self._group is not None
        for work in [_start_broadcast(self._group, buffer) for buffer in buffers]:
            work.wait()

    def shutdown(self) -> None:
        self._group = None


@torch.no_grad()
def _fill(bucket: Bucket, buffer: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    for name, view in bucket.views(buffer):
        given, weight = next(weights)
        assert given == name, f"the source yields {given} where its metadata declares {name}"
        view.copy_(weight)


def _together(remote: Callable[[], Any], local: Callable[[], T]) -> T:
    """Returns what `local` does while `remote` runs on a thread; neither side of a collective may wait for the other."""
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        call = executor.submit(remote)
        result = local()
        call.result()
        return result
    finally:
        # Not joined: after an error on one side the other may wait for a peer that never comes, until its own deadline.
        executor.shutdown(wait=False)


class GlooWorkerExtension:
    """Named as vLLM's `worker_extension_cls`, so that importing it registers the engine in the engine's process.

    An entry point of group `vllm.general_plugins` would need the project to be installed, which `ray job submit` with a
    working directory does not do.
    """


def _register() -> None:
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)


_register()
