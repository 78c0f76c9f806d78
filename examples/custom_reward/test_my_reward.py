"""The reward against the protocol: what `check_reward_actor` accepts, a run accepts."""

import pytest
from my_rewards import DigitsReward

from maspo_ray.testing import check_reward_actor, make_prompt


def test_digits_reward_grades_right_wrong_and_no_number() -> None:
    prompt = make_prompt("37+48=", answer="85")
    check_reward_actor(
        DigitsReward(),
        [(prompt, "85", 1.0), (prompt, " 85\n", 1.0), (prompt, "58", 0.1), (prompt, "8+5", 0.0), (prompt, "", 0.0)],
    )


def test_digits_reward_number_reward_from_the_config_is_used() -> None:
    check_reward_actor(DigitsReward(number_reward=0.25), [(make_prompt("37+48=", answer="85"), "58", 0.25)])


@pytest.mark.parametrize("answer", [None, " ", 8.5, ["85"]])
def test_digits_reward_says_which_answers_it_takes(answer: object) -> None:
    assert DigitsReward().check_answer("85", {}) is DigitsReward().check_answer(85, {}) is None
    assert DigitsReward().check_answer(answer, {}) == "DigitsReward takes a whole number, or a text that is not blank"
