"""What each role must offer, so that an actor, a sampler or a late policy of the user's own plugs in exactly as the built-in ones do.

Promise: an actor is a plain class with a cheap constructor (it keeps its arguments) and a `setup` that does the heavy work.
The constructor receives the keyword arguments of its role (see each protocol), and the section's `args` after them; that it takes both
is checked by its signature before anything starts. A class may also have a static method `check_config(section)`, which is given its
section (`RolloutConfig`, `RewardConfig` …) then and raises `ConfigError` where it would fail later.
`fleet` wraps the class with `ray.remote`; nothing else does. Methods may be sync or async where it says so.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from maspo_ray.experience import (
    Completion,
    Experience,
    Prompt,
    PublishReport,
    SampledGroup,
    Sampling,
    UpdateReport,
    Verdict,
)
from maspo_ray.packing import RankPlan
from maspo_ray.weight_sync import Backend


class Sampler(Protocol):
    """Decides which training prompt is drawn next. No actor: it lives in the controller, so its methods must be quick.

    Constructor: `num_prompts: int, shuffle: bool, seed: int`, and `data.sampler.args` after them. It is called once for a single
    prompt before anything starts, so that wrong arguments are answered at once, and again for as many as the data has.
    """

    def next(self) -> int:
        """Returns the index, from 0 to `num_prompts` − 1, of the prompt to draw; there is always a next one."""
        ...

    def observe(self, index: int, pass_rate: float) -> None:
        """Learns which share of a group's scored completions was correct, once the group is scored, also if it is filtered.

        Groups end in another order than they were drawn in; one of which nothing could be scored is not told of.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, as JSON can hold it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the sampler stood whose `state` this is; that one had the same `num_prompts`, `shuffle` and `seed`."""
        ...


class LatePolicy(Protocol):
    """Decides about groups that come to the learner past `pipeline.max_staleness`. Lives in the controller.

    Constructor: `max_staleness: int`, and `pipeline.late_policy.args` after it.
    """

    def oldest_version(self, version: int) -> int:
        """Returns the version from which on tokens may still be trained on when the learner is at `version`: a group with an older
        one is cancelled where it is."""
        ...

    def judge(self, experience: Experience, version: int) -> Experience | None:
        """Returns what to train on of a group that is past the bound, or None to drop it, counted as stale.

        Asked each time that the learner at `version` looks for a batch.
        """
        ...


class RewardActor(Protocol):
    """Scores completions. Constructor: the section's `args` only.

    `setup` is optional, and so is `check_answer` (`ChecksAnswers`). `score` may be sync or async; a completion that cannot be scored raises.
    """

    def score(
        self, prompt: Prompt, completions: Sequence[Completion]
    ) -> Sequence[Verdict | float] | Awaitable[Sequence[Verdict | float]]:
        """Returns a verdict, or a bare reward, for each completion, in order."""
        ...


AnswerCheck = Callable[[Any, Mapping[str, Any]], str | None]
"""Says of a prompt's answer and metadata why a reward cannot score against them; None where it can."""


@runtime_checkable
class ChecksAnswers(Protocol):
    """What a reward may offer besides: to say which answers it takes, so that others are named before anything starts.

    It is asked in the controller, of an instance that was made with the section's `args` and not set up.
    """

    def check_answer(self, answer: Any, metadata: Mapping[str, Any]) -> str | None:
        """Returns why `score` cannot compare with an answer, such as `MyReward takes a text`; None where it can.

        Asked once for each row of the data, so it must be quick.

        Args:
            answer: of the row's answer column, as `Prompt.answer`.
            metadata: the row's other columns, as `Prompt.metadata`.
        """
        ...


