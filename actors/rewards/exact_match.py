"""Reward 1 where the completion's text is exactly the answer, else 0."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from maspo_ray.config import RewardConfig
from maspo_ray.errors import ConfigError
from maspo_ray.experience import Completion, Prompt, Verdict

ANSWER_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def answer_regex(pattern: str, key: str) -> re.Pattern[str]:
    """Returns a compiled pattern whose one group encloses the answer.

    Args:
        key: the pattern's key in the config, for errors.

    Raises:
        ConfigError: the pattern is no regular expression, or does not have exactly one group.
    """
    try:
        regex = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{key} is {pattern!r}; it is not a regular expression ({error}). Mend it.") from None
    if regex.groups != 1:
        raise ConfigError(
            f"{key} is {pattern!r}; it has {regex.groups} groups, it needs one, around the answer. Mend it."
        )
    return regex


def last_answer(regex: re.Pattern[str], text: str) -> str | None:
    """Returns the group's text at the last match, stripped; None where nothing matches."""
    matches = list(regex.finditer(text))
    return matches[-1].group(1).strip() if matches and matches[-1].group(1) is not None else None


class ExactMatchReward:
    """Compares stripped texts. See `maspo_ray.protocols.RewardActor`."""

    def __init__(self, ignore_case: bool = False, pattern: str | None = None) -> None:
        """Args:
        ignore_case: `Yes` and `yes` are the same answer.
        pattern: regular expression with one group, e.g. `answer is (\\d+)`; its last match is compared in place of
            the whole text, and a completion without a match is wrong.
        """
        self._ignore_case = ignore_case
        self._regex = None if pattern is None else answer_regex(pattern, "reward.args.pattern")

    @staticmethod
    def check_config(reward: RewardConfig) -> None:
        ExactMatchReward(**reward.args)

    def check_answer(self, answer: Any, metadata: Mapping[str, Any]) -> str | None:
        """Returns why an answer cannot be compared with: a number with a fraction, for one, has no one way to be written."""
        if type(answer) is int or (isinstance(answer, str) and answer.strip()):
            return None
        return "ExactMatchReward takes a text that is not blank, or a whole number"

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns 1.0 or 0.0 for each completion.

        Raises:
            ValueError: the prompt has no answer to compare with.
        """
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.prompt_id} has no answer")
        answer = self._folded(str(prompt.answer).strip())
        return [Verdict.from_reward(float(self._said(completion.text) == answer)) for completion in completions]

    def _said(self, text: str) -> str | None:
        said = text.strip() if self._regex is None else last_answer(self._regex, text)
        return None if said is None else self._folded(said)

    def _folded(self, text: str) -> str:
        return text.casefold() if self._ignore_case else text
