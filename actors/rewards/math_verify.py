"""Reward 1 where math-verify finds the completion's answer equal to the prompt's (`1/2`, `\\frac{1}{2}` and `0.5` are), else 0.

A completion in which it finds no mathematics is wrong. A prompt's answer in which it finds none is a fault of the data, and raises.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from actors.rewards.exact_match import ANSWER_TAGS, last_answer
from maspo_ray.experience import Completion, Prompt, Verdict

_MARKS = ("$", "\\boxed", "\\(", "\\[")


class MathVerifyReward:
    """Compares expressions rather than texts. See `maspo_ray.protocols.RewardActor`.

    The answer of a completion is what its last `<answer>...</answer>` encloses, else its last `\\boxed{...}`, formula or number.
    """

    def setup(self) -> None:
        import math_verify  # noqa: F401  (loads sympy, so that the first completion does not wait for it)

        # math-verify 0.9.0 warns in every process that its timeouts are off. They are, on purpose: see `_parse`.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def check_answer(self, answer: Any, metadata: Mapping[str, Any]) -> str | None:
        """Returns why an answer is of no type that is read as mathematics."""
        if type(answer) is int or (isinstance(answer, float) and math.isfinite(answer)):
            return None
        if isinstance(answer, str) and answer.strip():
            return None
        return "MathVerifyReward takes a number, or a text that is not blank"

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
    """Returns the expressions that math-verify finds in a text; empty where it finds none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # No timeouts of math-verify's own: 0.9.0 sets them by signal.alarm, which works only on the main thread, and a run scores on another;
    # reward.timeout_s is the deadline. Without "no_fallback" an unreadable text would come back as a string.
    return parse(
        text, [LatexExtractionConfig(), ExprExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )


def _as_formula(text: str) -> str:
    """Returns an answer in LaTeX's `$`, if it is not marked yet; unmarked, `2\\pi` would be read as the number 2."""
    return text if not text or any(mark in text for mark in _MARKS) else f"${text}$"


def _gold_text(answer: object) -> str:
    if answer is None:
        return ""
    # Written out, since Python writes a small float as `1e-05`, which would be read as a formula with Euler's number.
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer).strip()
