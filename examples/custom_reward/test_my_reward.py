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


def test_digits_reward_prompt_without_answer_raises() -> None:
    with pytest.raises(ValueError, match="has no answer"):
        check_reward_actor(DigitsReward(), [(make_prompt("37+48=", answer=None), "85", 1.0)])
