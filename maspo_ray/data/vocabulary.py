"""The tokenizer's tokens held against the ids that the model has.

Promise: a token that the model lacks is named before anything is generated, and never sent to it; ids that have no token are named too.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maspo_ray.errors import ConfigError
from maspo_ray.experience import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_SHOWN = 5


def check_vocabulary(
    model_path: str, tokenizer: "PreTrainedTokenizerBase", num_ids: int, prompts: Mapping[str, Sequence[Prompt]]
) -> None:
    """Logs which tokens the model lacks, and which of the model's ids have no token.

    Args:
        num_ids: the model's ids are those below.
        prompts: by the field of the config that they come from.

    Raises:
        ConfigError: a prompt has a token that the model lacks, or a completion would end with one.
    """
    where = f"model.path is {model_path}"
    lacks = f"which the model lacks: its ids end at {num_ids - 1}"
    remedy = "Take the model's own tokenizer, or enlarge the model's embedding"
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    last = tokenizer.eos_token_id
    if isinstance(last, int) and last >= num_ids:
        raise ConfigError(
            f"{where}; its tokenizer ends a completion with {tokens.get(last)} ({last}), {lacks}. {remedy}."
        )
    for field, own in prompts.items():
        for prompt in own:
            if len(prompt.token_ids) and (highest := int(prompt.token_ids.max())) >= num_ids:
                raise ConfigError(
                    f"{where}; {field} has a prompt ({prompt.prompt_id}) with {tokens.get(highest)} ({highest}), {lacks}. "
                    f"{remedy}; or change the prompt."
                )
    if lacking := sorted(token_id for token_id in tokens if token_id >= num_ids):
        shown = ", ".join(f"{tokens[token_id]} ({token_id})" for token_id in lacking[:_SHOWN])
        more = f" and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
        _log.warning(
            "The tokenizer has tokens that the model lacks, whose ids end at %d: %s%s. No prompt has one.",
            num_ids - 1,
            shown,
            more,
        )
    if nameless := nameless_ids(tokenizer, num_ids):
        _log.info(
            "The model has %d ids that its tokenizer has no token for (the first is %d). In a completion each reads as U+FFFD.",
            len(nameless),
            min(nameless),
        )


def nameless_ids(tokenizer: Any, num_ids: int) -> frozenset[int]:
    """Returns the model's ids that the tokenizer has no token for.

    Args:
        tokenizer: transformers', or one with its methods.
    """
    tokens = tokenizer.get_vocab()
    # Mistral's own tokenizer lists tokens by their text, which parts of a character share: all ids up to its size are tokens.
    named = tokens.values() if len(tokens) == len(tokenizer) else range(len(tokenizer))
    return frozenset(range(num_ids)).difference(named)
