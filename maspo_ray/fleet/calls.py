"""Calls to actors: awaited by a deadline, and their failures named.

Promise: whatever Ray raises for an actor comes out as one `ActorError`, in one line that says which actor it was, what it was doing, why
it failed and where its log is; or, where an actor found that the input is wrong, as the `ConfigError` that says so.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError

from maspo_ray.actor_failures import CULPRIT_S, actor_error, input_error
from maspo_ray.errors import ActorError, ActorGone, ActorLate, RunError
from maspo_ray.fleet.actor_logs import ACTOR_LOGS


class failures_named:  # noqa: N801, a context manager
    """Names the actor whose answers are awaited inside.

    Args:
        actor: `role/replica`, or a role.
        doing: what it was called for, to follow "while".

    Raises:
        ConfigError: the actor found the input to be wrong.
        ActorError: Ray raised another error.
    """

    __slots__ = ("_actor", "_doing")

    def __init__(self, actor: str, doing: str) -> None:
        self._actor = actor
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RayError):
            if (wrong := input_error(error)) is not None:
                raise wrong from error
            named = actor_error(error, self._actor, self._doing)
            named = named.with_log(ACTOR_LOGS.sentence([named.actor]))
            # What the actor's own code raised keeps its traceback, for whoever looks further than the message.
            raise named from (error if isinstance(error, RayTaskError) else None)


def late_error(actor: str, message: str) -> ActorLate:
    """Returns the failure of an actor that gave no answer by its deadline, with where its log is."""
    return ActorLate.of(actor, message).with_log(ACTOR_LOGS.sentence([actor]))


async def await_named(actor: str, doing: str, call: Awaitable[Any]) -> Any:
    """Returns what a remote call returns; see `failures_named`."""
    with failures_named(actor, doing):
        return await call


async def await_within(seconds: float, missed: str, call: Awaitable[Any]) -> Any:
    """Returns what a call returns in time.

    Raises:
        RunError: it did not; `missed` says which deadline.
    """
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError:
        raise RunError(f"{missed} ({seconds:g} s). See the actors' logs, or raise it.") from None


async def await_all(seconds: float, where: str, calls: Mapping[str, Coroutine[Any, Any, Any]]) -> list[Any]:
    """Returns what calls return, in their order; when one fails, ends the others.

    Args:
        where: what is done and which deadline that has, to follow "did not answer within … s".
        calls: by the actors' names.

    Raises:
        ActorLate: some did not return in time; all of them are named, and the error is the first one's.
    """
    tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
    if not tasks:
        return []
    try:
        done, late = await asyncio.wait(tasks.values(), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        failed = [error for task in tasks.values() if task in done and (error := task.exception()) is not None]
        if failed:
            raise await _culprit(failed, late)
        if late:
            names = [name for name, task in tasks.items() if task in late]
            message = f"{', '.join(names)} did not answer within {seconds:g} s {where}. Raise that if it is too short."
            raise ActorLate.of(names[0], message).with_log(ACTOR_LOGS.sentence(names))
        return [task.result() for task in tasks.values()]
    finally:
        for task in tasks.values():
            task.cancel()


async def _culprit(failed: list[BaseException], pending: set[asyncio.Task[Any]]) -> BaseException:
    """Returns the failure that the others come from: that of an actor that is gone, where one is."""
    if pending and all(isinstance(error, ActorError) for error in failed) and not any(map(_is_gone, failed)):
        more, _ = await asyncio.wait(pending, timeout=CULPRIT_S, return_when=asyncio.FIRST_EXCEPTION)
        failed += [error for task in more if not task.cancelled() and (error := task.exception()) is not None]
    return next(filter(_is_gone, failed), failed[0])


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, ActorGone)
