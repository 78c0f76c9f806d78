"""The built-in rewards: what counts as right, what as wrong, and what cannot be scored."""

import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest

from actors.rewards.exact_match import ExactMatchReward
from actors.rewards.math_verify import MathVerifyReward
from actors.rewards.reasoning_gym import ReasoningGymReward
from maspo_ray.config import ReasoningGymSource
from maspo_ray.data.sources import read_source
from maspo_ray.errors import ConfigError
from maspo_ray.experience import Prompt, Verdict
from maspo_ray.protocols import ChecksAnswers, RewardActor
from maspo_ray.testing import make_completion, make_prompt


def _verdicts(actor: RewardActor, prompt: Prompt, *texts: str) -> list[Verdict]:
    given = actor.score(prompt, [make_completion(text) for text in texts])
    assert isinstance(given, list)
    return given


def _rewards(actor: RewardActor, answer: Any, *texts: str) -> list[float]:
    return [verdict.reward for verdict in _verdicts(actor, make_prompt("q", answer), *texts)]


def _gym_prompt(task: str, args: dict[str, Any] | None = None) -> Prompt:
    row = read_source(ReasoningGymSource(task=task, size=1, seed=3, args=args or {}), "data.train").rows[0]
    return make_prompt(row.text, row.answer, row.metadata)


@pytest.mark.parametrize(
    "actor", [ExactMatchReward(pattern="x(.)"), MathVerifyReward(), ReasoningGymReward(answer_pattern="x(.)")]
)
def test_reward_actor_is_picklable(actor: RewardActor) -> None:
    assert type(pickle.loads(pickle.dumps(actor))) is type(actor)


def test_reward_modules_import_no_library_before_setup() -> None:
    names = "actors.rewards.exact_match, actors.rewards.math_verify, actors.rewards.reasoning_gym"
    code = (
        f"import sys, {names}; print(sorted({{'sympy', 'math_verify', 'reasoning_gym', 'torch'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Exact match.


def test_exact_match_compares_stripped_texts_in_order() -> None:
    assert _rewards(ExactMatchReward(), " 85 ", "85", "85\n", "58", "85.", "") == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_exact_match_answer_that_is_a_number_is_compared_as_text() -> None:
    assert _rewards(ExactMatchReward(), 85, "85", "85.0") == [1.0, 0.0]


def test_exact_match_case_counts_unless_ignored() -> None:
    assert _rewards(ExactMatchReward(), "Yes", "yes", "Yes") == [0.0, 1.0]
    assert _rewards(ExactMatchReward(ignore_case=True), "Yes", "YES", "no") == [1.0, 0.0]


def test_exact_match_pattern_takes_the_last_match_and_none_is_wrong() -> None:
    actor = ExactMatchReward(pattern=r"answer is\s*([^.]*)")
    texts = ("the answer is 3. No, the answer is 7 .", "the answer is 7. No, the answer is 3.", "7")
    assert _rewards(actor, "7", *texts) == [1.0, 0.0, 0.0]


def test_exact_match_pattern_reads_over_line_ends() -> None:
    assert _rewards(ExactMatchReward(pattern="<a>(.*?)</a>"), "1\n2", "so <a>\n1\n2\n</a>") == [1.0]


def test_exact_match_verdict_is_correct_where_the_reward_is_1() -> None:
    assert [v.correct for v in _verdicts(ExactMatchReward(), make_prompt("q", "7"), "7", "8")] == [True, False]


def test_exact_match_no_answer_raises_rather_than_scores() -> None:
    with pytest.raises(ValueError, match="prompt test/0 has no answer"):
        _rewards(ExactMatchReward(), None, "None")


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [("(", "it is not a regular expression"), ("a", "it has 0 groups, it needs one"), ("(a)(b)", "it has 2 groups")],
)
def test_exact_match_wrong_pattern_is_refused_when_made(pattern: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ExactMatchReward(pattern=pattern)
    assert str(caught.value).startswith(f"reward.args.pattern is {pattern!r}; {rule}")


# Math-verify.


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("72", "The answer is 72.", "The answer is 73."),
        (72, "\\boxed{72}", "\\boxed{27}"),
        ("\\frac{1}{2}", "so it is $0.5$", "so it is $0.2$"),
        ("1/2", "\\boxed{\\frac12}", "\\boxed{2}"),
        ("2\\pi", "\\boxed{2\\pi}", "2"),
        ("x^2+1", "$1+x^2$", "$x^2-1$"),
        ("\\boxed{7}", "7", "8"),
        ("$\\sqrt{2}$", "<answer>\\sqrt{2}</answer>", "<answer>2</answer>"),
        ("1,000", "1000", "1"),
        ("72", "first $5$, then <answer>72</answer>", "<answer>5</answer> and not 72"),
        (1e-05, "0.00001", "0.0001"),
    ],
)
def test_math_verify_equal_mathematics_is_right_and_other_wrong(answer: Any, right: str, wrong: str) -> None:
    assert _rewards(MathVerifyReward(), answer, right, wrong) == [1.0, 0.0]


@pytest.mark.parametrize("text", ["", "I do not know.", "\\boxed{", "<answer></answer>", "\\frac{1}{"])
def test_math_verify_completion_without_mathematics_is_wrong_not_unscored(text: str) -> None:
    (verdict,) = _verdicts(MathVerifyReward(), make_prompt("q", "123"), text)
    assert (verdict.reward, verdict.correct, verdict.outcome) == (0.0, False, "scored")


@pytest.mark.parametrize("answer", ["", None, "\\frac{"])
def test_math_verify_answer_that_cannot_be_read_raises(answer: str | None) -> None:
    with pytest.raises(ValueError, match="prompt test/0 has the answer .* which math-verify cannot read"):
        _rewards(MathVerifyReward(), answer, "7", str(answer))


