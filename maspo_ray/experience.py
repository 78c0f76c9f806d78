"""What flows through the pipeline, from a prompt to what the learner trains on.

Promise: plain frozen data, no engine, no Ray. Two sizes of thing live here: payloads (`SampledGroup`), which stay
with Ray and travel by reference, and the small facts about them (`CompletionFacts`, `Verdict`, `Rollout`, `Group`),
which the controller works with. Token ids go in and come out; nothing is tokenised twice.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, tokenised once.

    Attributes:
        prompt_id: stable across runs: `train/<row>` or `eval/<row>`; of a mix's source `train/<source>/<row>`.
        text: as the user's data has it, before any chat template; a list of messages is its last one's content.
        token_ids: [prompt_tokens] int32, what the model sees.
        answer: what the reward compares with; whatever the data's answer column holds.
        metadata: the rest of the data's row.
        source: its source's name in a mix (`data.train.kind: mix`), else "".
    """

    prompt_id: str
    text: str
    token_ids: NDArray[np.int32]
    answer: Any
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by the weights of `version`, as the engine stamped them; the first span is of the
    version that the completion began with, where that is older (`hosts.rollout_host`)."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What the behaviour policy sampled for a prompt.

    Attributes:
        token_ids: [tokens] int32, with the end-of-sequence token where it was sampled.
        logprobs: [tokens] float32, of each token under the policy that sampled it, at the sampling temperature and before `top_p`,
            `top_k`, `min_p` and `min_new_tokens` take tokens from it.
        spans: cover [0, tokens) without gaps.
        finish_reason: "stop" (by the model, a stop string or a stop token) or "length" (cut off at the token limit).
        text: the engine's decoding, special tokens left out; for rewards and people only. It ends with the stop string, of which the
            last token may hold more.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str


class CompletionFacts(NamedTuple):
    """What the controller needs to know of a completion; never its tokens. A tuple, since a controller has very many."""

    num_tokens: int
    min_version: int
    max_version: int
    finish_reason: str

    @classmethod
    def of(cls, completion: Completion) -> "CompletionFacts":
        versions = [span.version for span in completion.spans]
        return cls(len(completion.token_ids), min(versions), max(versions), completion.finish_reason)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        temperature: behaviour log-probs are those at this temperature.
        max_new_tokens: a completion is cut off here.
        min_new_tokens: before it has so many tokens, nothing ends a completion.
        top_p: the fewest tokens that together have this probability may be sampled.
        top_k: so many most probable ones; None for all.
        min_p: those with at least this share of the most probable one's probability.
        stop: strings that end a completion; its tokens and its text hold the one that did.
        stop_token_ids: tokens that end it, besides the model's own.
    """

    temperature: float
    max_new_tokens: int
    min_new_tokens: int = 0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """A prompt with what was sampled for it: the payload of a group, which stays in Ray's object store.

    Attributes:
        completions: in the order of their seeds, whichever ended first.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]


class Outcome(StrEnum):
    """How scoring a completion ended."""

    SCORED = "scored"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the reward says of one completion.

    Attributes:
        reward: NaN exactly where `outcome` is not "scored": not scored is not the same as wrong.
        correct: counts for the accuracy.
        cause: of an error or a timeout, in one line.
    """

    reward: float
    correct: bool
    outcome: Outcome = Outcome.SCORED
    cause: str | None = None

    def __post_init__(self) -> None:
        if (self.outcome is Outcome.SCORED) == math.isnan(self.reward):
            raise ValueError(
                f"reward is {self.reward}; a scored completion has a number, any other NaN. Mend the reward."
            )

    @classmethod
    def from_reward(cls, reward: float) -> "Verdict":
        """Returns the verdict of a reward function that gives a bare number; above 0.5 counts as correct."""
        return cls(reward=float(reward), correct=float(reward) > 0.5)

    @classmethod
    def unscored(cls, outcome: Outcome, cause: str) -> "Verdict":
        return cls(reward=math.nan, correct=False, outcome=outcome, cause=cause)


class Rollout(NamedTuple):
    """What the controller knows of one completion of a group. A tuple, since a controller has very many."""

    facts: CompletionFacts
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one prompt, as the controller holds them.

    Attributes:
        payload: refers to the `SampledGroup` in the object store.
        prompt_tokens: length of the prompt.
        submitted_version: the learner's version when the group was admitted.
        replica: of the rollout actor that sampled it.
        rollouts: in the order of their seeds.
        seeds: of the rollouts' sampling, in the same order; none where they are not known.
        min_version: the oldest that sampled one of its tokens; max_version, the newest.
    """

    group_id: int
    prompt_id: str
    payload: Any
    prompt_tokens: int
    submitted_version: int
    replica: int
    rollouts: tuple[Rollout, ...]
    seeds: tuple[int, ...] = ()
    min_version: int = field(init=False)
    max_version: int = field(init=False)

    def __post_init__(self) -> None:
        facts = [rollout.facts for rollout in self.rollouts]
        object.__setattr__(self, "min_version", min([fact.min_version for fact in facts]))
        object.__setattr__(self, "max_version", max([fact.max_version for fact in facts]))

    @property
    def pass_rate(self) -> float | None:
        """The share of the rollouts that could be scored which are correct; None where none could."""
        scored = [rollout.verdict.correct for rollout in self.rollouts if rollout.verdict.outcome is Outcome.SCORED]
        return sum(scored) / len(scored) if scored else None

    @property
    def rewards(self) -> list[float]:
        return [rollout.verdict.reward for rollout in self.rollouts]


@dataclass(frozen=True, slots=True)
class Experience:
    """A group that the learner can train on.

    Attributes:
        advantages: one for each rollout; None for one that is in no loss and no normaliser, because it could not be scored or was
            left out.
        reference_logprobs: refers to a list with, for each completion of the payload in turn, [tokens] float32 log-probs under the
            reference policy; None without KL.
    """

    group: Group
    advantages: tuple[float | None, ...]
    reference_logprobs: Any = None

    @property
    def trained(self) -> dict[int, float]:
        """The advantages of the rollouts that are trained on, by their places in the group."""
        return {i: advantage for i, advantage in enumerate(self.advantages) if advantage is not None}


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two sides' log-probs of the same tokens are apart.

    Attributes:
        max: largest |Δ log-prob|; mean, over the tokens.
        tokens: how many were compared.
    """

    max: float
    mean: float
    tokens: int


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an optimizer update came to.

    Attributes:
        metrics: over the update's groups, all ranks, by their names in metrics.jsonl.
        applied: whether the weights changed. An update whose loss or gradient is not finite is left out.
        faulty_groups: ids of the groups whose loss was not finite; none where the gradient alone was not.
        parity: of each rollout replica, over the tokens of completions that began with the very weights that meet them here; all
            ranks. Empty for an update that others of the batch came before.
    """

    metrics: dict[str, float]
    applied: bool
    faulty_groups: tuple[int, ...]
    parity: dict[int, Parity] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What publishing a version took, in seconds from its start.

    Attributes:
        seconds: until every engine had it.
        pauses: for each engine, when it stopped and when it went on.
    """

    seconds: float
    pauses: tuple[tuple[float, float], ...]
