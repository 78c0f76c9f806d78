"""The sections of the run's configuration, each a frozen pydantic model with its defaults and their meaning.

Promise: a section that exists is consistent with itself; `config.RunConfig` puts them together and holds them against each other.
Imports neither torch, ray nor vllm.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from maspo_ray.config.sampling import StopStrings, StopTokens, TruncationConfig
from maspo_ray.config.section import Section

Dtype = Literal["float32", "bfloat16"]
UpdateOrder = Literal["together", "rolling"]


class PluginConfig(Section):
    """A class of the controller's, and what it is made with."""

    path: str
    """Dotted path `module:Class`."""
    args: dict[str, Any] = {}
    """Keyword arguments of its constructor, besides what its protocol gives it."""


class ModelConfig(Section):
    path: str
    """Folder of a Hugging Face model with its tokenizer, or a hub id such as `org/name`."""
    dtype: Dtype = "bfloat16"
    """Of the learner's parameters, the reference's and the rollout engine's alike."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention of the learner and the reference, as transformers names it."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, wherever model or tokenizer are loaded or saved."""


class RoleConfig(Section):
    """How many actors of a role, where, and with what resources each."""

    actor: str
    """Dotted path `module:Class`."""
    replicas: int | None = Field(None, ge=1)
    """Actors in all; 1 if neither this nor `per_node` is given."""
    per_node: int | None = Field(None, ge=1)
    """Actors on each GPU node (on each node, where none has GPUs)."""
    gpus: float = Field(0.0, ge=0)
    """Per actor; a fraction shares a GPU, more than 1 must be whole."""
    cpus: float = Field(1.0, ge=0)
    """Per actor; fractions allowed."""
    threads: int | None = Field(None, ge=1)
    """Of an actor's engine on CPU; by default its whole CPUs, at least 1."""
    args: dict[str, Any] = {}
    """Keyword arguments of the actor's constructor, besides what its protocol gives it."""

    @field_validator("gpus")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 a number of GPUs must be whole. Set a whole number or a fraction below 1")
        return value

    @model_validator(mode="after")
    def _one_count(self) -> Self:
        if self.replicas is not None and self.per_node is not None:
            raise ValueError(
                f"replicas is {self.replicas} and per_node is {self.per_node}; only one of them counts. Remove one."
            )
        return self


class RolloutConfig(RoleConfig, TruncationConfig):
    """With `top_p`, `top_k`, `min_p` or `min_new_tokens` the ratio is of the whole policies, not of what they leave (docs/pipeline.md)."""

    actor: str = "actors.vllm_rollout:VLLMRollout"
    group_size: int = Field(8, ge=1)
    """Completions sampled for each prompt (n)."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest completion; one that reaches it is cut off (finish reason `length`)."""
    min_new_tokens: int = Field(0, ge=0)
    """Sample no end-of-sequence token and none of `stop_token_ids`, and heed no `stop`, before a completion has so many tokens."""
    stop: StopStrings = ()
    """A completion ends where its text has one of these. Tokens and text both hold it."""
    stop_token_ids: StopTokens = ()
    """Tokens that end a completion, besides the model's own; they are part of it."""
    temperature: float = Field(1.0)
    """Behaviour log-probs are those at this temperature, so it must be above 0."""
    max_concurrent_requests: int = Field(128, ge=1)
    """Completions in flight in one engine."""
    max_model_tokens: int | None = Field(None, ge=2)
    """Longest prompt and completion together; by default data.max_prompt_tokens + rollout.max_new_tokens. If less than these, the
    completions of long prompts are cut off before max_new_tokens."""
    timeout_s: float = Field(3600.0, gt=0)
    """An engine that has completions under way and ends none for so long ends the run."""
    kv_cache_gib: float = Field(0.25, gt=0)
    """KV cache of an engine that runs on CPU; on a GPU vLLM takes `gpu_memory_utilization` from `engine`."""
    update: UpdateOrder = "together"
    """How replicas change their weights: all at once, with one transfer; or one after the other, so that the rest go on generating,
    with a transfer each."""
    engine: dict[str, Any] = {}
    """Passed through to vLLM's `AsyncEngineArgs`; the keys that the sections set are refused."""

    owned_engine_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "model",
            "dtype",
            "trust_remote_code",
            "seed",
            "max_model_len",
            "max_num_seqs",
            "logprobs_mode",
            "generation_config",
            "weight_transfer_config",
            "worker_extension_cls",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
        }
    )

    @field_validator("engine")
    @classmethod
    def _no_owned_key(cls, value: dict[str, Any]) -> dict[str, Any]:
        if owned := sorted(cls.owned_engine_keys & value.keys()):
            raise ValueError(
                f"{', '.join(owned)} follow from the model and rollout sections (tensor parallelism from rollout.gpus). "
                "Remove from rollout.engine"
            )
        return value

    @field_validator("temperature")
    @classmethod
    def _temperature_above_zero(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("a greedy policy has no log-probs to learn from, so it must be above 0. Set it to 1.0")
        if value > 2:
            raise ValueError("vLLM samples at temperatures up to 2. Set it to 1.0")
        return value

    @field_validator("top_k")
    @classmethod
    def _more_than_one_token(cls, value: int | None) -> int | None:
        if value == 1:
            raise ValueError("completions of a group would all be the same. Set it to 2 or more, or remove it")
        return value

    @property
    def reshaping(self) -> tuple[str, ...]:
        """The keys by which an engine samples from another distribution than the model's at the temperature."""
        off = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "min_new_tokens": 0}
        return tuple(name for name, value in off.items() if getattr(self, name) != value)


