"""Learner actor: one rank of a DeepSpeed engine that applies the objective.

Promise: the step's gradient is that of Σ loss / Σ tokens over the whole batch, however it is cut into micro-batches and ranks; a
step whose loss is not finite is not applied.
"""

import math
import os
from collections.abc import Sequence
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import KLConfig, LearnerConfig, ModelConfig, ObjectiveConfig
from maspo_ray.experience import Completion, StepReport
from maspo_ray.packing import Bundle, RankPlan
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

    def train_step(self, plan: RankPlan, *payloads: Any) -> StepReport:
        from actors.deepspeed_engine import apply_step
        from actors.learner_metrics import StepSums

        started = perf_counter()
        self._engine.train()
        sums = StepSums(self._device)
        token_losses = []
        for bundles in plan.micro_batches:
            loss, token_loss = self._micro_batch_loss(bundles, payloads, sums)
            token_losses.append(token_loss)
            # DeepSpeed averages gradients over the ranks; the shares are to be added up.
            self._engine.backward(loss * (self._world_size / plan.batch_tokens), scale_wrt_gas=False)
        metrics = sums.reduce(plan.batch_tokens)
        metrics["learner/lr"] = float(self._engine.get_lr()[0])
        applied = apply_step(self._engine, math.isfinite(metrics["loss"]))
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            metrics["learner/grad_norm"] = float(norm) if applied else math.nan
        metrics["learner/skipped"] = float(not applied)
        metrics["time/train_s"] = perf_counter() - started
        return StepReport(metrics, applied, () if applied else faulty_groups(plan, token_losses))

    def _micro_batch_loss(self, bundles: Sequence[Bundle], payloads: tuple[Any, ...], sums: Any) -> tuple[Any, Any]:
        """Returns Σ over the completion tokens of the micro-batch, 0 with a gradient where it has no bundles; and its terms,
        [tokens] without a gradient."""
        import torch

        from maspo_ray.objectives import policy_loss
        from maspo_ray.tensor_ops import kl_estimate, masked_sum

        if not bundles:
            # The rank still takes part in the collectives of forward and backward: any tokens will do, with weight 0.
            loss = self._forward([(np.zeros(1, np.int32), [np.zeros(1, np.int32)])])[0].sum() * 0.0
            return loss, loss.new_zeros(0)
        items = [item for bundle in bundles for item in bundle.items]
        completions: list[Completion] = [payloads[payload][i] for payload, i in (item.completion for item in items)]
        tokens = iter([completion.token_ids for completion in completions])
        logprobs, entropy = self._forward(
            [(payloads[bundle.prompt].token_ids, list(islice(tokens, len(bundle.items)))) for bundle in bundles]
        )
        old_logprobs = self._tokens([c.logprobs for c in completions])
        counts = torch.tensor([item.num_tokens for item in items], device=self._device)
        advantages = torch.tensor([item.advantage for item in items], device=self._device).repeat_interleave(counts)
        mask = torch.ones_like(advantages, dtype=torch.bool)
        policy = policy_loss(logprobs, old_logprobs, advantages, self._objective)
        loss = masked_sum(policy.token_loss, mask)
        token_loss = policy.token_loss.detach()
        sums.add_objective(policy, advantages, mask, loss, entropy)
        if self._kl.coef > 0:
            reference = self._tokens([payloads[ref[0]][ref[1]] for ref in (item.reference for item in items) if ref])
            divergence = kl_estimate(logprobs, reference, self._kl.estimator)
            sums.add_kl(masked_sum(divergence, mask), self._kl.coef)
            loss = loss + self._kl.coef * masked_sum(divergence, mask)
            token_loss = token_loss + self._kl.coef * divergence.detach()
        return loss, token_loss

    def _forward(self, bundles: Sequence[tuple[NDArray[np.int32], Sequence[NDArray[np.int32]]]]) -> tuple[Any, Any]:
        from actors.token_batch import lay_out

        return self._engine(lay_out(bundles, self._device), self._temperature)

    def _tokens(self, arrays: Sequence[NDArray[np.float32]]) -> Any:
        import torch

        return torch.from_numpy(np.concatenate(arrays)).to(self._device)

    def shares_prompts(self) -> bool:
        return self._engine.module.shares_prompts

    def completion_logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]:
        from actors.token_model import completion_logprobs

        self._engine.eval()
        bundles = [(prompt, [completion]) for prompt, completion in pairs]
        return completion_logprobs(self._engine, bundles, self._temperature, self._device)

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


def faulty_groups(plan: RankPlan, token_losses: Sequence[Any]) -> tuple[int, ...]:
    """Returns the ids of the groups, of all ranks, with a loss that is not finite. A collective.

    Args:
        token_losses: of each micro-batch of the plan, [tokens].
    """
    import torch.distributed as dist

    own = set()
    for bundles, losses in zip(plan.micro_batches, token_losses, strict=True):
        sizes = [sum(item.num_tokens for item in bundle.items) for bundle in bundles]
        parts = losses.split(sizes) if bundles else ()
        own |= {b.group_id for b, part in zip(bundles, parts, strict=True) if not part.isfinite().all()}
    gathered: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return tuple(sorted(set().union(*gathered)))
