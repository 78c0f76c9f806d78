"""Rows → tokenised prompts.

Promise: a prompt is tokenised once, here, and nowhere later; a row that becomes none is named by its place.

How a prompt becomes token ids. With `data.chat_template`: by the tokenizer's chat template, up to where the assistant's turn begins;
messages that end with an assistant's turn up to the end of that text, which the completion goes on with.
Without: the text as the tokenizer encodes it by default, so with a BOS where the model was trained with one, but without an EOS at the end,
since a model has nothing to say after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from maspo_ray.config import DataConfig
from maspo_ray.data.bad_rows import BadRow, Fault
from maspo_ray.data.run_rows import RunRows
from maspo_ray.data.sources import Message, Row, SourceRows
from maspo_ray.errors import ConfigError
from maspo_ray.experience import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenIds = list[int]

_CAUSE_LENGTH = 300
"""Characters shown of an exception's text: transformers adds the whole conversation to some."""


@dataclass(frozen=True, slots=True)
class RunPrompts:
    """The prompts of a run.

    Attributes:
        train: by the source's name in a mix, "" of one that stands alone; each has at least one.
        held_out: of `data.eval`; empty without it.
    """

    train: Mapping[str, Sequence[Prompt]]
    held_out: Sequence[Prompt]


def load_run_prompts(rows: RunRows, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> RunPrompts:
    """Returns the prompts of rows that are all read.

    Raises:
        ConfigError: as `load_prompts` does.
    """
    train = {source.name: load_prompts(source, data, tokenizer) for source in rows.train}
    return RunPrompts(train, load_prompts(rows.eval, data, tokenizer) if rows.eval is not None else [])


def load_prompts(source: SourceRows, data: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt]:
    """Returns the prompts of a source, at least one, in the source's order; rows that become none are moved to its bad ones, or to those
    that are too long.

    Raises:
        ConfigError: the tokenizer has no chat template, a row is refused, or every prompt is too long.
    """
    encoded = _chat_ids(source.rows, data, tokenizer) if data.chat_template else _plain_ids(source.rows, tokenizer)
    token_ids: dict[str, TokenIds] = {}

    def fault_of(row: Row) -> Fault | None:
        ids = encoded[row.row_id]
        if isinstance(ids, Fault):
            return ids
        token_ids[row.row_id] = ids
        return None if ids else Fault("has a prompt without tokens")

    source.sift(fault_of)
    source.settle(data.on_bad_row)
    lengths = [len(token_ids[row.row_id]) for row in source.rows]
    _leave_out_long(source, lengths, data.max_prompt_tokens)
    return [
        Prompt(row.row_id, row.text, np.array(token_ids[row.row_id], np.int32), row.answer, row.metadata, source.name)
        for row in source.rows
    ]


def _leave_out_long(source: SourceRows, lengths: Sequence[int], max_prompt_tokens: int) -> None:
    """Moves rows of more tokens to those that are too long; `lengths` are those of `source.rows`."""
    if min(lengths) > max_prompt_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens is {max_prompt_tokens}; every prompt of {source.field} is longer, the shortest has "
            f"{min(lengths)} tokens. Raise it."
        )
    kept = []
    for row, length in zip(source.rows, lengths, strict=True):
        if length <= max_prompt_tokens:
            kept.append(row)
        else:
            rule = f"has {length:,} tokens, more than data.max_prompt_tokens ({max_prompt_tokens:,})"
            source.too_long.append(BadRow(row.place, Fault(rule)))
    source.rows = kept


def _plain_ids(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase") -> dict[str, TokenIds | Fault]:
    def encode(rows: Sequence[Row]) -> list[TokenIds]:
        encoded = tokenizer([row.text for row in rows])["input_ids"]
        return [list(ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids) for ids in encoded]

    needs_template = Fault("has chat messages, which need data.chat_template", ("Set data.chat_template to true",))
    texts = [row for row in rows if isinstance(row.prompt, str)]
    encoded = _encoded(texts, encode, lambda cause: Fault(f"has a prompt that the tokenizer refuses ({cause})"))
    return {row.row_id: encoded.get(row.row_id, needs_template) for row in rows}


def _chat_ids(
    rows: Sequence[Row], data: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, TokenIds | Fault]:
    template = _template(data.template_name, tokenizer)

    def encode(rows: Sequence[Row]) -> list[TokenIds]:
        conversations = [_messages(row.prompt, data.system_prompt) for row in rows]
        # An assistant's turn at the end has begun: it is left open.
        begun = [messages[-1]["role"] == "assistant" for messages in conversations]
        encoded: dict[bool, Iterator[TokenIds]] = {}
        for prefilled in set(begun):
            chosen = [messages for messages, own in zip(conversations, begun, strict=True) if own == prefilled]
            # return_dict: since transformers 5 the default is a dictionary with the attention mask.
            ids = tokenizer.apply_chat_template(
                chosen,
                **template,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
                return_dict=False,
            )
            encoded[prefilled] = iter(cast(list[TokenIds], ids))
        return [next(encoded[prefilled]) for prefilled in begun]

    def refused(cause: str) -> Fault:
        rule = f"has messages that the tokenizer's chat template refuses ({cause})"
        return Fault(rule, ("Change the messages", "change data.system_prompt"))

    return _encoded(rows, encode, refused)


def _template(name: str | None, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Returns the tokenizer's chat template as an argument, of several the one that is asked for; nothing of a tokenizer that renders
    messages by code of its own."""
    from transformers.tokenization_mistral_common import MistralCommonBackend

    templates: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(tokenizer, MistralCommonBackend) and name is None:
        return {}
    if not templates:
        raise ConfigError(
            "data.chat_template is True; the model's tokenizer has no chat template. Set it to false, or take a model that has."
        )
    if isinstance(templates, str):
        if name is not None:
            raise ConfigError(
                f"data.template_name is {name}; the model's tokenizer has one chat template, without a name. Remove it."
            )
        return {"chat_template": templates}
    if (chosen := name or "default") not in templates:
        where = f"data.template_name is {name or 'not set'}"
        raise ConfigError(
            f"{where}; the model's tokenizer has several chat templates, none of which is called {chosen}. Set it to one of "
            f"{', '.join(sorted(templates))}."
        )
    return {"chat_template": templates[chosen]}


def _encoded(
    rows: Sequence[Row], encode: Callable[[Sequence[Row]], list[TokenIds]], refused: Callable[[str], Fault]
) -> dict[str, TokenIds | Fault]:
    """Returns the token ids of each row, by its id: of all rows at once, and one by one where that raises, to find those at fault."""
    if not rows:
        return {}
    try:
        return dict(zip((row.row_id for row in rows), encode(rows), strict=True))
    except Exception as error:
        # A tokenizer's or a template's own code, which may raise anything.
        if len(rows) == 1:
            return {rows[0].row_id: refused(shorten(f"{type(error).__name__}: {error}", _CAUSE_LENGTH))}
    found: dict[str, TokenIds | Fault] = {}
    for row in rows:
        found |= _encoded([row], encode, refused)
    return found


def _messages(prompt: str | list[Message], system_prompt: str | None) -> list[Message]:
    """Returns the conversation to ask; messages that begin with a system message keep their own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
