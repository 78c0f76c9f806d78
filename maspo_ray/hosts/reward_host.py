"""Runs a user's reward inside its actor: sync or async, floats or verdicts, with a deadline.

Promise: whatever the reward does, each completion gets one `Verdict`; an exception, a missed deadline or a NaN is never turned into
a reward. A sync reward that misses its deadline keeps its thread until it returns; the next call gets a thread of its own.
"""

import asyncio
import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psutil

from maspo_ray.experience import Completion, Outcome, Prompt, Verdict


class RewardHost:
    """Holds one reward actor of the user's class. All calls to it come through here."""

    def __init__(self, reward_class: type, args: dict[str, Any], timeout_s: float) -> None:
        self._reward = reward_class(**args)
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1)
        # A sync reward need not bear two calls at once.
        self._free = asyncio.Semaphore(1)

    async def setup(self) -> None:
        setup = getattr(self._reward, "setup", None)
        if setup is not None:
            result = setup()
            if inspect.isawaitable(result):
                await result

    async def shutdown(self) -> None:
        """Ends the processes that the reward has started, also those in sessions of their own."""
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                process.kill()

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns a verdict for each completion."""
        try:
            given = await self._call(prompt, completions)
        except TimeoutError:
            cause = f"no verdict within reward.timeout_s ({self._timeout_s:g} s)"
            return [Verdict.unscored(Outcome.TIMEOUT, cause) for _ in completions]
        except (asyncio.CancelledError, KeyboardInterrupt):
            raise
        except BaseException as error:
            # The user's code: whatever it raises, also what is no Exception (`sys.exit`, some libraries' time limits), costs
            # its completion, and the controller counts it.
            if len(completions) > 1:
                # An error ends the whole call; alone, each completion has only its own to answer for.
                return [verdict for completion in completions for verdict in await self.score(prompt, [completion])]
            return [_failed(error)]
        try:
            if len(given) != len(completions):
                raise ValueError(f"score returned {len(given)} verdicts for {len(completions)} completions")
            return [_verdict(value) for value in given]
        except Exception as error:
            # The user's values: of any type, and what they are asked may raise anything.
            return [_failed(error) for _ in completions]

    async def _call(self, prompt: Prompt, completions: Sequence[Completion]) -> Sequence[Verdict | float]:
        if inspect.iscoroutinefunction(self._reward.score):
            return await asyncio.wait_for(self._reward.score(prompt, completions), self._timeout_s)
        async with self._free:
            call = asyncio.get_running_loop().run_in_executor(self._thread, self._reward.score, prompt, completions)
            try:
                given = await asyncio.wait_for(call, self._timeout_s)
            except TimeoutError:
                self._thread.shutdown(wait=False)
                self._thread = ThreadPoolExecutor(max_workers=1)
                raise
        return await asyncio.wait_for(given, self._timeout_s) if inspect.isawaitable(given) else given


def _failed(error: BaseException) -> Verdict:
    return Verdict.unscored(Outcome.ERROR, " ".join(f"{type(error).__name__}: {error}".split()))


def _verdict(value: Verdict | float) -> Verdict:
    if isinstance(value, Verdict) and value.outcome is not Outcome.SCORED:
        return value
    reward = value.reward if isinstance(value, Verdict) else value
    if not math.isfinite(reward):
        return Verdict.unscored(Outcome.ERROR, f"score returned {reward}; raise where a completion cannot be scored")
    return value if isinstance(value, Verdict) else Verdict.from_reward(value)
