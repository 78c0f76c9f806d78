"""A DeepSpeed engine over a `TokenModel`: its configuration, start, update, saved state and weights.

Promise: every micro-batch's backward pass adds to the gradient, and the caller alone says when to apply it (`apply_update`); the gradient
applied is the mean of the ranks' gradients.
"""

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from actors.checkpoint_names import Piece, Shape, pieces_of
from actors.lora import Weight, adapters_of, weights_of
from actors.token_model import TokenModel
from maspo_ray.config import LearnerConfig, ModelConfig
from maspo_ray.errors import RunError
from maspo_ray.zero_stage import zero_stage_of


def deepspeed_config(learner: LearnerConfig, model: ModelConfig, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration, `learner.deepspeed` included."""
    stage = zero_stage_of(learner, model, world_size)
    return {
        # Gradients of micro-batches and ranks are summed in float32, whatever the parameters' dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Keeps PyTorch's optimizer when it is offloaded: DeepSpeed's own would need a compiler.
        "zero_force_ds_cpu_optimizer": False,
        **learner.deepspeed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # The number of micro-batches varies, so that `step()` ends an update, not a count of backward passes.
        "managed_gradient_accumulation": False,
        # Without ZeRO, `apply_update` clips, since it computes the norm anyhow.
        "gradient_clipping": learner.max_grad_norm if stage > 0 else 0.0,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {**learner.deepspeed.get("zero_optimization", {}), "stage": stage},
    }


def init_process_group(gpus: float) -> None:
    """Joins torch.distributed through DeepSpeed, by the rendezvous in the environment."""
    if gpus == 0:
        # DeepSpeed 0.19 would compile an all-reduce for inference here, which takes 39 s and a compiler, and which training never calls.
        # Can go when DeepSpeed builds it at its first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if gpus > 0 else "gloo", verbose=False)


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface with this IPv4 address, None where no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    return None


def learning_rate_schedule(optimizer: torch.optim.Optimizer, learner: LearnerConfig, total_updates: int) -> LRScheduler:
    """Returns the learning rate's schedule over `total_updates` updates: a rise in `warmup_steps`, then `schedule`; never 0."""
    warmup = learner.warmup_steps * learner.updates_per_batch
    name = "constant_with_warmup" if learner.schedule == "constant" else learner.schedule
    schedule: LRScheduler = get_scheduler(name, optimizer, warmup, total_updates + 1)
    # transformers' schedules begin and end at a learning rate of 0. One step ahead, of a schedule one update longer, skips both.
    schedule.step()
    return schedule


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters as the optimizer's groups: weight decay applies to matrices, not to vectors (norms and biases)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.ndim > 1], [p for p in trainable if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def start_engine(model: TokenModel, learner: LearnerConfig, config: ModelConfig, total_updates: int) -> Any:
    """Returns the DeepSpeed engine that owns the model, its AdamW and its learning-rate schedule."""
    if learner.gradient_checkpointing:
        model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        parameter_groups(model, learner.weight_decay), lr=learner.lr, betas=learner.betas, eps=learner.eps, fused=True
    )
    schedule = learning_rate_schedule(optimizer, learner, total_updates)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(learner, config, dist.get_world_size()),
        dist_init_required=False,
    )
    if engine.zero_optimization_stage() == 0:
        # `apply_update` reduces the gradient itself, which spares a single rank the copies that DeepSpeed's reduction makes.
        engine.enable_backward_allreduce = False
    if engine.zero_optimization_stage() == 3:
        # `TokenModel` reads the output layer's parameters outside that layer's own forward pass, where ZeRO-3 would not have gathered them.
        for parameter in engine.module.model.get_output_embeddings().parameters(recurse=False):
            deepspeed.zero.register_external_parameter(engine.module, parameter)
    return engine


