"""What a weight update costs the engine that generates meanwhile: on SmolLM2 (`make smollm2` makes the model), over Gloo.

    python -m bench.weight_sync

bandwidth_over_gloo    bytes/s that an engine without requests receives, packing included / a bare Gloo broadcast of the same
                       buckets between two processes
busy_bandwidth_over_gloo  the same of an engine that generates meanwhile, which takes a core of its own
stall_s_p50, _p95      from the pause to the first token after it, of a request that runs through the update
stall_over_copy        the median stall / the time of copying the same bytes in memory once
stall_over_first       the median stall / that of this project's first version, which packed within the pause and let the engine
                       compute all running requests again

Each ratio is of things done in turn, in one run; the least and the most stand beside it.
"""

import argparse
import asyncio
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer import ModuleSource
from vllm.distributed.weight_transfer.base import ParamMeta

from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import ModelConfig, PlacementConfig, RolloutConfig
from maspo_ray.experience import Sampling
from maspo_ray.fleet.environment import CPU_ALLOCATOR
from maspo_ray.fleet.ray_session import connected
from maspo_ray.weight_sync import free_port
from maspo_ray.weight_sync.buckets import cut_buckets
from maspo_ray.weight_sync.gloo_engine import (
    BUCKET_BYTES,
    Buffers,
    GlooUpdateInfo,
    GlooWorkerExtension,
    join_group,
    start_broadcast,
)
from maspo_ray.weight_sync.gloo_trainer import (
    GlooTrainerInitInfo,
    GlooTrainerWeightTransferEngine,
    fill_bucket,
    run_both,
)
from maspo_ray.weight_sync.publisher import RolloutClient

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 16, 40, 400
TIMEOUT_S = 120.0
FIRST_BUCKET_BYTES = 64 * 2**20


class ProbedWorker(GlooWorkerExtension):
    _kept: ClassVar = {False: (BUCKET_BYTES, Buffers()), True: (FIRST_BUCKET_BYTES, Buffers())}

    def as_first_version(self, first: bool) -> None:
        self.weight_transfer_engine._bucket_bytes, self.weight_transfer_engine._buffers = self._kept[first]

    def wait_until_received(self) -> None:
        for _, _, work in self.weight_transfer_engine._staged:
            work.wait()


class ProbedClient(RolloutClient):
    def wait_until_received(self) -> None:
        ray.get([handle.wait_until_received.remote() for handle in self._handles])


class ProbedRollout(VLLMRollout):
    """An engine that notes when it was paused, when the transfer ended, and when a request's tokens came."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tokens_at: list[float] = []
        self._paused_at = self._resumed_at = 0.0
        self._first = False

    async def probe(self, token_ids: Any) -> None:
        """Runs a request that gives its tokens as they come, until it ends."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        self._num_requests += 1
        request_id = str(self._num_requests)
        async for _ in self._engine.generate(TokensPrompt(prompt_token_ids=token_ids), parameters, request_id):
            self._tokens_at.append(perf_counter())

    async def as_first_version(self, first: bool) -> None:
        self._first = first
        await self._engine.collective_rpc("as_first_version", args=(first,))

    async def start_weight_update(self) -> None:
        self._paused_at = perf_counter()
        await super().start_weight_update()

    async def wait_until_received(self) -> None:
        await self._engine.collective_rpc("wait_until_received")

    async def finish_weight_update(self, weight_version: int) -> None:
        if self._first:
            await self._engine.reset_prefix_cache(reset_running_requests=True)
        await super().finish_weight_update(weight_version)
        self._resumed_at = perf_counter()

    async def stall(self) -> float:
        """Returns the seconds from the last pause to the first token after it."""
        later = [at for at in self._tokens_at if at > self._resumed_at]
        assert later, "no token came after the update: raise NEW_TOKENS"
        return later[0] - self._paused_at

    async def rest(self) -> None:
        """Returns when the engine has nothing to do."""
        while self._engine.output_processor.has_unfinished_requests():
            await asyncio.sleep(0.1)


class ProbedSender(GlooTrainerWeightTransferEngine):
    """The sender, which takes down the seconds until all bytes have arrived, and can send as the first version did: one bucket is
    packed while the one before is under way, all within the pause."""

    transferred_s = 0.0
    as_first_version = False

    def _transfer(self, info: GlooUpdateInfo, meta: list[ParamMeta]) -> None:
        assert isinstance(self.client, ProbedClient)
        started = perf_counter()
        super()._transfer(info, meta)
        self.client.wait_until_received()
        self.transferred_s = perf_counter() - started

    def send_weights(self) -> None:
        if not self.as_first_version:
            super().send_weights()
            return
        assert self.source is not None
        meta = self.source.metadata()
        info = asdict(update_info(meta))

        def take_up() -> None:
            self.client.stage_weights(info)
            self.client.update_weights(info)

        self.client.start_weight_update()
        run_both(take_up, lambda: self._stream(meta))
        self.client.finish_weight_update()

    def _stream(self, meta: list[ParamMeta]) -> None:
        assert self._group is not None and self.source is not None
        weights = iter(self.source)
        sending: Any = None
        for bucket in cut_buckets(((m.name, m.dtype, m.shape) for m in meta), FIRST_BUCKET_BYTES):
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8)
            fill_bucket(bucket, buffer, weights)
            if sending is not None:
                sending[1].wait()
            sending = (buffer, start_broadcast(self._group, buffer))
        sending[1].wait()


def update_info(meta: Sequence[ParamMeta]) -> GlooUpdateInfo:
    return GlooUpdateInfo(
        names=[m.name for m in meta],
        dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
        shapes=[list(m.shape) for m in meta],
    )


