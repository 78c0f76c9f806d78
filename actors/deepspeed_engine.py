"""A DeepSpeed engine over a `TokenModel`: its configuration, its start, its weights as a stream.

Promise: every micro-batch adds to the gradient and the caller alone says when a step ends; the sum over ranks is the gradient of
the loss that the ranks' shares add up to.
"""

import socket
from collections.abc import Iterator
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.token_model import TokenModel
from maspo_ray.config import LearnerConfig, ModelConfig


def deepspeed_config(learner: LearnerConfig, model: ModelConfig) -> dict[str, Any]:
    """Returns DeepSpeed's configuration; `learner.deepspeed` adds to it."""
    return {
        **learner.deepspeed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Micro-batches vary in number: `step()` ends a step, not a count of backward passes.
        "managed_gradient_accumulation": False,
        "gradient_clipping": learner.max_grad_norm,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {**learner.deepspeed.get("zero_optimization", {}), "stage": learner.zero_stage},
    }


def init_process_group(gpus: float) -> None:
    """Joins torch.distributed through DeepSpeed, by the rendezvous in the environment."""
    if gpus == 0:
        # DeepSpeed 0.19 compiles an all-reduce for inference here (39 s, and a compiler must be there), which training
        # never calls. Can go when its build waits for the first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if gpus > 0 else "gloo", verbose=False)


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface that has an IPv4 address, None where none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return None


def learning_rate_schedule(optimizer: torch.optim.Optimizer, learner: LearnerConfig, total_updates: int) -> LRScheduler:
    """Returns the schedule of so many updates: up from the first in `warmup_steps`, then as `schedule` says, never 0."""
    warmup = learner.warmup_steps * learner.updates_per_batch
    name = "constant_with_warmup" if learner.schedule == "constant" else learner.schedule
    schedule: LRScheduler = get_scheduler(name, optimizer, warmup, total_updates + 1)
    # transformers' begins and ends with a learning rate of 0: one ahead, and one update more, leave both out.
    schedule.step()
    return schedule


def start_engine(model: TokenModel, learner: LearnerConfig, config: ModelConfig, total_updates: int) -> Any:
    """Returns the DeepSpeed engine that owns the model, its AdamW and its learning-rate schedule."""
    if learner.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learner.lr,
        betas=learner.betas,
        eps=learner.eps,
        weight_decay=learner.weight_decay,
        fused=True,
    )
    schedule = learning_rate_schedule(optimizer, learner, total_updates)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(learner, config),
        dist_init_required=False,
    )
    if learner.zero_stage == 3:
        # The output layer's weight is read outside its own module's forward.
        deepspeed.zero.register_external_parameter(engine.module, engine.module.model.get_output_embeddings().weight)
    return engine


def apply_update(engine: Any) -> bool:
    """Applies the gradient that has been gathered; returns whether the weights changed. A collective.

    A gradient that is not finite is discarded: by DeepSpeed, whose ZeRO and bfloat16 optimizers look at its norm, and here where
    neither is in use.
    """
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().float()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite.item():
            engine.zero_grad()
            return False
    engine.step()
    return bool(engine.was_step_applied())


class EngineWeights(WeightSource):
    """The engine's parameters under their Hugging Face names; under ZeRO-3, gathered one layer at a time.

    Iterating is a collective among the ranks. Tied parameters come once, as the embedding.
    """

    def __init__(self, engine: Any) -> None:
        self._parameters = dict(engine.module.model.named_parameters())
        self._gathers = engine.zero_optimization_partition_weights()

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, p.dtype, tuple(p.ds_shape if self._gathers else p.shape))
            for name, p in self._parameters.items()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names in self.groups():
            parameters = [self._parameters[name] for name in names]
            with deepspeed.zero.GatheredParameters(parameters, enabled=self._gathers):
                for name, parameter in zip(names, parameters, strict=True):
                    yield name, parameter.detach()


def device_of() -> torch.device:
    """Returns the device that DeepSpeed's accelerator gives this process."""
    return torch.device(get_accelerator().current_device_name())
