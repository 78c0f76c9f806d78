"""Runs a user's reward inside its actor: sync or async, floats or verdicts, with a deadline.

Promise: whatever the reward does, each completion gets one `Verdict`; an exception, a missed deadline or a NaN is never turned into
a reward. A sync reward that misses its deadline keeps its thread until it returns; the next call gets a thread of its own.
"""

import asyncio
import inspect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from maspo_ray.experience import Completion, Outcome, Prompt, Verdict


class RewardHost:
    """Holds one reward actor of the user's class. All calls to it come through here."""

    def __init__(self, reward_class: type, args: dict[str, Any], timeout_s: float) -> None:
        self._reward = reward_class(**args)
        self._timeout_s = timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._free = asyncio.Semaphore(1)

    async def setup(self) -> None:
        setup = getattr(self._reward, "setup", None)
        if setup is not None:
            result = setup()
            if inspect.isawaitable(result):
                await result

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns a verdict for each completion."""
        try:
            given = await self._call(prompt, completions)
            if len(given) != len(completions):
                raise ValueError(f"score returned {len(given)} verdicts for {len(completions)} completions")
            return [_verdict(value) for value in given]
        except TimeoutError:
            cause = f"no verdict within reward.timeout_s ({self._timeout_s:g} s)"
            return [Verdict.unscored(Outcome.TIMEOUT, cause) for _ in completions]
        except Exception as error:
            # The user's code: any error costs these completions, and the controller counts it.
            cause = f"{type(error).__name__}: {error}"
            return [Verdict.unscored(Outcome.ERROR, cause) for _ in completions]

    async def _call(self, prompt: Prompt, completions: Sequence[Completion]) -> Sequence[Verdict | float]:
        if inspect.iscoroutinefunction(self._reward.score):
            return await asyncio.wait_for(self._reward.score(prompt, completions), self._timeout_s)
        async with self._free:
            call = asyncio.get_running_loop().run_in_executor(self._thread, self._reward.score, prompt, completions)
            try:
                return await asyncio.wait_for(call, self._timeout_s)
            except TimeoutError:
                self._thread.shutdown(wait=False)
                self._thread = ThreadPoolExecutor(max_workers=1)
                raise


def _verdict(value: Verdict | float) -> Verdict:
    if isinstance(value, Verdict):
        return value
    if not math.isfinite(value):
        return Verdict.unscored(Outcome.ERROR, f"score returned {value}; raise where a completion cannot be scored")
    return Verdict.from_reward(value)