class RolloutEngine(Protocol):
    """Samples completions. Constructor: `model: ModelConfig, rollout: RolloutConfig, max_model_tokens: int, threads: int,
    seed: int`.

    `maspo_ray.hosts.rollout_host` runs it in its actor and owns what every engine needs alike: how many completions run at once and in
    which order, versions, expiry, scoring. The weight methods are vLLM's own names, so that vLLM's trainer-side transfer engines can
    drive them.
    """

    async def setup(self) -> None: ...

    async def sample(
        self, token_ids: NDArray[np.int32], *, sampling: Sampling, seed: int | None, cache_key: str
    ) -> Completion:
        """Returns a completion of a prompt's [tokens] int32; cancelled, it frees what it holds.

        Args:
            seed: None leaves it to the engine.
            cache_key: what is cached of the prompt may be shared with requests of the same key alone.
        """
        ...

    async def check(self) -> None:
        """Returns when the engine has given a sign of life; raises where it has died."""
        ...

    async def weight_checksum(self) -> str | None:
        """Returns a digest of the engine's weights: another once they have changed, the same on engines that hold the same. None where the
        engine has none."""
        ...

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Joins a transfer group of the learner's, in place of any before; `init_info` is the backend's."""
        ...

    async def stage_weights(self, update_info: dict[str, Any]) -> None:
        """Begins to receive, while generation goes on; the `gloo` backend's alone."""
        ...

    async def start_weight_update(self) -> None:
        """Pauses generation, keeping what is in flight."""
        ...

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receives, where that is not done yet, and loads."""
        ...

    async def finish_weight_update(self, weight_version: int) -> None:
        """Stamps what is sampled from here on with the version, and resumes."""
        ...

    async def shutdown(self) -> None: ...


class ReferenceActor(Protocol):
    """Scores tokens under the frozen reference policy. Constructor: `model: ModelConfig, temperature: float, threads: int`."""

    def setup(self) -> None: ...

    def completion_logprobs(self, group: SampledGroup) -> tuple[Sequence[NDArray[np.float32]], int]:
        """Returns, for each completion of the group in turn, [tokens] float32 log-probs at the sampling temperature, which stay in the
        object store; and how many tokens there were, which the controller may know."""
        ...


class LearnerActor(Protocol):
    """One rank of the learner. Constructor: `model: ModelConfig, learner: LearnerConfig, objective: ObjectiveConfig,
    kl: KLConfig, temperature: float, total_updates: int, rank: int, world_size: int, threads: int, seed: int`.

    Every method is called on all ranks at once; what is said to return something returns it on rank 0.
    """

    def rendezvous(self) -> tuple[str, int]:
        """Returns the address and a free port of this rank's node."""
        ...

    def setup(self, master_address: str, master_port: int) -> None: ...

    def train_step(self, version: int, plans: Sequence[RankPlan], *payloads: Any) -> list[UpdateReport]:
        """Makes one optimizer update of each plan, this rank's share of it (`packing.pack`), in order; leaves it out, on every
        rank, where loss or gradient is not finite. The batch meets weights of `version`."""
        ...

    def shares_prompts(self) -> bool:
        """Returns whether `train_step` takes several completions behind one copy of their prompt; asked after `setup`."""
        ...

    def completion_logprobs(
        self, pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]
    ) -> Sequence[NDArray[np.float32]]:
        """Returns, for each pair of a prompt's and a completion's token ids, the completion's [tokens] float32 log-probs at the
        sampling temperature."""
        ...

    def connect(
        self,
        replicas: tuple[int, ...],
        engines: Sequence[Any],
        workers_per_engine: int,
        backend: Backend,
        timeout_s: float,
    ) -> None:
        """Opens a weight-transfer group to rollout actors, in place of those that any of them was in.

        Args:
            engines: handles of the actors, in the order of `replicas`; each has `workers_per_engine` vLLM workers.
            timeout_s: for each call to an engine. One that misses it is named (`errors.ActorLate`).
        """
        ...

    def publish(self, version: int, replicas: tuple[int, ...]) -> PublishReport:
        """Sends the weights as `version` to the actors of one connected group; the report has their pauses in the order of `replicas`."""
        ...

    def save(self, folder: str) -> None:
        """Writes a Hugging Face model and its tokenizer into a folder, which gets its lasting name when this has returned."""
        ...

    def save_state(self, folder: str) -> None:
        """Writes what a later `load_state` goes on from: weights, optimizer and schedule, this rank's part of them."""
        ...

    def load_state(self, folder: str) -> None:
        """Reads what as many ranks wrote by `save_state`; asked after `setup`, in place of what the model's folder holds."""
        ...

    def shutdown(self) -> None: ...
