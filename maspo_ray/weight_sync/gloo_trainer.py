"""Weight transfer over Gloo: the learner's side of `gloo_engine`.

Promise: large weights are sent from where they lie, small ones packed into buckets, while the engines still generate; where both sides
fail, the error is that of the side that can say which actor is at fault.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch.distributed import ProcessGroupGloo
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from maspo_ray.errors import RunError
from maspo_ray.weight_sync.buckets import Bucket, cut_buckets
from maspo_ray.weight_sync.gloo_engine import (
    BUCKET_BYTES,
    Buffers,
    GlooInitInfo,
    GlooUpdateInfo,
    join_group,
    start_broadcast,
)

T = TypeVar("T")
_UNDER_WAY_BYTES = 2**28
"""Of weights that are being sent at once, besides the last: far more than keeps the connection busy."""
_GRACE_S = 5.0
"""Between the deadlines of the two sides of a transfer, which are of the same length."""


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Trainer-side twin of `GlooInitInfo`; `world_size` counts the trainer and all workers."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float
    bucket_bytes: int = BUCKET_BYTES
    buffers: Buffers = field(default_factory=Buffers)


class StagingClient(VLLMWeightSyncClient, Protocol):
    """vLLM's client to the engines, with the call that it lacks."""

    def stage_weights(self, update_info: dict[str, Any]) -> None:
        """Lets the engines begin to receive; returns when all have begun."""
        ...

    def check(self) -> None:
        """Raises where an engine is gone, and names it."""
        ...


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side: rank 0 sends; the other ranks only take part in gathering what the source materialises.

    What the source yields must keep its values until `send_weights` returns: large weights are sent from where they lie. Those that the
    source computed, or gathered, are held only while they are under way.
    """

    init_info_cls = GlooTrainerInitInfo

    client: StagingClient

    def __init__(self, *, init_info: GlooTrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._bucket_bytes = init_info.bucket_bytes
        self._buffers = init_info.buffers
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
            engine._group = run_both(
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
        # Sent and received while the engines still generate: their pause is for loading alone, at the price of a copy of the
        # weights on their side.
        self._transfer(info, meta)
        self.client.start_weight_update()
        self.client.update_weights(asdict(info))
        self.client.finish_weight_update()

    def _transfer(self, info: GlooUpdateInfo, meta: list[ParamMeta]) -> None:
        try:
            run_both(lambda: self.client.stage_weights(asdict(info)), lambda: self._broadcast(meta))
        except RuntimeError as error:
            # Gloo knows that a peer is gone, not which.
            if not isinstance(error, RunError):
                self.client.check()
            raise

    def _broadcast(self, meta: list[ParamMeta]) -> None:
        """Sends bucket after bucket, packing one, where it has several weights, while those before are under way. Where the source
        gathers, the other ranks take part."""
        assert self.source is not None and self._group is not None
        weights = iter(self.source)
        buckets = cut_buckets(((m.name, m.dtype, m.shape) for m in meta), self._bucket_bytes)
        buffers = iter(self._buffers.of([bucket for bucket in buckets if len(bucket.entries) > 1]))
        sending: deque[tuple[int, Any]] = deque()
        under_way_bytes = 0
        for bucket in buckets:
            if len(bucket.entries) > 1:
                buffer = next(buffers)
                fill_bucket(bucket, buffer, weights)
            else:
                buffer = bytes_of(bucket, weights)
            sending.append((len(buffer), start_broadcast(self._group, buffer)))
            under_way_bytes += len(buffer)
            # A transfer that is under way holds its bytes, which are a copy where the source computes them, from experts for example.
            while under_way_bytes > _UNDER_WAY_BYTES and len(sending) > 1:
                num_bytes, work = sending.popleft()
                work.wait()
                under_way_bytes -= num_bytes
        # A source that gathers is a collective: run it to its end, as the other ranks do.
        assert next(weights, None) is None, "the source yields more than its metadata declares"
        for _, work in sending:
            work.wait()

    def shutdown(self) -> None:
        self._group = None


@torch.no_grad()
def fill_bucket(bucket: Bucket, buffer: torch.Tensor, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    for name, view in bucket.views(buffer):
        view.copy_(_next_weight(name, weights))


def bytes_of(bucket: Bucket, weights: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Returns the bytes of a bucket's only parameter as they lie in memory, [num_bytes] uint8; they are copied only where the weight is
    on another device, of another dtype, or not contiguous."""
    entry = bucket.entries[0]
    weight = _next_weight(entry.name, weights).detach().to("cpu", entry.dtype)
    return weight.contiguous().flatten().view(torch.uint8)


def _next_weight(name: str, weights: Iterator[tuple[str, torch.Tensor]]) -> torch.Tensor:
    given, weight = next(weights)
    assert given == name, f"the source yields {given} where its metadata declares {name}"
    return weight


def run_both(remote: Callable[[], Any], local: Callable[[], T]) -> T:
    """Returns what `local` does while `remote` runs on a thread; neither side of a collective may wait for the other.

    Where both fail it is `remote` that can say which actor is at fault.
    """
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        call = executor.submit(remote)
        try:
            result = local()
        except Exception:
            wait([call], timeout=_GRACE_S)
            if call.done():
                call.result()
            raise
        call.result()
        return result
    finally:
        # Not joined: after an error on one side the other may wait for a peer that never comes, until its own deadline.
        executor.shutdown(wait=False)


if "gloo" not in WeightTransferTrainerFactory._registry:
    WeightTransferTrainerFactory.register_engine("gloo", GlooTrainerWeightTransferEngine)
