"""An endless stream of prompts.

Promise: the stream asks its sampler for each draw and never ends; a restored stream goes on with exactly the draws that the saved one
would have made.
"""

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from maspo_ray.config import DataConfig, MixSource
from maspo_ray.data.samplers import MixSampler
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.experience import Prompt
from maspo_ray.protocols import Sampler


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


def train_stream(
    prompts: Mapping[str, Sequence[Prompt]], data: DataConfig, make_sampler: Callable[[int], Sampler], seed: int
) -> "PromptStream":
    """Returns the stream of a run's training prompts.

    Args:
        prompts: of each source, by its name in a mix.
        make_sampler: returns the sampler of so many prompts; each source has its own.
    """
    sampler: Sampler
    if isinstance(data.train, MixSource):
        weights = [data.train.weight(name) for name in prompts]
        sampler = MixSampler([(len(own), make_sampler(len(own))) for own in prompts.values()], weights)
    else:
        sampler = make_sampler(len(prompts[""]))
    return PromptStream([*chain(*prompts.values())], sampler, shuffle=data.shuffle, seed=seed)


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
