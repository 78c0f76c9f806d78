"""Rows → tokenised prompts, and an endless stream of them.

Promise: a prompt is tokenised once, here, and nowhere later. The stream asks its sampler for each draw and never ends; a restored stream
goes on with exactly the draws that the saved one would have made.

How a prompt becomes token ids. With `data.chat_template`: by the tokenizer's chat template, up to where the assistant's turn begins.
Without: the text as the tokenizer encodes it by default, so with a BOS where the model was trained with one, but without an EOS at the end,
since a model has nothing to say after it.
"""

import logging
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from maspo_ray.config import DataConfig, DataSource
from maspo_ray.data.sources import Message, Row, read_rows
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.experience import Prompt
from maspo_ray.protocols import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class LoadedPrompts(list[Prompt]):
    """The prompts of a source, in the source's order.

    Attributes:
        num_too_long: rows left out because they are longer than `data.max_prompt_tokens`.
    """

    def __init__(self, prompts: Sequence[Prompt], num_too_long: int) -> None:
        super().__init__(prompts)
        self.num_too_long = num_too_long


def load_prompts(
    source: DataSource, data: DataConfig, tokenizer: "PreTrainedTokenizerBase", field: str
) -> LoadedPrompts:
    """Returns the prompts of a source, at least one, tokenised.

    Args:
        field: the source's key in the config: `data.train` or `data.eval`.

    Raises:
        ConfigError: the data is at fault, the tokenizer has no chat template, or every prompt is too long.
    """
    rows = read_rows(source, field)
    token_ids = _chat_ids(rows, data, tokenizer, field) if data.chat_template else _plain_ids(rows, tokenizer, field)
    prompts = [
        Prompt(row.row_id, row.text, np.array(ids, dtype=np.int32), row.answer, row.metadata)
        for row, ids in zip(rows, token_ids, strict=True)
        if len(ids) <= data.max_prompt_tokens
    ]
    if not prompts:
        raise ConfigError(
            f"data.max_prompt_tokens is {data.max_prompt_tokens}; every prompt of {field} is longer, the shortest has "
            f"{min(map(len, token_ids))} tokens. Raise it."
        )
    num_too_long = len(rows) - len(prompts)
    if num_too_long:
        _log.warning(
            "%s: left out %d of %d prompts, which are longer than data.max_prompt_tokens (%d).",
            field,
            num_too_long,
            len(rows),
            data.max_prompt_tokens,
        )
    return LoadedPrompts(prompts, num_too_long)


def _plain_ids(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", field: str) -> list[list[int]]:
    texts = [row.prompt for row in rows if isinstance(row.prompt, str)]
    if len(texts) < len(rows):
        row = next(row for row in rows if not isinstance(row.prompt, str))
        raise ConfigError(
            f"data.chat_template is False; {field} holds chat messages (row {row.row_id}), which need it. Set it to true."
        )
    encoded = tokenizer(texts)["input_ids"]
    return [list(ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids) for ids in encoded]


def _chat_ids(
    rows: Sequence[Row], data: DataConfig, tokenizer: "PreTrainedTokenizerBase", field: str
) -> list[list[int]]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ConfigError(
            "data.chat_template is True; the model's tokenizer has no chat template. Set it to false, or take a model that has."
        )
    conversations = [_messages(row.prompt, data.system_prompt) for row in rows]
    try:
        # return_dict: since transformers 5 the default is a dictionary with the attention mask.
        encoded = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise ConfigError(
            f"data.chat_template is True; the tokenizer's template refuses the messages of {field}: {error}. "
            "Change the messages or data.system_prompt."
        ) from None
    return cast(list[list[int]], encoded)


def _messages(prompt: str | list[Message], system_prompt: str | None) -> list[Message]:
    """Returns the conversation to ask; messages that begin with a system message keep their own."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


@dataclass(frozen=True, slots=True)
class Draw:
    """A prompt that was drawn.

    Attributes:
        index: the prompt's place among the prompts.
        times_drawn: how often this prompt was drawn before; under `UniformSampler`, which draws each once in an epoch, the epoch.
    """

    index: int
    prompt: Prompt
    times_drawn: int


class PromptStream:
    """Draws prompts without end, in the order that a sampler chooses.

    Args:
        prompts: at least one.
        sampler: made for as many prompts, with the same `shuffle` and `seed`.
    """

    def __init__(self, prompts: Sequence[Prompt], sampler: Sampler, *, shuffle: bool, seed: int) -> None:
        self._prompts = prompts
        self._sampler = sampler
        self._shuffle = shuffle
        self._seed = seed
        self._times_drawn: Counter[int] = Counter()

    def next(self) -> Draw:
        """Returns the next draw.

        Raises:
            RunError: the sampler gave an index that no prompt has.
        """
        index = operator.index(self._sampler.next())
        if not 0 <= index < len(self._prompts):
            raise RunError(
                f"{self._sampler_path}.next gave {index}; there are {len(self._prompts)} prompts, counted from 0. Mend the sampler."
            )
        draw = Draw(index, self._prompts[index], self._times_drawn[index])
        self._times_drawn[index] += 1
        return draw

    def first(self, count: int) -> Sequence[Prompt]:
        """Returns the first prompts of the data, at most so many; nothing is drawn."""
        return self._prompts[:count]

    def observe(self, index: int, pass_rate: float) -> None:
        """Passes on to the sampler the share of a group's scored completions that was correct."""
        self._sampler.observe(index, pass_rate)

    def state(self) -> dict[str, Any]:
        """Returns the state that `restore` takes, in types that JSON can hold."""
        return {
            **self._identity(),
            "sampler_state": self._sampler.state(),
            "times_drawn": [[index, times] for index, times in sorted(self._times_drawn.items())],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the stream with this `state` stood.

        Raises:
            ConfigError: the saved stream had other prompts, another seed, order or sampler, so that its place means nothing here.
        """
        keys = {"num_prompts": "data.train", "seed": "seed", "shuffle": "data.shuffle", "sampler": "data.sampler.path"}
        for name, own in self._identity().items():
            if state[name] != own:
                shown = f"{own} prompts" if name == "num_prompts" else own
                raise ConfigError(
                    f"{keys[name]} is {shown}; the saved run had {state[name]}. Resume with the config it was saved with."
                )
        self._sampler.restore(state["sampler_state"])
        self._times_drawn = Counter({int(index): int(times) for index, times in state["times_drawn"]})

    def _identity(self) -> dict[str, Any]:
        """Returns the settings that two streams must share for the state of one to be restored in the other."""
        return {
            "num_prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "sampler": self._sampler_path,
        }

    @property
    def _sampler_path(self) -> str:
        return f"{type(self._sampler).__module__}:{type(self._sampler).__qualname__}"
