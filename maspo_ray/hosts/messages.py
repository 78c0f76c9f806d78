"""What the controller and a rollout host say to each other.

Promise: plain frozen data; of what was sampled only facts, never tokens.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from maspo_ray.experience import CompletionFacts, Prompt, Sampling, Verdict


class Priority(IntEnum):
    """Who gets an engine's next free place: the lower number first, and among equals who asked first."""

    PROBE = 0
    """Parity's and an evaluation's requests: they must not wait behind a backlog, and are never ended for their age."""
    TRAINING = 1


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Completions to sample for a prompt, all by one engine, so that they share the prompt's prefill.

    Attributes:
        request_id: the controller's own, by which `Beat.unfinished` speaks of it.
        seeds: one for each completion; None leaves it to the engine.
        scored: whether the reward is asked about them.
    """

    request_id: int
    prompt: Prompt
    sampling: Sampling
    seeds: tuple[int | None, ...]
    priority: Priority = Priority.TRAINING
    scored: bool = True


class ScoreCall(NamedTuple):
    """A call to a reward actor, in seconds before the group's answer, since clocks of two nodes need not agree."""

    replica: int
    started_before_s: float
    ended_before_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """All completions of a request have ended, and been scored.

    Attributes:
        facts: of each completion, in the order of the seeds; verdicts likewise, none where the request was not to be scored.
    """

    facts: tuple[CompletionFacts, ...]
    verdicts: tuple[Verdict, ...]
    score_calls: tuple[ScoreCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Expired:
    """The host ended a request: one of its completions began with weights that are too old to be trained on."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rollout host did since it was last asked.

    Attributes:
        idle_s: seconds in which its engine had no completion outstanding; of_s, all seconds.
        tokens: of the completions that ended.
        ended: how many completions ended.
        unfinished: of each request under way, by its id, how many completions have not ended.
    """

    idle_s: float
    of_s: float
    tokens: int
    ended: int
    unfinished: dict[int, int]
