"""What a scored group becomes: its sampler is told, its rewards are shaped, what was cut off is left out; without engines or Ray."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from maspo_ray.config import RunConfig
from maspo_ray.data.samplers import PassRateSampler
from maspo_ray.data.stream import PromptStream
from maspo_ray.experience import CompletionFacts, Experience, Outcome, Prompt, Rollout, Verdict
from maspo_ray.groups.intake import Intake
from maspo_ray.groups.late_policy import DropStale
from maspo_ray.hosts.messages import Ended
from maspo_ray.pipeline.producer import Producer
from maspo_ray.rollouts.pool import Sampled

MAX_NEW_TOKENS = 8


class _Group:
    """A producer whose groups all have the same rollouts, as many as may start."""

    def __init__(self, rollouts: list[Rollout], source: str = "", **sections: Any) -> None:
        tree = {
            "model": {"path": "org/model"},
            "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}, "max_prompt_tokens": 8},
            "rollout": {"group_size": len(rollouts), "max_new_tokens": MAX_NEW_TOKENS},
            "advantage": {"kind": "dr_grpo"},
            **sections,
        }
        self.sampler = PassRateSampler(1, shuffle=False, seed=0)
        prompts = [Prompt("train/0", "a", np.zeros(3, dtype=np.int32), None, source=source)]
        self.ledger: list[dict[str, Any]] = []

        async def sample(*_: Any, **__: Any) -> Sampled:
            facts, verdicts = zip(*rollouts, strict=True)
            return Sampled("payload", 0, Ended(facts, verdicts))

        async def logprobs(group: Any) -> None:
            return None

        config = RunConfig.model_validate(tree)
        pipeline = config.pipeline
        self.intake = Intake(
            pipeline.groups_per_step,
            pipeline.max_staleness,
            pipeline.steps,
            DropStale(pipeline.max_staleness),
            self.ledger.append,
        )
        self.producer = Producer(
            config,
            cast(Any, SimpleNamespace(sample=sample)),
            cast(Any, SimpleNamespace(logprobs=logprobs)),
            PromptStream(prompts, self.sampler, shuffle=False, seed=0),
            self.intake,
        )
        asyncio.run(self._run())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            producer = tasks.create_task(self.producer.run(tasks))
            # One turn in which every group that there is capacity for is drawn, then theirs.
            await asyncio.sleep(0)
            producer.cancel()

    @property
    def experience(self) -> Experience:
        batch = self.intake.take()
        assert batch is not None
        return batch[0]

    @property
    def metrics(self) -> dict[str, float]:
        return self.producer.take_metrics().reduce()

    @property
    def causes(self) -> set[str]:
        return {row["cause"] for row in self.ledger}


def _rollout(reward: float, num_tokens: int = 4, finish_reason: str = "stop") -> Rollout:
    verdict = Verdict.unscored(Outcome.ERROR, "no") if math.isnan(reward) else Verdict.from_reward(reward)
    return Rollout(CompletionFacts(num_tokens, 0, 0, finish_reason), verdict)


def test_group_advantages_are_of_rewards_less_the_penalty_and_the_metrics_of_the_verdicts() -> None:
    rollouts = [
        _rollout(1.0),
        _rollout(1.0, 7),
        _rollout(0.0, 8, "length"),
        _rollout(math.nan, 8, "length"),
    ]
    group = _Group(rollouts, reward={"overlong": {"buffer_tokens": 4, "penalty": 0.8}})
    # Penalties: 0, 0.8 · (7 − 4) / 4 = 0.6, 0.8. Rewards 1, 0.4, −0.8, of mean 0.2.
    assert group.experience.advantages == pytest.approx((0.8, 0.2, -1.0, None))
    metrics = group.metrics
    assert metrics["reward/mean"] == metrics["reward/accuracy"] == pytest.approx(2 / 3)
    assert metrics["reward/overlong_penalty"] == pytest.approx(1.4 / 3)
    assert metrics["completion/cut_off_share"] == 0.5
    assert metrics["completion/left_out_share"] == 0.25


def test_group_of_a_mixs_source_counts_in_that_sources_columns_and_the_others_are_there() -> None:
    source = {"kind": "jsonl", "path": "rows.jsonl"}
    data = {"train": {"kind": "mix", "sources": {"sums": source, "words": source}}, "max_prompt_tokens": 8}
    rollouts = [_rollout(1.0), _rollout(0.25), _rollout(0.25), _rollout(math.nan)]
    metrics = _Group(rollouts, "sums", data=data, pipeline={"groups_per_step": 3, "max_staleness": 0}).metrics
    assert metrics["source/sums/groups"] == 3
    assert metrics["source/sums/reward"] == metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["source/sums/accuracy"] == metrics["reward/accuracy"] == pytest.approx(1 / 3)
    assert metrics["source/words/groups"] == 0
    assert math.isnan(metrics["source/words/reward"]) and math.isnan(metrics["source/words/accuracy"])


def test_group_cut_off_completions_are_left_out_after_they_counted_in_the_baseline() -> None:
    rollouts = [_rollout(1.0), _rollout(0.0), _rollout(0.0, 8, "length"), _rollout(0.0, 8, "length")]
    group = _Group(rollouts, pipeline={"filter_overlong": True})
    assert group.experience.advantages == (0.75, -0.25, None, None)
    metrics = group.metrics
    assert metrics["completion/left_out_share"] == 0.5
    assert math.isnan(metrics["reward/overlong_penalty"])


@pytest.mark.parametrize(
    ("rewards", "cause"),
    [
        # The mean of 1, 0 and ½ is ½, what the one that is left has.
        ((1.0, 0.0, 0.5), "what was not cut off has no advantage"),
        ((1.0, 1.0, 1.0), "all rewards are equal"),
    ],
)
def test_group_that_is_filtered_makes_room_and_its_pass_rate_is_observed(
    rewards: tuple[float, ...], cause: str
) -> None:
    rollouts = [_rollout(rewards[0], 8, "length"), _rollout(rewards[1], 8, "length"), _rollout(rewards[2])]
    group = _Group(rollouts, pipeline={"filter_overlong": True, "groups_per_step": 1, "max_staleness": 0})
    assert group.causes == {cause} and {row["outcome"] for row in group.ledger} == {"filtered"}
    assert group.intake.capacity() == 1
    # ½ is not above ½: correct are 1 of 3, and 3 of 3.
    assert group.sampler.state()["pass_rates"] == [[0, pytest.approx(sum(reward > 0.5 for reward in rewards) / 3)]]


def test_group_observed_pass_rate_is_of_scored_completions_and_of_the_verdict() -> None:
    rollouts = [_rollout(1.0, 8, "length"), _rollout(0.0), _rollout(math.nan)]
    group = _Group(rollouts, reward={"overlong": {"buffer_tokens": 4, "penalty": 5.0}})
    assert group.sampler.state()["pass_rates"] == [[0, 0.5]]


def test_group_of_which_nothing_could_be_scored_is_not_observed() -> None:
    group = _Group([_rollout(math.nan), _rollout(math.nan)])
    assert group.sampler.state()["pass_rates"] == []
    assert group.causes == {"fewer than two completions could be scored"}
