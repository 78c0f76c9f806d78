"""Calls to actors: awaited by a deadline, and their failures named.

Promise: what an actor fails of comes out as one `RunError` that says which actor it was and why.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from maspo_ray.errors import RunError


class LateError(RunError):
    """An actor did not answer by its deadline."""


async def all_within(seconds: float, where: str, calls: Mapping[str, Coroutine[Any, Any, Any]]) -> list[Any]:
    """Returns what the calls return, by name, in their order; ends the others when one fails.

    Raises:
        LateError: some did not return in time; they are named.
    """
    tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
    try:
        done, late = await asyncio.wait(tasks.values(), timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        if late:
            names = ", ".join(name for name, task in tasks.items() if task in late)
            raise LateError(f"{names} did not answer within {seconds:g} s {where}. See its log, or raise that.")
        return [task.result() for task in tasks.values()]
    finally:
        for task in tasks.values():
            task.cancel()


async def within(seconds: float, missed: str, call: Awaitable[Any]) -> Any:
    """Returns what a call returns in time.

    Raises:
        RunError: it did not; `missed` says which deadline.
    """
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError:
        raise RunError(f"{missed} ({seconds:g} s). See the actors' logs, or raise it.") from None


async def named(what: str, call: Awaitable[Any]) -> Any:
    """Returns what a remote call returns; see `naming`."""
    with naming(what):
        return await call


class naming:  # noqa: N801, a context manager
    """Says which actor's answers are looked at within.

    Raises:
        RunError: `what`, with the cause that the actor gave.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, RunError):
                raise RunError(str(cause)) from None
            raise RunError(f"{self._what}: {type(cause).__name__}: {cause}") from error
        if isinstance(error, RayActorError):
            raise RunError(f"{self._what}: the actor died: {' '.join(str(error).split())}") from None
