"""What Ray raises for an actor → one line with the actor's name.

Promise: every error of Ray's has a place here; none brings a traceback, a second line, or Ray's advice along. An error of the input stays one.
"""

import re

from ray.exceptions import (
    ActorPlacementGroupRemoved,
    ActorUnschedulableError,
    AsyncioActorExit,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskPlacementGroupRemoved,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from maspo_ray.errors import ActorError, ActorFailed, ActorGone, ConfigError, RunError

_ACTOR_LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    # Of the node's memory: Ray has ended the actor's process to save the others.
    OutOfMemoryError,
    AsyncioActorExit,
    ActorPlacementGroupRemoved,
    TaskPlacementGroupRemoved,
    ActorUnschedulableError,
    TaskUnschedulableError,
)
CULPRIT_S = 2.0
"""An actor's peers may fail of its death before Ray has told of it: so long it is waited for, so that it is the one named."""

_SENTENCES = 2
_SENTENCE_END = re.compile(r"(?<=[.!?])\s*(?=Tip:)|(?<=[.!?])\s+(?=[A-Z(\[`])")
_SAYS_NOTHING = re.compile(
    r"The actor (died unexpectedly|experienced an error) before finishing this task|To see information about|This is the Python worker|Tip:"
)
_TRACEBACK = "Traceback (most recent call last)"
# A traceback's head as Ray writes it, "ray::Class.method() (pid=…, …)", in colour.
_RAY_HEAD = re.compile(r"(\x1b\[\d+m)?ray::\S+\(\)(\x1b\[\d+m)? \(pid=.*\)$", re.MULTILINE)


def input_error(error: RayError) -> ConfigError | None:
    """Returns the error of the input that an actor found, which only what it loads could show; None of another error."""
    cause = _cause(error)
    return ConfigError(str(cause)) if isinstance(cause, ConfigError) else None


def actor_error(error: RayError, actor: str, doing: str) -> ActorError:
    """Returns the failure that Ray raised when `actor` was called.

    The failure of another actor, which the one called has met, stays that one's.

    Args:
        actor: `role/replica`, or a role.
        doing: what it was called for, to follow "while".
    """
    cause = _cause(error)
    if isinstance(cause, ActorError):
        return cause
    if isinstance(cause, RunError):
        return ActorFailed.of(actor, str(cause))
    name = type(cause).__name__
    told = _told_by_ray(cause) if isinstance(cause, RayError) else " ".join(_without_frames(str(cause)).split())
    if isinstance(cause, ObjectLostError):
        return ActorGone.of(actor, f"{actor} lost an object while {doing}: {told}")
    # An actor whose constructor raised is not there either, but would fail again.
    never_began = isinstance(cause, RayActorError) and cause.actor_init_failed
    if isinstance(cause, _ACTOR_LOST) and not never_began:
        return ActorGone.of(actor, f"{actor} was lost while {doing}: {told or name}")
    return ActorFailed.of(actor, f"{actor} failed while {doing}: {f'{name}: {told}' if told else name}")


def _cause(error: BaseException) -> BaseException:
    """Returns what an actor raised, as it raised it."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def _told_by_ray(error: RayError) -> str:
    """Returns the first sentences of one of Ray's paragraphs that say something of this failure."""
    text = _RAY_HEAD.sub("", _without_frames(str(error), indented_always=True))
    sentences = _SENTENCE_END.split(" ".join(text.split()))
    telling = [sentence for sentence in sentences if not _SAYS_NOTHING.match(sentence)]
    return " ".join((telling or sentences)[:_SENTENCES])


def _without_frames(text: str, indented_always: bool = False) -> str:
    """Returns a text without its tracebacks, of which the last line stays.

    Args:
        indented_always: leave out indented lines where there is no traceback too; Ray lists ids and ports there.
    """
    if not indented_always and _TRACEBACK not in text:
        return text
    return "\n".join(line.partition(_TRACEBACK)[0] for line in text.splitlines() if not line[:1].isspace())
