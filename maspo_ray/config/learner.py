"""The section of the learner, and of the adapters that it may train.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from maspo_ray.config.section import Section
from maspo_ray.config.sections import RoleConfig


class LoraConfig(Section):
    """Adapters that are trained in place of the weights, which stay as they are (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1)
    """Of each adapter: an update of a matrix is a product of two with so many columns and rows."""
    alpha: int = Field(32, ge=1)
    """What the adapters add is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(("all-linear",), min_length=1)
    """Names of modules, such as `q_proj`; `all-linear` alone stands for every linear one but the output layer."""

    @field_validator("targets")
    @classmethod
    def _all_or_some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "all-linear" in value and len(value) > 1:
            raise ValueError("all-linear stands for every linear module. Name it alone, or remove it")
        return value


class LearnerConfig(RoleConfig):
    """`replicas` is the number of data-parallel ranks."""

    actor: str = "actors.deepspeed_learner:DeepSpeedLearner"
    lr: float = Field(1e-6, gt=0)
    """AdamW's learning rate, which `schedule` scales."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the gradient's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's, added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Of matrices; norms and biases do not decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; linear and cosine fall to 0 one update after the last."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises to `lr`, whatever the schedule."""
    max_grad_norm: float = Field(1.0, gt=0)
    """A larger gradient is scaled down to this norm."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """What the ranks shard: nothing (0), optimizer states (1), gradients too (2), parameters too (3). By default 1, and 0 for a
    single rank in float32, where nothing is sharded and it is the fastest."""
    lora: LoraConfig | None = None
    """Train adapters alone. Rollout actors receive the merged weights; a saved model is merged, with the adapter in `adapter/`."""
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    """Upper bound of a micro-batch's prompt and completion tokens."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer updates that one step makes of its batch, each of as many whole groups."""
    share_prompts: bool = True
    """Pay for a prompt once for all its completions in a micro-batch: each attends to the one copy and to itself alone. The
    result is the same. Where the attention cannot do it (sliding windows, states; eager, flash_attention_2) each has its own."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, in place of keeping them."""
    router: Literal["trained", "frozen"] = "trained"
    """Of a mixture of experts: whether the weights that choose experts are trained with the rest."""
    router_aux_loss_coef: float | None = Field(None, ge=0)
    """Of a mixture of experts: the load-balancing loss is added times this; by default times the model's own coefficient where its
    config has `output_router_logits: true`, else not at all."""
    max_skipped_updates: int = Field(3, ge=0)
    """An update whose loss or gradient is not finite is left out and logged with its groups; more in a row stop the run."""
    deepspeed: dict[str, Any] = {}
    """Passed through to DeepSpeed's configuration; the keys that the sections above set are refused."""

    owned_deepspeed_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "managed_gradient_accumulation",
            "gradient_clipping",
            "optimizer",
            "scheduler",
            "bf16",
            "bfloat16",
            "fp16",
        }
    )

    @field_validator("deepspeed")
    @classmethod
    def _no_owned_key(cls, value: dict[str, Any]) -> dict[str, Any]:
        owned = sorted(cls.owned_deepspeed_keys & value.keys())
        zero = value.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(
                "its zero_optimization must be a section of keys. Set learner.zero_stage for the stage alone"
            )
        if "stage" in zero:
            owned.append("zero_optimization.stage")
        if owned:
            raise ValueError(
                f"{', '.join(owned)} follow from the learner and model sections. Remove from learner.deepspeed"
            )
        return value

    @model_validator(mode="after")
    def _zero_is_on(self) -> Self:
        if self.zero_stage == 0 and "zero_optimization" in self.deepspeed:
            raise ValueError(
                "zero_stage is 0; learner.deepspeed has a zero_optimization, which is without effect there. Set zero_stage to 1."
            )
        return self
