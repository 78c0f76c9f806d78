"""Rollout actor on vLLM's `AsyncLLM`: token ids in, token ids and behaviour log-probs out.

Promise: every token comes with its log-prob at the sampling temperature, which is what the learner computes, also where only a part of the
policy is sampled from (`top_p` and the like); and with the weight version that sampled it. Both are stamped by the engine. Weights change
in flight: what is running goes on under the new ones.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.completion_text import CompletionText
from actors.vllm_keys import check_engine_keys
from maspo_ray.config import ModelConfig, RolloutConfig
from maspo_ray.experience import Completion, Sampling, VersionSpan
from maspo_ray.weight_sync import backend_for

_BATCHED_TOKENS = 2048
"""Tokens that vLLM 0.32 computes at once by default (`SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS`)."""


def engine_arguments(model: ModelConfig, rollout: RolloutConfig, max_model_tokens: int, seed: int) -> dict[str, Any]:
    """Returns the keyword arguments of vLLM's `AsyncEngineArgs`; `rollout.engine` has the last word."""
    arguments: dict[str, Any] = {
        "model": model.path,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "seed": seed,
        "max_model_len": max_model_tokens,
        "max_num_seqs": rollout.max_concurrent_requests,
        # What the learner can match: the distribution after the temperature, before tokens are taken from it. Where none are, vLLM's own
        # processed log-probs are just that; else its raw ones, which `LogprobTemperature` brings to the temperature.
        "logprobs_mode": "raw_logprobs" if rollout.reshaping else "processed_logprobs",
        # The model folder's own sampling defaults (top_p and the like) would change the behaviour policy unseen.
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": backend_for(rollout.gpus)},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if rollout.gpus > 0:
        arguments["worker_extension_cls"] = "actors.vllm_worker.GpuWorkerExtension"
        arguments["tensor_parallel_size"] = max(1, int(rollout.gpus))
        if rollout.gpus > 1:
            # In a placement group vLLM would otherwise ask Ray for GPUs of its own, which this actor already holds.
            arguments["distributed_executor_backend"] = "mp"
    else:
        # Importing it registers the gloo backend in the engine's process.
        arguments["worker_extension_cls"] = "actors.vllm_worker.CpuWorkerExtension"
        arguments["kv_cache_memory_bytes"] = int(rollout.kv_cache_gib * 2**30)
        arguments["enforce_eager"] = True
        # vLLM's CPU default is 128: the samples of a prompt share whole blocks of it, and most prompts here are shorter.
        arguments["block_size"] = 32
    if rollout.max_concurrent_requests > _BATCHED_TOKENS:
        # It computes at least a token of each request at once, and refuses less.
        arguments["max_num_batched_tokens"] = rollout.max_concurrent_requests
    return {**arguments, **rollout.engine}


def cpu_environment(threads: int) -> dict[str, str]:
    """Returns the environment that vLLM's CPU engine needs before it is imported."""
    return {
        # The default reserves a core of the machine for itself; the plan has already shared them out.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def completion_of(output: Any, reader: CompletionText) -> Completion:
    """Returns vLLM's `CompletionOutput` as a completion."""
    # Missing would otherwise read as log-prob 0, which is probability 1.
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids), "a token has no log-prob"
    assert output.weight_versions, "the engine stamped no weight version"
    logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Completion(
        token_ids=np.asarray(output.token_ids, dtype=np.int32),
        logprobs=np.asarray(logprobs, dtype=np.float32),
        spans=tuple(VersionSpan(int(stamp.version), stamp.start, stamp.end) for stamp in output.weight_versions),
        finish_reason=str(output.finish_reason),
        text=reader.of(output.token_ids, output.text, output.finish_reason == "stop"),
    )


class VLLMRollout:
    """One engine. See `maspo_ray.protocols.RolloutEngine`."""

    def __init__(
        self, *, model: ModelConfig, rollout: RolloutConfig, max_model_tokens: int, threads: int, seed: int
    ) -> None:
        self._model = model
        self._rollout = rollout
        self._max_model_tokens = max_model_tokens
        self._threads = threads
        self._seed = seed
        self._num_requests = 0

    @staticmethod
    def check_config(rollout: RolloutConfig) -> None:
        check_engine_keys(rollout)

    async def setup(self) -> None:
        os.environ.update({"TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"})
        if self._rollout.gpus == 0:
            os.environ.update(cpu_environment(self._threads))
        rescored = self._rollout.reshaping and self._rollout.temperature != 1
        if rescored:
            # The sampler that `score_at_temperature` changes is that of vLLM 0.32's first model runner.
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._model, self._rollout, self._max_model_tokens, self._seed)
        transfer = WeightTransferConfig(**arguments.pop("weight_transfer_config"))
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, weight_transfer_config=transfer))
        self._reader = CompletionText(self._engine.get_tokenizer(), self._engine.model_config.get_vocab_size())
        await self._engine.update_weight_version("0")
        if rescored:
            await self._engine.collective_rpc("score_at_temperature", args=(self._rollout.temperature,))

    async def sample(
        self, token_ids: NDArray[np.int32], *, sampling: Sampling, seed: int | None, cache_key: str
    ) -> Completion:
        from vllm.inputs import TokensPrompt

        self._num_requests += 1
        parameters = self._parameters(sampling, seed)
        # A request that runs through an update keeps its cached blocks, computed under the older weights; the salt keeps requests that
        # begin under the newer ones from sharing them.
        inputs = TokensPrompt(prompt_token_ids=token_ids.tolist(), cache_salt=cache_key)
        # Cancelled, the request is aborted in the engine.
        outputs = [output async for output in self._engine.generate(inputs, parameters, str(self._num_requests))]
        assert outputs and outputs[-1].finished, "the engine ended a request without its last output"
        return completion_of(outputs[-1].outputs[0], self._reader)

    def _parameters(self, sampling: Sampling, seed: int | None) -> Any:
        """Returns vLLM's sampling parameters of one completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            min_p=sampling.min_p,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            # What is trained on and what the reward reads are the same: the tokens hold what ended the completion.
            include_stop_str_in_output=bool(sampling.stop or sampling.stop_token_ids),
            seed=seed,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def check(self) -> None:
        await self._engine.check_health()
        # Answered by the engine's own process, which holds the transfer group.
        await self._engine.is_paused()

    async def weight_checksum(self) -> str | None:
        checksums: list[str] = await self._engine.collective_rpc("weight_checksum")
        return " ".join(checksums)

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def stage_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.collective_rpc("stage_weights", args=(update_info,))

    async def start_weight_update(self) -> None:
        # Clearing the cache would take the blocks of what is running too, and compute them all again.
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, weight_version: int) -> None:
        await self._engine.finish_weight_update(weight_version=str(weight_version))
        await self._engine.resume_generation()

    async def shutdown(self) -> None:
        self._engine.shutdown()