def test_math_verify_scores_off_the_main_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(_rewards, MathVerifyReward(), "1/2", "$0.5$", "$0.6$").result() == [1.0, 0.0]


def test_math_verify_after_setup_does_not_warn_of_its_timeouts() -> None:
    # In a process of its own: math-verify warns once in each.
    code = (
        "from actors.rewards.math_verify import MathVerifyReward as R; from maspo_ray.testing import *; actor = R(); "
        "actor.setup(); print(actor.score(make_prompt('q', '1'), [make_completion('1')])[0].reward)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), "Timeout" in done.stderr) == ("1.0", False)


# Reasoning-gym.


@pytest.mark.parametrize("task", ["chain_sum", "letter_counting", "simple_equations", "gcd", "count_bits"])
def test_reasoning_gym_the_entrys_answer_is_right_in_any_wrapping(task: str) -> None:
    prompt = pickle.loads(pickle.dumps(_gym_prompt(task)))
    right = str(prompt.answer)
    texts = (right, f"\n{right} ", f"thinking <answer>0</answer> <answer> {right}\n</answer>", "")
    verdicts = _verdicts(ReasoningGymReward(), prompt, *texts)
    assert [v.reward for v in verdicts] == [1.0, 1.0, 1.0, 0.0]
    assert [v.correct for v in verdicts] == [True, True, True, False]


def test_reasoning_gym_partial_score_is_the_reward_and_the_threshold_decides_on_correct() -> None:
    # chain_sum: the oracle's length over the answer's, where the oracle is within: for "<2 characters>" in 8, 2/8.
    prompt = make_prompt("q", "85", {"task": "chain_sum", "args": {}, "entry": {"answer": "85"}})
    (strict,) = _verdicts(ReasoningGymReward(), prompt, "it is 85")
    (lenient,) = _verdicts(ReasoningGymReward(threshold=0.25), prompt, "it is 85")
    assert (strict.reward, strict.correct) == (0.25, False)
    assert (lenient.reward, lenient.correct) == (0.25, True)


def test_reasoning_gym_answer_pattern_takes_its_last_match() -> None:
    prompt = _gym_prompt("chain_sum")
    actor = ReasoningGymReward(answer_pattern=r"= *(-?\d+)")
    texts = (f"1 = 1, so = {prompt.answer}.", f"{prompt.answer} without a sign")
    assert [v.reward for v in _verdicts(actor, prompt, *texts)] == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"^reward.args.answer_pattern is '\\\\d'; it has 0 groups"):
        ReasoningGymReward(answer_pattern=r"\d")


def test_reasoning_gym_scores_by_the_tasks_own_args() -> None:
    # decimal_arithmetic allows one unit of the last place: of 1 place |1.05 - 1| = 0.05 is within 0.1, of 6 it is not within 1e-6.
    actor, rewards = ReasoningGymReward(), []
    for places in (1, 6):
        args = {"min_num_decimal_places": 1, "max_num_decimal_places": places}
        prompt = make_prompt("q", "1", {"task": "decimal_arithmetic", "args": args, "entry": {"answer": "1"}})
        rewards.append(_verdicts(actor, prompt, "1.05")[0].reward)
    assert rewards == [1.0, 0.0]


def test_reasoning_gym_answer_that_its_scorer_cannot_read_is_wrong() -> None:
    # The scorer of prime_factorization raises on what is no number.
    prompt = _gym_prompt("prime_factorization")
    assert [v.reward for v in _verdicts(ReasoningGymReward(), prompt, "abc", str(prompt.answer))] == [0.0, 1.0]


def test_reasoning_gym_scorer_that_fails_on_its_own_answer_raises() -> None:
    prompt = _gym_prompt("prime_factorization")
    broken = prompt.metadata | {"entry": {"answer": "no number"}}
    with pytest.raises(ValueError):
        _verdicts(ReasoningGymReward(), make_prompt("q", "", broken), "abc")


def test_reasoning_gym_prompt_of_other_data_raises() -> None:
    with pytest.raises(
        ValueError, match="prompt test/0 has no reasoning-gym entry; ReasoningGymReward needs data of kind"
    ):
        _rewards(ReasoningGymReward(), "7", "7")


# Which answers a reward takes.


@pytest.mark.parametrize(
    ("reward", "taken", "refused"),
    [
        (ExactMatchReward(), ["7", "a b", 7, -1], [None, "", " \n", 7.0, True, ["7"], {"a": 1}, Decimal(7)]),
        (MathVerifyReward(), ["7", "\\frac12", 7, 0.5, 1e-9], [None, "", " ", math.nan, math.inf, True, ["7"], ("1", "2"), {"a": 1}]),
    ],
)  # fmt: skip
def test_reward_says_which_answers_it_takes(reward: ChecksAnswers, taken: list[Any], refused: list[Any]) -> None:
    assert [reward.check_answer(answer, {}) for answer in taken] == [None] * len(taken)
    for answer in refused:
        cause = reward.check_answer(answer, {})
        assert cause is not None and cause.startswith(f"{type(reward).__name__} takes a "), answer


def test_reasoning_gym_takes_its_own_prompts_alone() -> None:
    prompt = _gym_prompt("chain_sum")
    assert ReasoningGymReward().check_answer(prompt.answer, prompt.metadata) is None
    cause = "ReasoningGymReward needs data of kind reasoning_gym"
    assert ReasoningGymReward().check_answer(prompt.answer, {}) == cause
    assert ReasoningGymReward().check_answer(prompt.answer, prompt.metadata | {"entry": None}) == cause
