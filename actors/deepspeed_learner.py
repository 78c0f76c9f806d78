"""Learner actor: one rank of a DeepSpeed engine that applies the objective.

Promise: the step's gradient is that of Σ loss / Σ tokens over the whole batch, however it is cut into micro-batches and ranks; a
step whose loss is not finite is not applied.
"""

import math
import os
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig
from maspo_ray.errors import RunError
from maspo_ray.experience import Completion
from maspo_ray.packing import RankPlan
from maspo_ray.weight_sync import Backend


class DeepSpeedLearner:
    """One rank. See `maspo_ray.protocols.LearnerActor`."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        learner: LearnerConfig,
        objective: ObjectiveConfig,
        kl: KLConfig,
        temperature: float,
        total_steps: int,
        rank: int,
        world_size: int,
        threads: int,
        seed: int,
    ) -> None:
        self._model_config = model
        self._config = learner
        self._objective = objective
        self._kl = kl
        self._temperature = temperature
        self._total_steps = total_steps
        self._rank = rank
        self._world_size = world_size
        self._threads = threads
        self._seed = seed
        self._publisher: Any = None

    def rendezvous(self) -> tuple[str, int]:
        import ray

        from maspo_ray.weight_sync.publisher import free_port

        return ray.util.get_node_ip_address(), free_port()

    def setup(self, master_address: str, master_port: int) -> None:
        import ray

        self._address = ray.util.get_node_ip_address()
        os.environ.update(
            {
                "RANK": str(self._rank),
                "WORLD_SIZE": str(self._world_size),
                # Ray shows each actor its own GPUs only, so that every rank is the first of its process.
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": master_address,
                "MASTER_PORT": str(master_port),
                "TOKENIZERS_PARALLELISM": "false",
                "DS_ACCELERATOR": "cuda" if self._config.gpus > 0 else "cpu",
            }
        )
        import torch

        from actors.deepspeed_engine import EngineWeights, device_of, init_process_group, interface_of, start_engine
        from actors.token_model import load_token_model

        if (interface := interface_of(self._address)) is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        torch.set_num_threads(self._threads)
        torch.manual_seed(self._seed)
        init_process_group(self._config.gpus)
        self._engine = start_engine(
            load_token_model(self._model_config), self._config, self._model_config, self._total_steps
        )
        self._weights = EngineWeights(self._engine)
        self._device = device_of()

    def train_step(self, plan: RankPlan, *payloads: Any) -> dict[str, float]:
        from actors.learner_metrics import StepSums

        started = perf_counter()
        self._engine.train()
        sums = StepSums(self._device)
        for rows in plan.micro_batches:
            loss = self._micro_batch_loss(plan, rows, payloads, sums)
            # DeepSpeed averages gradients over the ranks; the shares are to be added up.
            self._engine.backward(loss * (self._world_size / plan.batch_tokens), scale_wrt_gas=False)
        metrics = sums.reduce(plan.batch_tokens)
        if not math.isfinite(metrics["loss"]):
            raise RunError(
                f"the loss is {metrics['loss']}; the step was not applied. Lower learner.lr or see the ratios."
            )
        metrics["learner/lr"] = float(self._engine.get_lr()[0])
        self._engine.step()
        if (norm := self._engine.get_global_grad_norm()) is not None:
            metrics["learner/grad_norm"] = float(norm)
        metrics["time/train_s"] = perf_counter() - started
        return metrics

    def _micro_batch_loss(self, plan: RankPlan, rows: tuple[int, ...], payloads: tuple[Any, ...], sums: Any) -> Any:
        """Returns Σ over the completion tokens of the micro-batch; 0 with a gradient where it has no rows."""
        import torch

        from maspo_ray.objectives import policy_loss
        from maspo_ray.tensor_ops import kl_estimate, masked_sum

        items = [plan.items[row] for row in rows]
        completions: list[Completion] = [payloads[payload][i] for payload, i in (item.completion for item in items)]
        if not items:
            # The rank still takes part in the collectives of forward and backward: any tokens will do, with weight 0.
            return self._forward([(np.zeros(1, np.int32), np.zeros(1, np.int32))])[0].sum() * 0.0
        batch = [(payloads[item.prompt].token_ids, c.token_ids) for item, c in zip(items, completions, strict=True)]
        logprobs, entropy = self._forward(batch)
        old_logprobs = self._tokens([c.logprobs for c in completions])
        counts = torch.tensor([item.num_tokens for item in items], device=self._device)
        advantages = torch.tensor([item.advantage for item in items], device=self._device).repeat_interleave(counts)
        mask = torch.ones_like(advantages, dtype=torch.bool)
        policy = policy_loss(logprobs, old_logprobs, advantages, self._objective)
        loss = masked_sum(policy.token_loss, mask)
        sums.add_objective(policy, advantages, mask, loss, entropy)
        if self._kl.coef > 0:
            reference = self._tokens([payloads[ref[0]][ref[1]] for ref in (item.reference for item in items) if ref])
            divergence = masked_sum(kl_estimate(logprobs, reference, self._kl.estimator), mask)
            sums.add_kl(divergence, self._kl.coef)
            loss = loss + self._kl.coef * divergence
        return loss

    def _forward(self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> tuple[Any, Any]:
        from actors.token_model import pad_sequences

        batch = pad_sequences(pairs, self._device)
        return self._engine(batch.input_ids, batch.attention_mask, batch.completion_mask, self._temperature)

    def _tokens(self, arrays: Sequence[NDArray[np.float32]]) -> Any:
        import torch

        return torch.from_numpy(np.concatenate(arrays)).to(self._device)

    def completion_logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]:
        from actors.token_model import sequence_logprobs

        self._engine.eval()
        return sequence_logprobs(self._engine, pairs, self._temperature, self._device)

    def connect(
        self, rollout_handles: Sequence[Any], workers_per_engine: int, backend: Backend, timeout_s: float
    ) -> None:
        from maspo_ray.weight_sync.publisher import RolloutClient, WeightPublisher

        client = RolloutClient(rollout_handles, workers_per_engine, timeout_s)
        self._publisher = WeightPublisher(self._weights, client, backend, self._rank, self._address, timeout_s)

    def publish(self, version: int) -> dict[str, float]:
        started = perf_counter()
        self._publisher.publish(version)
        return {"time/publish_s": perf_counter() - started}

    def save(self, folder: str) -> None:
        from transformers import AutoTokenizer

        state = {name: weight.cpu().clone() for name, weight in self._weights}
        if self._rank == 0:
            self._engine.module.model.save_pretrained(folder, state_dict=state)
            AutoTokenizer.from_pretrained(self._model_config.path).save_pretrained(folder)

    def shutdown(self) -> None:
        if self._publisher is not None:
            self._publisher.shutdown()
