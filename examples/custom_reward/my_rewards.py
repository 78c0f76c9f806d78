"""A reward of one's own: a class with a `score` method, named in the config as `my_rewards:DigitsReward`.

Numbers are graded: the right one earns 1, another number a little, anything else nothing. The little keeps a young model writing
numbers until it finds right ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maspo_ray.experience import Completion, Prompt, Verdict


class DigitsReward:
    """The constructor receives `reward.args` of the config; it runs in the reward's own process, so keep it cheap.

    A class may also have a `setup(self)`, called once before the first completion, for what takes long: loading a model,
    opening a connection.
    """

    def __init__(self, number_reward: float = 0.1) -> None:
        self._number_reward = number_reward

    def check_answer(self, answer: Any, metadata: Mapping[str, Any]) -> str | None:
        """Returns why an answer of the data cannot be compared with, None where it can; optional.

        It is asked for each row before a run starts, so that a wrong column is named at once.
        """
        if type(answer) is int or (isinstance(answer, str) and answer.strip()):
            return None
        return "DigitsReward takes a whole number, or a text that is not blank"

    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns a verdict for each completion, in order.

        It is async for the sake of the example: such a reward can await a sandbox or a judge's server while others are scored. A
        plain `def score` works too, and so does a list of numbers in place of verdicts (above 0.5 is correct). Raise where a
        completion cannot be scored: it is then left out of its group, not counted as wrong.
        """
        return [self._grade(completion.text.strip(), str(prompt.answer).strip()) for completion in completions]

    def _grade(self, said: str, answer: str) -> Verdict:
        if said == answer:
            return Verdict(reward=1.0, correct=True)
        is_number = said.isascii() and said.isdigit()
        return Verdict(reward=self._number_reward if is_number else 0.0, correct=False)