class Receiver:
    """The other end of a bare broadcast."""

    def join(self, address: str, port: int, sizes: Sequence[int]) -> None:
        self._buffers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        self._group = join_group(address, port, 1, 2, TIMEOUT_S)

    def receive(self) -> None:
        for work in [start_broadcast(self._group, buffer) for buffer in self._buffers]:
            work.wait()


def bare_broadcast(sizes: Sequence[int]) -> Callable[[], float]:
    """Returns what sends buckets of such sizes to another process, and returns the seconds."""
    receiver: Any = ray.remote(Receiver).options(num_cpus=0.1).remote()
    address, port = ray.util.get_node_ip_address(), free_port()
    joined = receiver.join.remote(address, port, sizes)
    group = join_group(address, port, 0, 2, TIMEOUT_S)
    ray.get(joined)
    buffers = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def send() -> float:
        started = perf_counter()
        received = receiver.receive.remote()
        for work in [start_broadcast(group, buffer) for buffer in buffers]:
            work.wait()
        ray.get(received)
        return perf_counter() - started

    return send


def copy_seconds(num_bytes: int) -> float:
    source, target = torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes, dtype=torch.uint8)
    started = perf_counter()
    target.copy_(source)
    return perf_counter() - started


def start_engine(model: str, dtype: Any) -> Any:
    engine: Any = (
        ray.remote(ProbedRollout)
        # As in a run.
        .options(num_cpus=1, max_concurrency=200, runtime_env={"env_vars": CPU_ALLOCATOR})
        .remote(
            model=ModelConfig(path=model, dtype=dtype),
            # Not validated: a run's config may not name another worker.
            rollout=RolloutConfig().model_copy(
                update={
                    "kv_cache_gib": 1.0,
                    "max_concurrent_requests": REQUESTS + 1,
                    "engine": {"worker_extension_cls": "bench.weight_sync.ProbedWorker"},
                }
            ),
            max_model_tokens=PROMPT_TOKENS + NEW_TOKENS,
            threads=1,
            seed=0,
        )
    )
    ray.get(engine.setup.remote())
    return engine


def measure(model_path: str, dtype: Any, repeats: int) -> dict[str, Any]:
    engine = start_engine(model_path, dtype)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    meta = ModuleSource(model).metadata()
    client = ProbedClient([0], [engine], 1, TIMEOUT_S)

    sender = ProbedSender.trainer_init(
        GlooTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=free_port(),
            world_size=2,
            timeout_s=TIMEOUT_S,
            rank=0,
        ),
        client=client,
        source=ModuleSource(model),
    )
    sizes = [bucket.num_bytes for bucket in cut_buckets(((m.name, m.dtype, m.shape) for m in meta), BUCKET_BYTES)]
    weight_bytes = sum(sizes)
    bare = bare_broadcast(sizes)

    def send(as_first_version: bool) -> None:
        client.version += 1
        ray.get(engine.as_first_version.remote(as_first_version))
        sender.as_first_version = as_first_version
        sender.send_weights()

    def stall(as_first_version: bool) -> float:
        """Returns the stall of an update while requests run."""
        token_ids, sampling = np.arange(10, 10 + PROMPT_TOKENS, dtype=np.int32), Sampling(1.0, NEW_TOKENS // 2)
        running = [
            engine.sample.remote(token_ids, sampling=sampling, seed=None, cache_key="bench") for _ in range(REQUESTS)
        ]
        probed = engine.probe.remote(token_ids.tolist())
        # Past their prompts.
        ray.wait([probed], timeout=3.0)
        send(as_first_version)
        ray.wait([probed], timeout=3.0)
        stalled: float = ray.get(engine.stall.remote())
        for call in (*running, probed):
            ray.cancel(call)
        ray.get(engine.rest.remote())
        return stalled

    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        row = {"stall": stall(False), "busy": sender.transferred_s, "first": stall(True)}
        send(False)
        rows.append(row | {"transfer": sender.transferred_s, "bare": bare(), "copy": copy_seconds(weight_bytes)})
    return {"weight_bytes": weight_bytes, "rows": rows[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/smollm2/model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["PYTHONPATH"] = os.getcwd()
    with connected(PlacementConfig(object_store_gib=0.2)):
        found = measure(options.model, options.dtype, options.repeats)
    rows = found["rows"]
    ratios = {
        "bandwidth_over_gloo": [row["bare"] / row["transfer"] for row in rows],
        "busy_bandwidth_over_gloo": [row["bare"] / row["busy"] for row in rows],
        "stall_over_copy": [row["stall"] / row["copy"] for row in rows],
        "stall_over_first": [row["stall"] / row["first"] for row in rows],
    }
    stalls = sorted(row["stall"] for row in rows)
    figures = {name: statistics.median(values) for name, values in ratios.items()}
    spread = {name: [min(values), max(values)] for name, values in ratios.items()}
    seconds = {"stall_s_p50": statistics.median(stalls), "stall_s_p95": float(np.quantile(stalls, 0.95))}
    print(f"{found['weight_bytes'] / 1e6:.0f} MB in {options.dtype}, {REQUESTS} requests running, {len(rows)} updates")
    for name, value in (figures | seconds).items():
        low, high = spread.get(name, (stalls[0], stalls[-1]))
        print(f"{name:24s} {value:8.3f}  ({low:.3f} to {high:.3f})")
    for name in ("transfer", "busy", "bare", "copy", "first"):
        print(f"{name + '_s':24s} {statistics.median(row[name] for row in rows):8.3f}")
    print(json.dumps({"bench": "weight_sync", "dtype": options.dtype, **figures, **seconds, "spread": spread}))


if __name__ == "__main__":
    main()
