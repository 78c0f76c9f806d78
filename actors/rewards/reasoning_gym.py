"""Reward of a reasoning-gym task: the score that the task's own scorer gives the completion's answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.rewards.exact_match import ANSWER_TAGS, answer_regex, last_answer
from maspo_ray.config import RewardConfig
from maspo_ray.experience import Completion, Prompt, Verdict

Scorer = Callable[[str | None, dict[str, Any]], float]


class ReasoningGymReward:
    """Scores by the task that generated the prompt. See `maspo_ray.protocols.RewardActor`.

    With `answer_pattern` the answer is its last match's group; without, what the last `<answer>...</answer>` encloses, else the whole
    text. Most tasks give a right answer with other text around it part of the score.
    """

    def __init__(self, threshold: float = 0.99, answer_pattern: str | None = None, binary: bool = False) -> None:
        """Args:
        threshold: least score of a completion that counts as correct.
        answer_pattern: regular expression with one group; a completion without a match has no answer.
        binary: give reward 1 for a correct completion and 0 for any other, as MASPO's risk controller assumes, not the score.
        """
        self._threshold = threshold
        self._binary = binary
        self._regex = None if answer_pattern is None else answer_regex(answer_pattern, "reward.args.answer_pattern")
        self._scorers: dict[str, Scorer] = {}

    @staticmethod
    def check_config(reward: RewardConfig) -> None:
        ReasoningGymReward(**reward.args)

    def setup(self) -> None:
        import reasoning_gym  # noqa: F401  (takes a second, which the first completion need not wait for)

    def check_answer(self, answer: Any, metadata: Mapping[str, Any]) -> str | None:
        """Returns why a prompt cannot be scored: it is not one of reasoning-gym."""
        if "task" in metadata and isinstance(metadata.get("entry"), dict):
            return None
        return "ReasoningGymReward needs data of kind reasoning_gym"

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns the task's score for each completion.

        Raises:
            ValueError: the prompt is not one of reasoning-gym.
        """
        if cause := self.check_answer(prompt.answer, prompt.metadata):
            raise ValueError(f"prompt {prompt.prompt_id} has no reasoning-gym entry; {cause}")
        entry = prompt.metadata["entry"]
        scorer = self._scorer(prompt.metadata)
        scores = [_score(scorer, self._answer(completion.text), entry) for completion in completions]
        return [self._verdict(score, correct=score >= self._threshold) for score in scores]

    def _verdict(self, score: float, correct: bool) -> Verdict:
        return Verdict(float(correct) if self._binary else score, correct)

    def _answer(self, text: str) -> str | None:
        if self._regex is not None:
            return last_answer(self._regex, text)
        tagged = last_answer(ANSWER_TAGS, text)
        return text.strip() if tagged is None else tagged

    def _scorer(self, metadata: Mapping[str, Any]) -> Scorer:
        """Returns the scorer of the task with its args, on which some scorers depend."""
        from reasoning_gym import create_dataset

        task, args = metadata["task"], metadata.get("args", {})
        key = f"{task} {json.dumps(args, sort_keys=True, default=repr)}"
        if key not in self._scorers:
            self._scorers[key] = create_dataset(task, size=1, seed=0, **args).score_answer
        return self._scorers[key]


def _score(scorer: Scorer, answer: str | None, entry: dict[str, Any]) -> float:
    """Returns the scorer's score of an answer; 0 where the scorer raises on this answer but not on the right one.

    In reasoning-gym 0.1.25 a few scorers raise on an answer that they cannot read (prime_factorization: `int("abc")`): the answer is wrong.
    A scorer that raises on the entry's own answer too is broken, and its error is raised.
    """
    try:
        return float(scorer(answer, entry))
    except (ValueError, TypeError, LookupError, ArithmeticError, SyntaxError):
        scorer(entry["answer"], entry)
        return 0.0
