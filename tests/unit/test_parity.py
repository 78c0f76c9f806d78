"""What parity compares, and which differences end a run."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ObjectLostError

from maspo_ray.config import RolloutConfig
from maspo_ray.errors import ActorGone, RunError
from maspo_ray.evaluation.parity import ParityBounds, ParityProbe, difference, join_parities
from maspo_ray.experience import Completion, Parity, Prompt, SampledGroup, VersionSpan
from maspo_ray.hosts.messages import Priority


def test_difference_is_over_the_tokens() -> None:
    # |Δ| is 0.5, 0.25 and 0.0: largest 0.5, mean 0.75 / 3 = 0.25.
    a, b = np.array([-1.0, -2.0, -3.0], np.float32), np.array([-1.5, -1.75, -3.0], np.float32)
    assert difference(a, b) == Parity(0.5, 0.25, 3)


def test_join_parities_weighs_by_tokens_and_keeps_the_largest() -> None:
    # (0.1 · 1 + 0.4 · 3) / 4 = 0.325
    assert join_parities([Parity(0.1, 0.1, 1), Parity(0.5, 0.4, 3)]) == Parity(0.5, pytest.approx(0.325), 4)


def test_join_parities_of_a_nan_is_nan_wherever_it_stands() -> None:
    odd = Parity(math.nan, math.nan, 1)
    for parities in ([odd, Parity(0.1, 0.1, 1)], [Parity(0.1, 0.1, 1), odd]):
        assert math.isnan(join_parities(parities).max) and math.isnan(join_parities(parities).mean)


def test_bound_in_float32_is_on_the_largest_and_names_the_engine() -> None:
    bounds = ParityBounds("float32", None)
    bounds.check(4, {0: Parity(9e-4, 1e-5, 8), 1: Parity(1e-3, 1e-5, 8)})
    with pytest.raises(RunError, match=r"^parity is 0.0011 between the learner and rollout/1 at version 5; the max "):
        bounds.check(5, {0: Parity(9e-4, 1e-5, 8), 1: Parity(1.1e-3, 1e-5, 8)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bound_of_what_is_not_a_number_ends_the_run(dtype: Any) -> None:
    with pytest.raises(RunError, match="^parity is nan"):
        ParityBounds(dtype, None).check(1, {0: Parity(math.nan, math.nan, 300)})


def test_bound_in_bfloat16_is_three_times_what_it_was_at_the_start() -> None:
    bounds = ParityBounds("bfloat16", None)
    bounds.check(0, {0: Parity(0.3, 0.01, 256)})
    bounds.check(1, {0: Parity(0.3, 0.029, 256)})
    with pytest.raises(RunError, match=r"may be at most 0.03\."):
        bounds.check(2, {0: Parity(0.3, 0.031, 256)})


def test_bound_in_bfloat16_that_begins_at_zero_allows_for_rounding() -> None:
    bounds = ParityBounds("bfloat16", None)
    bounds.check(0, {0: Parity(0.0, 0.0, 256)})
    bounds.check(1, {0: Parity(0.1, 0.0078, 256)})
    with pytest.raises(RunError, match=r"may be at most 0.00781\."):
        bounds.check(2, {0: Parity(0.1, 0.0079, 256)})


def test_bound_in_bfloat16_waits_for_tokens_enough_to_say_something_of_a_mean() -> None:
    bounds = ParityBounds("bfloat16", None)
    bounds.check(0, {0: Parity(0.3, 0.01, 256)})
    # One odd token of eight: (8 · 0.05 + 248 · 0.01) / 256 = 0.01125.
    bounds.check(1, {0: Parity(0.3, 0.05, 8)})
    bounds.check(2, {0: Parity(0.3, 0.01, 248)})
    bounds.check(3, {0: Parity(0.3, 0.05, 128)})
    with pytest.raises(RunError, match=r"^parity is 0.05 "):
        bounds.check(4, {0: Parity(0.3, 0.05, 128)})


def test_bound_in_bfloat16_of_a_wrong_engine_ends_the_run_at_once() -> None:
    with pytest.raises(RunError, match=r"^parity is 0.11 .* may be at most 0.1\."):
        ParityBounds("bfloat16", None).check(0, {0: Parity(0.3, 0.11, 8)})


@pytest.mark.parametrize(
    ("dtype", "bound", "within", "beyond", "distance"),
    # Of the other statistic, and of outliers in bfloat16, nothing is said.
    [
        ("float32", None, Parity(1e-3, 1e-4, 300), Parity(1.1e-3, 1e-4, 300), "0.0011"),
        ("bfloat16", None, Parity(0.8, 0.1, 300), Parity(0.8, 0.101, 300), "0.101"),
        ("float32", 0.25, Parity(0.25, 0.2, 300), Parity(0.26, 0.2, 300), "0.26"),
        ("bfloat16", 0.25, Parity(0.8, 0.25, 300), Parity(0.8, 0.26, 300), "0.26"),
    ],
)
def test_bound_follows_the_dtype_unless_the_config_sets_it(
    dtype: Any, bound: float | None, within: Parity, beyond: Parity, distance: str
) -> None:
    ParityBounds(dtype, bound).check(7, {0: within})
    with pytest.raises(RunError, match=rf"^parity is {distance} between the learner and rollout/3 at version 7; the "):
        ParityBounds(dtype, bound).check(7, {3: beyond})


def test_probe_lets_each_engine_sample_each_prompt_and_compares_it_by_itself() -> None:
    prompts = [Prompt(f"p/{i}", "", np.arange(2 + i, dtype=np.int32), None) for i in range(2)]
    asked: list[tuple[int, int, int]] = []

    class _Pool:
        async def sample(
            self, prompt: Prompt, sampling: Any, seeds: Any, priority: Any, *, scored: bool, replica: int
        ) -> Any:
            assert (priority, scored, len(seeds)) == (Priority.PROBE, False, 1)
            asked.append((replica, len(prompt.token_ids), sampling.max_new_tokens))
            logprobs = np.full(3, -1.0 - replica / 10, np.float32)
            completion = Completion(np.zeros(3, np.int32), logprobs, (VersionSpan(0, 0, 3),), "stop", "")

            async def payload() -> SampledGroup:
                return SampledGroup(prompt, (completion,))

            return SimpleNamespace(payload=payload())

    class _Learner:
        async def logprobs(self, pairs: Any) -> Any:
            return [np.full(len(completion), -1.0, np.float32) for _, completion in pairs]

    pool: Any = _Pool()
    probe = ParityProbe(pool, _Learner(), prompts, RolloutConfig(max_new_tokens=200))
    found = asyncio.run(probe.compare([0, 2]))
    assert sorted(asked) == [(0, 2, 64), (0, 3, 64), (2, 2, 64), (2, 3, 64)]
    assert found[0] == Parity(0.0, 0.0, 6)
    assert (found[2].tokens, found[2].max) == (6, pytest.approx(0.2, abs=1e-6))


def test_probe_of_which_a_part_fails_leaves_nothing_running() -> None:
    class _Pool:
        async def sample(self, *_: Any, replica: int, **__: Any) -> Any:
            if replica == 1:
                raise RunError("rollout/1 was lost")
            await asyncio.Event().wait()

    async def test() -> int:
        pool: Any = _Pool()
        learner: Any = None
        prompts = [Prompt("p/0", "", np.arange(2, dtype=np.int32), None)]
        with pytest.RaisesGroup(pytest.RaisesExc(RunError, match="^rollout/1 was lost$")):
            await ParityProbe(pool, learner, prompts, RolloutConfig()).compare([0, 1])
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(test()) == 0


def test_probe_whose_completion_is_lost_names_the_engine() -> None:
    class _Pool:
        async def sample(self, *_: Any, **__: Any) -> Any:
            async def payload() -> SampledGroup:
                raise ObjectLostError("0" * 56, "", "")

            return SimpleNamespace(payload=payload())

    pool: Any = _Pool()
    learner: Any = None
    prompts = [Prompt("p/0", "", np.arange(2, dtype=np.int32), None)]
    with pytest.RaisesGroup(
        pytest.RaisesExc(ActorGone, match="^rollout/3 lost an object while handing on a completion: ")
    ):
        asyncio.run(ParityProbe(pool, learner, prompts, RolloutConfig()).compare([3]))