def apply_update(engine: Any, max_grad_norm: float) -> float:
    """Clips and applies the accumulated gradient; returns its norm before clipping, infinite where it was discarded. A collective.

    A gradient whose norm is not finite is discarded and the weights stay as they are. DeepSpeed's ZeRO optimizers do so themselves; without
    ZeRO it is done here.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.inf
    if dist.get_world_size() > 1:
        engine.buffered_allreduce_fallback()
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if not norm.isfinite():
        engine.zero_grad()
        return math.inf
    if norm > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    engine.step()
    return norm.item()


def save_engine(engine: Any, folder: Path) -> None:
    """Writes the trained weights and the state of the optimizer and the schedule, each rank its own part. A collective."""
    # Frozen weights are left out, since they are those of the model's folder.
    engine.save_checkpoint(str(folder.parent), folder.name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, folder: Path) -> None:
    """Restores the state that `save_engine` wrote, from as many ranks. A collective.

    Raises:
        RunError: DeepSpeed finds no state in the folder.
    """
    strict = all(p.requires_grad for p in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder.parent), folder.name, load_module_strict=strict)
    if path is None:
        raise RunError(f"the learner's state in {folder} cannot be read. See the learner's log.")


class UpdateSize:
    """Measures how much the optimizer changes the weights, ‖Δw‖ / ‖w‖, estimated from every 101st of the weights that it updates.

    Those are the float32 copies where the model's parameters are bfloat16, in which a small change may be lost to rounding.
    """

    _STRIDE = 101

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
        self._before: list[torch.Tensor] = []
        self._sums = torch.zeros(2, dtype=torch.float64, device=device_of())
        # By hooks, since ZeRO-3 calls the optimizer once for each part of the weights.
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._note(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: self._compare(optimizer))

    def _sample(self, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.numel()]
        return [p.detach().flatten()[:: self._STRIDE] for p in parameters]

    def _note(self, optimizer: torch.optim.Optimizer) -> None:
        self._before = [sample.clone() for sample in self._sample(optimizer)]

    def _compare(self, optimizer: torch.optim.Optimizer) -> None:
        for before, after in zip(self._before, self._sample(optimizer), strict=True):
            changed = (after - before).square().sum()
            self._sums += torch.stack([changed, before.square().sum()]).to(self._sums)
        self._before = []

    def take(self) -> float:
        """Returns the ratio over all ranks of the updates since the last call; 0 where there was none. A collective."""
        dist.all_reduce(self._sums)
        changed, weights = self._sums.tolist()
        self._sums.zero_()
        return math.sqrt(changed / weights) if weights else 0.0


class EngineWeights:
    """The engine's weights, with adapters merged; under ZeRO-3, gathered only while they are read.

    Reading is a collective among the ranks. A tied weight comes once, as the embedding's.

    Attributes:
        pieces: what the checkpoint's weights are computed from, piece by piece.
    """

    def __init__(self, engine: Any) -> None:
        self._weights = weights_of(engine.module.model)
        self._adapters = adapters_of(engine.module.model)
        self._gathers = engine.zero_optimization_partition_weights()
        shapes = {name: self._shape(weight) for name, weight in self._weights.items()}
        self.pieces = pieces_of(engine.module.model, shapes)

    def _shape(self, weight: Weight) -> Shape:
        first: Any = weight.parts[0] if weight.parts else weight.value()
        return tuple(first.ds_shape if self._gathers and weight.parts else first.shape), first.dtype

    def read(self, pieces: Sequence[Piece]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights of these pieces by the checkpoint's names; under ZeRO-3 all of them are gathered at once."""
        parts = [part for piece in pieces for name in piece.sources for part in self._weights[name].parts]
        with self._whole(parts):
            for piece in pieces:
                yield from piece.convert([self._weights[name].value() for name in piece.sources]).items()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Returns CPU copies of the merged weights and of the adapters' parameters, by their names in memory, from which `save_pretrained`
        makes the checkpoint's; on other ranks than the first both are empty."""
        is_first = dist.get_rank() == 0
        if not is_first and not self._gathers:
            return {}, {}
        weights = {}
        for name, weight in self._weights.items():
            with self._whole(weight.parts):
                if is_first:
                    weights[name] = weight.value().to("cpu", copy=True)
        with self._whole(list(self._adapters.values())):
            return weights, {name: p.detach().to("cpu", copy=True) for name, p in self._adapters.items() if is_first}

    def _whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, enabled=self._gathers)
        return gathered


def device_of() -> torch.device:
    """Returns the device that DeepSpeed's accelerator gives this process."""
    return torch.device(get_accelerator().current_device_name())
