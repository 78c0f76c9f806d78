"""The text of a completion, in which everything that was sampled shows.

Promise: a completion with an id that its engine's text leaves out does not read like the one without. Such ids are those that the tokenizer
has no token for (a model's vocabulary is often larger) and special tokens, such as padding, before the end.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from maspo_ray.data.vocabulary import nameless_ids

REPLACEMENT = "\ufffd"
"""Stands for an id without a token."""


class CompletionText:
    """Reads completions of one model.

    Args:
        tokenizer: transformers', or what has its methods.
        num_ids: the size of the model's vocabulary.
    """

    def __init__(self, tokenizer: Any, num_ids: int) -> None:
        self._tokenizer = tokenizer
        self._nameless = nameless_ids(tokenizer, num_ids)
        # A method where the tokenizer is Mistral's own, which has all of them among `all_special_ids`.
        added = getattr(tokenizer, "added_tokens_decoder", None)
        special = {i for i, token in added.items() if token.special} if isinstance(added, Mapping) else set()
        self._unread = self._nameless | special | set(tokenizer.all_special_ids)

    def of(self, token_ids: Sequence[int], text: str, stopped: bool) -> str:
        """Returns the text of a completion.

        Args:
            text: the engine's, which leaves some ids out.
            stopped: the last id may be the one that ended the completion, which is no part of its text if it is a special one.
        """
        read = token_ids[:-1] if stopped and token_ids and token_ids[-1] in self._unread else token_ids
        if self._unread.isdisjoint(read):
            return text
        parts = []
        for nameless, run in groupby(read, self._nameless.__contains__):
            ids = list(run)
            parts.append(REPLACEMENT * len(ids) if nameless else self._tokenizer.decode(ids, skip_special_tokens=False))
        return "".join(parts)
