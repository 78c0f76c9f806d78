"""Calls that may never return, made where nobody has to wait for them.

Promise: a thread that is started here keeps neither an event loop nor the process from ending, unlike one of a `ThreadPoolExecutor`, and
a caller that waits can be interrupted by a signal, unlike one inside C code.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start_call(function: Callable[..., T], *arguments: object) -> "Future[T]":
    """Calls a function in a thread of its own; returns what will hold its result."""
    future: Future[T] = Future()
    # Who stops waiting for it does not end it.
    future.set_running_or_notify_cancel()

    def call() -> None:
        try:
            result = function(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, daemon=True).start()
    return future


def call_within(seconds: float | None, function: Callable[..., T], *arguments: object) -> T:
    """Returns what a call returns in time.

    Raises:
        TimeoutError: it did not; it goes on in its thread.
    """
    return start_call(function, *arguments).result(seconds)


async def call_aside(function: Callable[..., T], *arguments: object) -> T:
    """Returns what a call returns that is made beside the event loop. Cancelling does not end the call, only the wait."""
    return await asyncio.wrap_future(start_call(function, *arguments))
