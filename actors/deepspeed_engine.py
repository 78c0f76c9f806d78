"""A DeepSpeed engine over a `TokenModel`: its configuration, its start, its weights as a stream.

Promise: every micro-batch adds to the gradient and the caller alone says when a step ends; the sum over ranks is the gradient of
the loss that the ranks' shares add up to.
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

from actors.lora import Weight, adapters_of, weights_of
from actors.token_model import TokenModel
from maspo_ray.config import LearnerConfig, ModelConfig
from maspo_ray.errors import RunError


def zero_stage_of(learner: LearnerConfig, model: ModelConfig, world_size: int) -> int:
    """Returns the ZeRO stage: what the config says, or 1 where there is something to shard or to keep in float32, else 0."""
    if learner.zero_stage is not None:
        return learner.zero_stage
    plain = world_size == 1 and model.dtype == "float32" and "zero_optimization" not in learner.deepspeed
    return 0 if plain else 1


def deepspeed_config(learner: LearnerConfig, model: ModelConfig, world_size: int) -> dict[str, Any]:
    """Returns DeepSpeed's configuration; `learner.deepspeed` adds to it."""
    stage = zero_stage_of(learner, model, world_size)
    return {
        # Micro-batches and ranks are added up in float32, whatever the parameters' dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # An optimizer that is offloaded stays PyTorch's: DeepSpeed's own needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
        **learner.deepspeed,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Micro-batches vary in number: `step()` ends a step, not a count of backward passes.
        "managed_gradient_accumulation": False,
        # Without ZeRO `apply_update` has the norm already and clips by it.
        "gradient_clipping": learner.max_grad_norm if stage > 0 else 0.0,
        "bf16": {"enabled": model.dtype == "bfloat16"},
        "zero_optimization": {**learner.deepspeed.get("zero_optimization", {}), "stage": stage},
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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters as the optimizer's groups: norms and biases, which are vectors, do not decay."""
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
        # Reduced in `apply_update`, and not copied for it where there is a single rank.
        engine.enable_backward_allreduce = False
    if engine.zero_optimization_stage() == 3:
        # The output layer's weight is read outside its own module's forward.
        deepspeed.zero.register_external_parameter(engine.module, engine.module.model.get_output_embeddings().weight)
    return engine


def apply_update(engine: Any, max_grad_norm: float) -> float:
    """Applies the gradient that has been gathered, clipped; returns its norm before. A collective.

    A gradient whose norm is not finite is discarded, and the weights are as before: by DeepSpeed's ZeRO optimizers, and here where
    none is in use.
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
    """Writes the weights that are trained, the optimizer's and the schedule's state, each rank its own part. A collective."""
    # Frozen weights are those of the model's folder.
    engine.save_checkpoint(str(folder.parent), folder.name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, folder: Path) -> None:
    """Reads what `save_engine` wrote from as many ranks. A collective."""
    strict = all(p.requires_grad for p in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(folder.parent), folder.name, load_module_strict=strict)
    if path is None:
        raise RunError(f"the learner's state in {folder} cannot be read. See the learner's log.")


class UpdateSize:
    """Measures how much an optimizer changes the weights: ‖Δw‖ / ‖w‖, from every 101st weight of what it updates.

    That is float32 also where the model's parameters are bfloat16, in which a small change may not show.
    """

    _STRIDE = 101

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
        self._before: list[torch.Tensor] = []
        self._sums = torch.zeros(2, dtype=torch.float64, device=device_of())
        # ZeRO 3 steps a part of the weights at a time.
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
        """Returns the ratio of what was updated since this was last asked, of all ranks; 0 where nothing was. A collective."""
        dist.all_reduce(self._sums)
        changed, weights = self._sums.tolist()
        self._sums.zero_()
        return math.sqrt(changed / weights) if weights else 0.0


class EngineWeights:
    """The engine's weights under their Hugging Face names, adapters merged; under ZeRO-3, gathered for as long as they are read.

    Reading is a collective among the ranks. Tied weights come once, as the embedding.

    Attributes:
        shapes: of each weight as a whole, with its dtype.
    """

    def __init__(self, engine: Any) -> None:
        self._weights = weights_of(engine.module.model)
        self._adapters = adapters_of(engine.module.model)
        self._gathers = engine.zero_optimization_partition_weights()
        self.shapes = {name: self._shape(weight) for name, weight in self._weights.items()}

    def _shape(self, weight: Weight) -> tuple[tuple[int, ...], torch.dtype]:
        first: Any = weight.parts[0]
        return tuple(first.ds_shape if self._gathers else first.shape), first.dtype

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields these weights, gathered together."""
        weights = [self._weights[name] for name in names]
        with self._whole([part for weight in weights for part in weight.parts]):
            for name, weight in zip(names, weights, strict=True):
                yield name, weight.value()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Returns copies on the CPU of the weights and of the adapters' own, these by their names in the model; both empty on
        every rank but the first."""
        keeps = dist.get_rank() == 0
        if not keeps and not self._gathers:
            return {}, {}
        weights = {}
        for name in self._weights:
            for _, weight in self.read([name]):
                if keeps:
                    weights[name] = weight.to("cpu", copy=True)
        with self._whole(list(self._adapters.values())):
            return weights, {name: p.detach().to("cpu", copy=True) for name, p in self._adapters.items() if keeps}

    def _whole(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[Any]:
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, enabled=self._gathers)
        return gathered


def device_of() -> torch.device:
    """Returns the device that DeepSpeed's accelerator gives this process."""
    return torch.device(get_accelerator().current_device_name())
