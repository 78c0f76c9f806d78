"""What a completion reads like where an id has no text."""

import asyncio

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.completion_text import CompletionText
from actors.rewards.exact_match import ExactMatchReward
from maspo_ray.experience import Completion, VersionSpan
from maspo_ray.testing import make_prompt

PAD, EOS, FOUR, TWO, TURN, NAMELESS = 0, 1, 2, 3, 4, 6
NUM_IDS = 8


@pytest.fixture(scope="module")
def reader() -> CompletionText:
    """Of a tokenizer with five tokens, three of them special, and a model with eight."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS, "4": FOUR, "2": TWO}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.add_tokens(["<turn>"], special_tokens=True)
    assert fast.convert_tokens_to_ids("<turn>") == TURN
    return CompletionText(fast, NUM_IDS)


@pytest.mark.parametrize(
    ("ids", "engine_text", "stopped", "expected"),
    [
        ([FOUR, TWO, EOS], "42", True, "42"),
        # Cut off: no id ended it.
        ([FOUR, TWO], "42", False, "42"),
        ([FOUR, NAMELESS, TWO, EOS], "42", True, "4\ufffd2"),
        ([FOUR, TWO, NAMELESS, NAMELESS], "42", False, "42\ufffd\ufffd"),
        ([NAMELESS, FOUR, TWO, EOS], "42", True, "\ufffd42"),
        ([FOUR, PAD, TWO, EOS], "42", True, "4<pad>2"),
        ([FOUR, TWO, TURN], "42", False, "42<turn>"),
        # Ended by it, as by a stop token.
        ([FOUR, TWO, TURN], "42", True, "42"),
        ([EOS], "", True, ""),
        ([], "", True, ""),
    ],
)
def test_text_shows_every_id_before_the_end(
    reader: CompletionText, ids: list[int], engine_text: str, stopped: bool, expected: str
) -> None:
    assert reader.of(ids, engine_text, stopped) == expected


def test_completion_with_an_id_without_text_is_not_the_answer(reader: CompletionText) -> None:
    def score(ids: list[int]) -> float:
        text = reader.of(ids, "42", True)
        completion = Completion(
            np.array(ids, np.int32), np.zeros(len(ids), np.float32), (VersionSpan(0, 0, len(ids)),), "stop", text
        )
        verdicts = ExactMatchReward().score(make_prompt("6*7=", "42"), [completion])
        [verdict] = asyncio.run(verdicts) if asyncio.iscoroutine(verdicts) else verdicts
        return verdict.reward

    assert score([FOUR, TWO, EOS]) == 1.0
    assert score([FOUR, NAMELESS, TWO, EOS]) == 0.0
    assert score([FOUR, PAD, TWO, EOS]) == 0.0