class OverlongConfig(Section):
    """Soft over-long punishment, DAPO, arXiv:2503.14476, section 3.4: rewards are then no longer binary."""

    buffer_tokens: int = Field(ge=1)
    """The penalty grows over a completion's last so many tokens before rollout.max_new_tokens."""
    penalty: float = Field(1.0, gt=0)
    """Taken off the reward at rollout.max_new_tokens, and wherever the completion was cut off."""


class RewardConfig(RoleConfig):
    actor: str = "actors.rewards.exact_match:ExactMatchReward"
    cpus: float = Field(0.1, ge=0)
    timeout_s: float = Field(30.0, gt=0)
    """Deadline of one `score` call; what misses it counts as `timeout`, its reward is NaN."""
    max_error_rate: float = Field(0.1, ge=0, le=1)
    """The run stops when a larger share of training's last 256 completions ended in error or timeout."""
    overlong: OverlongConfig | None = None
    """Take a penalty off the reward of long completions before advantages; `reward/mean` stays the verifier's."""


class ReferenceConfig(RoleConfig):
    actor: str = "actors.hf_reference:HFReference"
    cpus: float = Field(0.2, ge=0)
    timeout_s: float = Field(3600.0, gt=0)
    """A reference actor that has groups to score and scores none for so long ends the run."""


class LatePolicyConfig(PluginConfig):
    path: str = "maspo_ray.groups.late_policy:DropStale"
    """Dotted path `module:Class`; `maspo_ray.groups.late_policy:TrainStale` trains on what is at most `max_lag` versions behind."""


class PipelineConfig(Section):
    steps: int = Field(100, ge=1)
    """Steps in all: a batch of groups trained on, then a publish."""
    groups_per_step: int = Field(16, ge=1)
    """Groups that one step trains on (B), in `learner.updates_per_batch` updates; any number of them for any number of ranks."""
    max_staleness: int = Field(1, ge=0)
    """Weight versions that a trained token may be behind the learner (η); 0 is on-policy and synchronous."""
    late_policy: LatePolicyConfig = LatePolicyConfig()
    """What decides about a group that has gone past `max_staleness`."""
    parity_every: int = Field(10, ge=0)
    """An engine that had no token of current weights in a batch for so many steps samples some, so that learner and engine are compared;
    those that have are compared at every step for nothing. 0 samples at start only."""
    parity_bound: float | None = Field(None, gt=0)
    """Of |Δ log-prob| between learner and engine: the largest in float32 (by default at most 1e-3), the mean in
    bfloat16, whose rounding has outliers (by default at most 0.1, and at most 3 times what it is at the run's start)."""
    parity_prompts: int = Field(8, ge=1)
    """Prompts that an engine samples a completion for where it is compared by itself, as at the start."""
    filter_zero_variance: bool = True
    """Groups whose rewards are all equal carry no gradient: filter and refill them."""
    filter_overlong: bool = False
    """Leave completions that were cut off (finish reason `length`) out of the loss and its normaliser. They still count in their
    group's baseline; a group is filtered and refilled if what is left of it carries no signal."""
    max_dropped_in_a_row: int = Field(2000, ge=1)
    """The run stops when so many groups, one after the other, carried no signal or could not be scored."""
    setup_timeout_s: float = Field(900.0, gt=0)
    """Deadline of all actors' start, models loaded."""
    weight_sync_timeout_s: float = Field(300.0, gt=0)
    """Deadline of each part of a weight transfer, of an engine's checksum, and of its answer when it is asked how it fares; the actor
    that misses it is named."""
    step_timeout_s: float = Field(3600.0, gt=0)
    """Deadline of a step's training, of the learner's log-probs for parity, and of a step's record."""

    @property
    def max_groups_under_way(self) -> int:
        """Groups that may be accepted or on their way at once."""
        return min(self.max_staleness + 1, self.steps) * self.groups_per_step


class EvalConfig(TruncationConfig):
    every: int = Field(20, ge=0)
    """Steps between evaluations; 0 evaluates before and after training only."""
    samples: int = Field(1, ge=1)
    """Completions for each held-out prompt (k)."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 takes the most probable token each time."""
    min_new_tokens: int | None = Field(None, ge=0)
    """By default `rollout.min_new_tokens`, as the next two are by default those of `rollout`."""
    stop: StopStrings | None = None
    """By default `rollout.stop`."""
    stop_token_ids: StopTokens | None = None
    """By default `rollout.stop_token_ids`."""
    name: str = "heldout"
    """Written as `set` in eval.jsonl."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and (self.temperature == 0 or self.top_k == 1):
            key = "temperature is 0" if self.temperature == 0 else "top_k is 1"
            raise ValueError(f"samples is {self.samples}; where {key} they are all the same. Set it to 1.")
        return self
