"""What an evaluation asks for and what it comes to, with a pool of the test's own."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from maspo_ray.config import EvalConfig, RolloutConfig
from maspo_ray.evaluation.evaluator import EvalResult, Evaluator
from maspo_ray.experience import CompletionFacts, Outcome, Prompt, Sampling, Verdict
from maspo_ray.hosts.messages import Ended, Priority
from maspo_ray.rollouts.pool import Sampled

PROMPTS = [Prompt(f"p/{i}", "", np.zeros(2 + i, np.int32), str(i)) for i in range(3)]
UNSCORED = Verdict.unscored(Outcome.TIMEOUT, "slow")


class _Pool:
    """Answers with verdicts by prompt, and keeps what it was asked for."""

    def __init__(self, verdicts: dict[str, list[Verdict]], versions: dict[str, tuple[int, int]]) -> None:
        self._verdicts = verdicts
        self._versions = versions
        self.asked: list[tuple[str, Sampling, list[int], Priority]] = []

    async def sample(self, prompt: Prompt, sampling: Sampling, seeds: Sequence[int], priority: Priority) -> Sampled:
        self.asked.append((prompt.prompt_id, sampling, list(seeds), priority))
        await asyncio.sleep(0)
        verdicts = self._verdicts[prompt.prompt_id]
        facts = CompletionFacts(4, *self._versions.get(prompt.prompt_id, (3, 3)), "stop")
        return Sampled("payload", 0, Ended((facts,) * len(verdicts), tuple(verdicts)))


def _evaluate(pool: Any, samples: int = 2, seed: int = 1) -> EvalResult:
    config = EvalConfig(samples=samples, temperature=0.7)
    return asyncio.run(Evaluator(pool, PROMPTS, config, RolloutConfig(max_new_tokens=9), seed).evaluate())


def test_evaluation_accuracy_is_the_mean_over_scored_samples() -> None:
    right, wrong = Verdict.from_reward(1.0), Verdict.from_reward(0.0)
    pool = _Pool({"p/0": [right, wrong], "p/1": [right, UNSCORED], "p/2": [wrong, UNSCORED]}, {})
    # Of four that could be scored two are right.
    assert _evaluate(pool) == EvalResult(0.5, 3, 2, 2, 3, 3)


def test_evaluation_of_which_nothing_could_be_scored_has_no_accuracy() -> None:
    result = _evaluate(_Pool({prompt.prompt_id: [UNSCORED] * 2 for prompt in PROMPTS}, {}))
    assert math.isnan(result.accuracy) and result.unscored == 6


def test_evaluation_takes_the_same_seeds_each_time_others_for_each_sample_and_goes_first() -> None:
    asked = []
    for _ in range(2):
        pool = _Pool({prompt.prompt_id: [UNSCORED] * 2 for prompt in PROMPTS}, {})
        _evaluate(pool)
        asked.append(pool.asked)
    assert asked[0] == asked[1]
    seeds = [seed for _, _, own, _ in asked[0] for seed in own]
    assert len(set(seeds)) == 6
    assert {(sampling, priority) for _, sampling, _, priority in asked[0]} == {(Sampling(0.7, 9), Priority.PROBE)}
    pool = _Pool({prompt.prompt_id: [UNSCORED] * 2 for prompt in PROMPTS}, {})
    _evaluate(pool, seed=2)
    assert not set(seeds) & {seed for _, _, own, _ in pool.asked for seed in own}


@pytest.mark.parametrize("versions", [{"p/1": (3, 5)}, {"p/0": (2, 3), "p/2": (4, 6)}])
def test_evaluation_says_which_versions_sampled_it(versions: dict[str, tuple[int, int]]) -> None:
    result = _evaluate(_Pool({prompt.prompt_id: [UNSCORED] for prompt in PROMPTS}, versions), samples=1)
    of_all = [*versions.values(), (3, 3)]
    assert (result.min_version, result.max_version) == (min(v for v, _ in of_all), max(v for _, v in of_all))
