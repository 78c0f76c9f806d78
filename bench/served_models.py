"""Engines that take what is published of model after model, all in one actor, since importing vLLM takes longer than a tiny engine's start.

Promise: weights go through the learner's own publisher and vLLM's weight-transfer API, as in a run; what is left out is the run around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from actors.vllm_rollout import VLLMRollout
from maspo_ray.config import LoraConfig, ModelConfig, PlacementConfig, RolloutConfig
from maspo_ray.experience import Completion, Sampling

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 6, 14
"""Longer together than the windows of `tiny_models`."""


class Engines(VLLMRollout):
    """An actor that holds one engine after the other."""

    def __init__(self) -> None:
        pass

    async def open(self, model: ModelConfig) -> None:
        rollout = RolloutConfig(kv_cache_gib=0.06, max_concurrent_requests=16)
        super().__init__(model=model, rollout=rollout, max_model_tokens=64, threads=1, seed=0)
        await self.setup()

    async def close(self) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        await self.shutdown()
        cleanup_dist_env_and_memory()


@contextmanager
def engines() -> Iterator[Callable[[], Any]]:
    """Yields what starts an `Engines` and returns its handle, on a Ray of its own."""
    import ray

    from maspo_ray.fleet.environment import import_path
    from maspo_ray.fleet.ray_session import connected

    with connected(PlacementConfig(object_store_gib=0.2)):
        environment = {"env_vars": {"PYTHONPATH": import_path(), "OMP_NUM_THREADS": "1"}}
        actor: Any = ray.remote(Engines).options(num_cpus=1, max_concurrency=100, runtime_env=environment)
        yield actor.remote


def parity(handle: Any, config: ModelConfig) -> float:
    """Returns the largest |Δ log-prob| of sampled tokens between learner and engine, at the weights that both load, after a random step of
    all weights, and after one of LoRA adapters, each published as the learner does."""
    import ray
    import torch

    from actors.lora import adapters_of
    from actors.token_model import load_token_model

    ray.get(handle.open.remote(config))
    try:
        torch.manual_seed(0)
        model = load_token_model(config)
        found = [_difference(handle, model, version=0)]
        with torch.no_grad():
            for parameter in model.model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
        _publish(handle, model, version=1)
        found.append(_difference(handle, model, version=1))
        adapted = load_token_model(config, LoraConfig(rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in adapters_of(adapted.model).items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        _publish(handle, adapted, version=2)
        found.append(_difference(handle, adapted, version=2))
    finally:
        ray.get(handle.close.remote())
    return max(found)


def _publish(handle: Any, model: Any, version: int) -> None:
    import ray

    from actors.deepspeed_engine import EngineWeights
    from actors.weight_source import EngineWeightSource
    from maspo_ray.weight_sync.publisher import WeightPublisher

    # What `EngineWeights` asks a DeepSpeed engine for.
    of_one_rank: Any = SimpleNamespace(module=model, zero_optimization_partition_weights=lambda: False)
    source = EngineWeightSource(EngineWeights(of_one_rank))
    publisher = WeightPublisher(source, "gloo", 0, ray.util.get_node_ip_address(), 30.0)
    publisher.connect((0,), [handle], 1)
    publisher.publish(version, (0,))
    publisher.shutdown()


def _difference(handle: Any, model: Any, version: int) -> float:
    """Returns the largest |Δ log-prob| of completions that the engine samples by a version's weights."""
    import ray
    import torch

    from actors.token_model import completion_logprobs

    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, _PROMPT_TOKENS).astype(np.int32) for _ in range(_PROMPTS)]
    sampling = Sampling(1.0, _NEW_TOKENS)
    completions: list[Completion] = ray.get(
        [handle.sample.remote(ids, sampling=sampling, seed=i, cache_key=str(version)) for i, ids in enumerate(prompts)]
    )
    bundles = [(ids, [completion.token_ids]) for ids, completion in zip(prompts, completions, strict=True)]
    scored = completion_logprobs(model, bundles, 1.0, torch.device("cpu"), 4096)
    return max(float(np.abs(a - b.logprobs).max()) for a, b in zip(scored, completions, strict=True))
