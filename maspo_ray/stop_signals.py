"""The signals that ask a run to end: Ctrl-C, a scheduler's SIGTERM, the SIGHUP of a terminal that closes.

Promise: the first one ends the run in order, whatever it is doing; those that come along with it (`timeout` and others send two) change
nothing. A command ends within `END_S` of it even where a library holds up the main thread. Owns no process and no file.
"""

import asyncio
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType

EXIT_CODE = 130
END_S = 25.0
"""A command that is still there by then is ended as it is; schedulers kill after 30 s."""
_TOGETHER_S = 2.0
"""Signals that come within this time of the first are one request to end; a later one means at once."""
_EXIT_S = 3.0
"""What the interpreter may take to exit, once the command has nothing more to do."""


class _StopSignals:
    """The handlers that stand in the place of the process's own.

    Attributes:
        deliver: ends what the main thread does, at the first signal.
        numbers: the signals that are held.
    """

    def __init__(self, exits: bool) -> None:
        self.deliver: Callable[[], None] = _interrupt
        self.received_at: float | None = None
        self._exits = exits
        # A process whose terminal may close says so by ignoring the signal, as nohup does.
        self.numbers = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._before = {number: signal.getsignal(number) for number in self.numbers}
        self._over = False

    def install(self) -> None:
        self.put_handlers()
        if self._exits:
            # C code may keep Python's handlers from running, but not a byte from being written here.
            self._receiving, self._sending = socket.socketpair()
            self._sending.setblocking(False)
            self._fd_before = signal.set_wakeup_fd(self._sending.fileno(), warn_on_full_buffer=False)
            self._end_by = float("inf")
            threading.Thread(target=self._watch, daemon=True).start()

    def put_handlers(self) -> None:
        for number in self.numbers:
            signal.signal(number, self._handle)

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._exits:
            signal.set_wakeup_fd(self._fd_before)
            self._over = self.received_at is None
            self._end_by = monotonic() + _EXIT_S
            self._sending.send(b"\0")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received_at is None:
            self.received_at = monotonic()
            self.deliver()
        elif not self._exits and monotonic() - self.received_at > _TOGETHER_S:
            # In another's program a second request is that program's affair.
            signal.signal(number, self._before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        """Ends the process when it is late, or when it is asked once more."""
        # The main thread alone is to be sent signals, so that it can have them wait.
        signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        asked_at: float | None = None
        while not self._over:
            left_s = None if self._end_by == float("inf") else max(0.0, self._end_by - monotonic())
            if not select.select([self._receiving], [], [], left_s)[0]:
                break
            if not set(self._receiving.recv(64)) & set(self.numbers):
                continue
            if asked_at is None:
                asked_at = monotonic()
                self._end_by = min(self._end_by, asked_at + END_S)
            elif monotonic() - asked_at > _TOGETHER_S:
                break
        if not self._over:
            os._exit(EXIT_CODE)


_active: _StopSignals | None = None


@contextmanager
def stop_signals(exits: bool = False) -> Iterator[None]:
    """Within, a signal that asks to end raises KeyboardInterrupt, or does what `cancelled_by_signals` says. Where the signals are already
    held, or are not this thread's to hold, it changes nothing.

    Args:
        exits: the process has nothing else to do, so that it is ended where it does not end by itself.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _active = _StopSignals(exits)
    held.install()
    try:
        yield
    finally:
        _active = None
        held.remove()


@contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Within, a signal cancels the current task. From then on the run is ending, and a signal changes nothing more."""
    held, loop, task = _active, asyncio.get_running_loop(), asyncio.current_task()
    if held is None or task is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    # A library may have swallowed the interruption.
    if held.received_at is not None:
        raise KeyboardInterrupt
    held.deliver = lambda: _cancel(loop, task)
    try:
        yield
    finally:
        held.deliver = _do_nothing


@contextmanager
def handlers_kept() -> Iterator[Callable[[], bool]]:
    """Within, a library may put handlers of its own in the place of these: signals wait, and afterwards these stand again and are told.
    Yields what says whether one waits."""
    held = _active
    if held is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, held.numbers)
    try:
        yield lambda: not signal.sigpending().isdisjoint(held.numbers)
    finally:
        held.put_handlers()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held.numbers)


def stop_was_asked() -> bool:
    """Returns whether a signal has asked to end."""
    return _active is not None and _active.received_at is not None


def _interrupt() -> None:
    raise KeyboardInterrupt


def _cancel(loop: asyncio.AbstractEventLoop, task: "asyncio.Task[object]") -> None:
    # The loop may be asleep.
    loop.call_soon_threadsafe(task.cancel)


def _do_nothing() -> None:
    pass
