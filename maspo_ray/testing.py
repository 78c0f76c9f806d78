"""For those who write a reward: test it against the protocol without starting a run.

Promise: `check_reward_actor` calls the actor as a run does, a sync `score` off the main thread, completions of a prompt together and
one by one, and fails with what a run would have stumbled over. Starts no Ray.
"""

import asyncio
import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from maspo_ray.experience import Completion, Outcome, Prompt, Verdict, VersionSpan
from maspo_ray.protocols import RewardActor


def make_prompt(text: str, answer: Any, metadata: dict[str, Any] | None = None, prompt_id: str = "test/0") -> Prompt:
    """Returns a prompt as a reward receives it; its token ids are the text's bytes."""
    return Prompt(prompt_id, text, _byte_ids(text), answer, metadata or {})


def make_completion(text: str, finish_reason: str = "stop") -> Completion:
    """Returns a completion as a reward receives it; its token ids are the text's bytes."""
    token_ids = _byte_ids(text)
    logprobs = np.full(len(token_ids), -1.0, dtype=np.float32)
    return Completion(token_ids, logprobs, (VersionSpan(0, 0, len(token_ids)),), finish_reason, text)


def _byte_ids(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def check_reward_actor(actor: RewardActor, cases: Sequence[tuple[Prompt, str, float]]) -> None:
    """Runs a reward actor over cases and compares.

    Args:
        actor: as its constructor left it; `setup` is called here.
        cases: prompt, completion's text, expected reward. Expect NaN where the actor is to return an unscored verdict.

    Raises:
        AssertionError: a verdict is missing, of a wrong type, not finite, not the one expected, or depends on what else is
            scored in the same call. What the actor itself raises comes through.
    """
    assert cases, "give at least one case"
    asyncio.run(_check(actor, cases))


async def _check(actor: RewardActor, cases: Sequence[tuple[Prompt, str, float]]) -> None:
    setup = getattr(actor, "setup", None)
    if setup is not None:
        result = setup()
        if inspect.isawaitable(result):
            await result
    together: dict[int, list[tuple[Prompt, str, float]]] = {}
    for case in cases:
        together.setdefault(id(case[0]), []).append(case)
    for group in together.values():
        await _check_call(actor, group)
    for case in cases:
        await _check_call(actor, [case])


async def _check_call(actor: RewardActor, group: Sequence[tuple[Prompt, str, float]]) -> None:
    prompt = group[0][0]
    given = await _scored(actor, prompt, tuple(make_completion(text) for _, text, _ in group))
    assert isinstance(given, Sequence), f"score returned a {type(given).__name__}; it must return a list."
    assert len(given) == len(group), f"score returned {len(given)} verdicts for {len(group)} completions."
    for value, (_, text, expected) in zip(given, group, strict=True):
        what = f"prompt {prompt.text!r}, completion {text!r}"
        reward = _reward(value, what)
        same = (
            math.isnan(expected) if math.isnan(reward) else math.isclose(reward, expected, rel_tol=1e-6, abs_tol=1e-9)
        )
        assert same, f"{what}: the reward is {reward}, expected {expected}."


def _reward(value: object, what: str) -> float:
    """Returns the reward of a verdict or of a bare number; NaN only of a verdict that says why."""
    if isinstance(value, Verdict):
        if value.outcome is not Outcome.SCORED:
            assert value.cause, (
                f"{what}: the verdict is {value.outcome} without a cause. Say why it could not be scored."
            )
            return math.nan
        value = value.reward
    assert isinstance(value, Real), f"{what}: score gave a {type(value).__name__}; it must give a Verdict or a number."
    reward = float(value)
    assert math.isfinite(reward), f"{what}: the reward is {reward}. Raise where a completion cannot be scored."
    return reward


async def _scored(actor: RewardActor, prompt: Prompt, completions: Sequence[Completion]) -> object:
    if inspect.iscoroutinefunction(actor.score):
        return await actor.score(prompt, completions)
    return await asyncio.to_thread(actor.score, prompt, completions)
