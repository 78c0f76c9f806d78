"""The Gloo sender's order of events, with a transfer group of two in this process and no engine."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from maspo_ray.weight_sync import free_port
from maspo_ray.weight_sync.buckets import cut_buckets
from maspo_ray.weight_sync.gloo_engine import GlooUpdateInfo, join_group, start_broadcast
from maspo_ray.weight_sync.gloo_trainer import GlooTrainerInitInfo, GlooTrainerWeightTransferEngine, bytes_of

pytestmark = pytest.mark.engine
BUCKET_BYTES = 64


class _Source(WeightSource):
    def __init__(self, weights: dict[str, torch.Tensor], events: list[str]) -> None:
        self._weights = weights
        self._events = events

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self._weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._weights.items()
        self._events.append("packed")


class _Client:
    """What a rollout actor does, in this process."""

    num_workers = 1

    def __init__(self, events: list[str]) -> None:
        self._events = events
        self.received: dict[str, torch.Tensor] = {}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._group = join_group(init_info["master_address"], init_info["master_port"], 1, 2, 10.0)

    def start_weight_update(self) -> None:
        self._events.append("paused")

    def stage_weights(self, update_info: dict[str, Any]) -> None:
        buckets = GlooUpdateInfo(**update_info).buckets(BUCKET_BYTES)
        buffers = [torch.empty(bucket.num_bytes, dtype=torch.uint8) for bucket in buckets]
        self._staged = [(*pair, start_broadcast(self._group, pair[1])) for pair in zip(buckets, buffers, strict=True)]

    def update_weights(self, update_info: dict[str, Any]) -> None:
        for bucket, buffer, work in self._staged:
            work.wait()
            self.received |= dict(bucket.views(buffer))

    def finish_weight_update(self) -> None:
        self._events.append("resumed")


def test_sender_packs_and_sends_before_the_engines_pause_what_the_source_has() -> None:
    events: list[str] = []
    # The first two share a bucket, the others have one each, of a number of bytes that is no multiple of 16, and of columns.
    weights = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(35).bfloat16(),
        "d": torch.randn(6, 8).T,
    }
    client = _Client(events)
    info = GlooTrainerInitInfo(
        master_address="127.0.0.1",
        master_port=free_port(),
        world_size=2,
        timeout_s=10.0,
        rank=0,
        bucket_bytes=BUCKET_BYTES,
    )
    sender = GlooTrainerWeightTransferEngine.trainer_init(info, client=client, source=_Source(weights, events))
    for _ in range(2):
        for weight in weights.values():
            weight += 1
        sender.send_weights()
        assert all(torch.equal(client.received[name], weight) for name, weight in weights.items())
    assert events == ["packed", "paused", "resumed"] * 2


@pytest.mark.parametrize(("rows", "is_copied"), [(torch.randn(6, 8), False), (torch.randn(6, 8).T, True)])
def test_bytes_of_a_weight_are_copied_only_where_they_do_not_lie_in_order(rows: torch.Tensor, is_copied: bool) -> None:
    [bucket] = cut_buckets([("a", rows.dtype, tuple(rows.shape))], BUCKET_BYTES)
    sent = bytes_of(bucket, iter([("a", rows)]))
    assert torch.equal(sent.view(rows.dtype).view(rows.shape), rows)
    assert (sent.data_ptr() != rows.data_ptr()) is is_copied
