"""Tokens that the model lacks, and ids that have no token."""

import logging
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from maspo_ray.data.vocabulary import check_vocabulary
from maspo_ray.errors import ConfigError
from maspo_ray.experience import Prompt


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of 8 tokens, the last of which is <eos>; id 5 has no token."""
    ids = {letter: i for i, letter in enumerate("abcde")} | {"f": 6, "<pad>": 7, "<eos>": 8}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids)), eos_token="<eos>")


def _prompts(*token_ids: int) -> dict[str, list[Prompt]]:
    return {
        "data.train": [Prompt("train/0", "", np.array([0, 1], np.int32), None)],
        "data.eval": [Prompt("eval/7", "", np.array(token_ids, np.int32), None)],
    }


def test_tokens_and_ids_that_are_the_same_are_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    with caplog.at_level(logging.INFO):
        check_vocabulary("m", whole, 2, _prompts(1))
    assert not caplog.messages


def test_ids_without_a_token_are_counted(tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check_vocabulary("m", tokenizer, 12, _prompts(1, 8))
    # 5, and 9 to 11.
    assert caplog.messages == [
        "The model has 4 ids that its tokenizer has no token for (the first is 5). In a completion each reads as U+FFFD."
    ]


def test_tokens_that_the_model_lacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    many = {f"t{i}": i for i in range(10)}
    check_vocabulary(
        "m", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(many))), 3, _prompts(2, 1)
    )
    assert caplog.messages == [
        "The tokenizer has tokens that the model lacks, whose ids end at 2: t3 (3), t4 (4), t5 (5), t6 (6), t7 (7) and 2 more. No "
        "prompt has one."
    ]


def test_prompt_with_a_token_that_the_model_lacks_is_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="a")
    line = (
        "model.path is m; data.eval has a prompt (eval/7) with f (6), which the model lacks: its ids end at 5. Take the model's own "
        "tokenizer, or enlarge the model's embedding; or change the prompt."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        check_vocabulary("m", tokenizer, 6, _prompts(1, 6))
    check_vocabulary("m", tokenizer, 7, _prompts(1, 6))


def test_end_of_completions_that_the_model_lacks_is_one_line(tokenizer: PreTrainedTokenizerFast) -> None:
    line = (
        "model.path is m; its tokenizer ends a completion with <eos> (8), which the model lacks: its ids end at 7. Take the model's own "
        "tokenizer, or enlarge the model's embedding."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        check_vocabulary("m", tokenizer, 8, _prompts(1))
