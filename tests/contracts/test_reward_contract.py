"""`check_reward_actor` over every reward that ships, the example's included; and that it catches those that break the protocol."""

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.rewards.exact_match import ExactMatchReward
from actors.rewards.math_verify import MathVerifyReward
from actors.rewards.reasoning_gym import ReasoningGymReward
from maspo_ray.config import ReasoningGymSource, load_config
from maspo_ray.data.sources import read_source
from maspo_ray.experience import Completion, Outcome, Prompt, Verdict
from maspo_ray.fleet.loading import load_actor_class
from maspo_ray.protocols import RewardActor
from maspo_ray.testing import check_reward_actor, make_completion, make_prompt

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_reward"


def test_exact_match_keeps_the_contract() -> None:
    sum_, colour = make_prompt("37+48=", "85"), make_prompt("sky?", "blue")
    check_reward_actor(
        ExactMatchReward(), [(sum_, "85", 1.0), (sum_, "58", 0.0), (colour, "blue\n", 1.0), (colour, "", 0.0)]
    )


def test_math_verify_keeps_the_contract() -> None:
    prompt = make_prompt("half of one?", "\\frac{1}{2}")
    check_reward_actor(MathVerifyReward(), [(prompt, "\\boxed{0.5}", 1.0), (prompt, "2", 0.0), (prompt, "", 0.0)])


def test_reasoning_gym_keeps_the_contract() -> None:
    rows = read_source(ReasoningGymSource(task="chain_sum", size=2), "data.train").rows
    prompts = [make_prompt(row.text, row.answer, row.metadata) for row in rows]
    cases = [(prompt, text, reward) for prompt in prompts for text, reward in ((prompt.answer, 1.0), ("?", 0.0))]
    check_reward_actor(ReasoningGymReward(), cases)


def test_example_reward_is_loaded_by_its_config_and_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    config = load_config(EXAMPLE / "run.yaml")
    actor = load_actor_class("reward", config.reward.actor)(**config.reward.args)
    prompt = make_prompt("37+48=", "85")
    check_reward_actor(actor, [(prompt, "85", 1.0), (prompt, "58", 0.1), (prompt, "x", 0.0)])


class _ReturnsWhatItIsGiven:
    def __init__(self, given: Any) -> None:
        self._given = given

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Any:
        return self._given


class _NeedsSetup:
    async def setup(self) -> None:
        self._reward = 0.5

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [self._reward for _ in completions]


class _RanksWithinTheCall:
    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        return [1.0 - i for i in range(len(completions))]


class _SetsAnAlarm:
    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[float]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        return [0.0 for _ in completions]


CASE = (make_prompt("q", "a"), "a", 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "score returned 0 verdicts for 1 completions"),
        ([1.0, 1.0], "score returned 2 verdicts for 1 completions"),
        (1.0, "score returned a float; it must return a list"),
        (["1"], "completion 'a': score gave a str; it must give a Verdict or a number"),
        ([math.nan], "completion 'a': the reward is nan. Raise where"),
        ([Verdict(math.inf, True)], "completion 'a': the reward is inf. Raise where"),
        ([0.5], "completion 'a': the reward is 0.5, expected 1.0"),
        ([Verdict.unscored(Outcome.ERROR, "no")], "completion 'a': the reward is nan, expected 1.0"),
        ([Verdict(math.nan, False, Outcome.ERROR)], "completion 'a': the verdict is error without a cause"),
    ],
)
def test_check_reward_actor_names_what_is_wrong(given: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_reward_actor(_ReturnsWhatItIsGiven(given), [CASE])


def test_check_reward_actor_unscored_verdict_matches_an_expected_nan() -> None:
    unscored = _ReturnsWhatItIsGiven([Verdict.unscored(Outcome.TIMEOUT, "sandbox is away")])
    check_reward_actor(unscored, [(make_prompt("q", "a"), "a", math.nan)])
    with pytest.raises(AssertionError, match="the reward is 1.0, expected nan"):
        check_reward_actor(_ReturnsWhatItIsGiven([1.0]), [(make_prompt("q", "a"), "a", math.nan)])


def test_check_reward_actor_runs_async_setup_and_awaits_scores() -> None:
    check_reward_actor(_NeedsSetup(), [(make_prompt("q", "a"), "a", 0.5), (make_prompt("q", "b"), "b", 0.5)])


def test_check_reward_actor_reward_that_depends_on_its_call_is_caught() -> None:
    prompt = make_prompt("q", "a")
    with pytest.raises(AssertionError, match="expected"):
        check_reward_actor(_RanksWithinTheCall(), [(prompt, "a", 1.0), (prompt, "b", 0.0)])


def test_check_reward_actor_calls_a_sync_score_off_the_main_thread_as_a_run_does() -> None:
    with pytest.raises(ValueError, match="signal only works in main thread"):
        check_reward_actor(_SetsAnAlarm(), [CASE])


def test_check_reward_actor_without_cases_is_refused() -> None:
    actor: RewardActor = ExactMatchReward()
    with pytest.raises(AssertionError, match="at least one case"):
        check_reward_actor(actor, [])


def test_make_completion_is_consistent_with_itself() -> None:
    completion = make_completion("né")
    assert completion.token_ids.tolist() == list("né".encode())
    assert len(completion.logprobs) == 3 and (completion.logprobs < 0).all()
    assert [(span.start, span.end) for span in completion.spans] == [(0, 3)]
