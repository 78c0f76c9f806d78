"""Reward 1 where the completion's mathematics equals the answer's (`1/2` and `\\frac{1}{2}` and `0.5`), else 0, by math-verify.

A completion in which no mathematics is found is wrong; an answer of the data in which none is found is a fault of the data and
raises.
"""

import logging
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from actors.rewards.exact_match import ANSWER_TAGS, last_answer
from maspo_ray.experience import Completion, Prompt, Verdict

_MARKS = ("$", "\\boxed", "\\(", "\\[")


class MathVerifyReward:
    """Compares expressions, not texts. See `maspo_ray.protocols.RewardActor`.

    Reads the last `\\boxed{...}`, formula or number of the completion; of one that has `<answer>...</answer>` what these enclose.
    """

    def setup(self) -> None:
        import math_verify  # noqa: F401  (loads sympy, so that the first completion does not wait for it)

        # math-verify 0.9.0 warns in every process that its timeouts are off. They are, on purpose: see `_parse`.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns 1.0 or 0.0 for each completion.

        Raises:
            ValueError: no mathematics is found in the prompt's answer.
        """
        from math_verify import verify

        gold = _parse(_as_formula(_gold_text(prompt.answer)))
        if not gold:
            raise ValueError(
                f"prompt {prompt.prompt_id} has the answer {prompt.answer!r}, which math-verify cannot read"
            )
        verdicts = []
        for completion in completions:
            said = last_answer(ANSWER_TAGS, completion.text)
            target = _parse(completion.text if said is None else _as_formula(said))
            verdicts.append(Verdict.from_reward(float(bool(target) and verify(gold, target, timeout_seconds=None))))
        return verdicts


def _parse(text: str) -> list[Any]:
    """Returns the expressions that math-verify finds, none if it finds none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # math-verify 0.9.0 times out by signal.alarm, which only a main thread has. A run scores in a thread, and reward.timeout_s
    # is the deadline. Without "no_fallback" an unreadable text would come back as a string.
    return parse(
        text, [LatexExtractionConfig(), ExprExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )


def _as_formula(text: str) -> str:
    """Returns a bare answer marked as LaTeX; unmarked, `2\\pi` would be read as the number 2."""
    return text if not text or any(mark in text for mark in _MARKS) else f"${text}$"


def _gold_text(answer: object) -> str:
    if answer is None:
        return ""
    # repr of a small float is `1e-05`, in which LaTeX sees Euler's number.
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer).strip()
