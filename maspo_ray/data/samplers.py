"""Samplers, which choose the prompt to draw next: all prompts equally often, or more often those that the model solves sometimes; and the
one that chooses among the sources of a mix.

Promise: a draw depends only on the seed, the number of draws before it and the pass rates observed, so that a restored sampler goes on
with exactly the draws that the saved one would have made; a draw costs O(log n) for n prompts. A sampler of the user's own is a class
with `protocols.Sampler`'s methods, named by `data.sampler.path`.
"""

import math
import operator
import random
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from maspo_ray.errors import ConfigError, RunError
from maspo_ray.protocols import Sampler

_UNKNOWN_PASS_RATE = 0.5
"""Assumed of a prompt before its first group is scored; no pass rate has a larger weight, so that no new prompt is passed over."""


class UniformSampler:
    """Draws each prompt once in every epoch, in the data's order or in one that the seed and the epoch decide."""

    def __init__(self, num_prompts: int, shuffle: bool, seed: int) -> None:
        self._num_prompts = num_prompts
        self._shuffle = shuffle
        self._seed = seed
        self._drawn = 0
        self._order: list[int] = []

    def next(self) -> int:
        epoch, position = divmod(self._drawn, self._num_prompts)
        if position == 0:
            self._order = self._order_of(epoch)
        self._drawn += 1
        return self._order[position]

    def observe(self, index: int, pass_rate: float) -> None:
        """Does nothing: every prompt is drawn equally often."""

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn = int(state["drawn"])
        self._order = self._order_of(self._drawn // self._num_prompts)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(self._num_prompts))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


class PassRateSampler:
    """Draws each prompt once, as `UniformSampler` does, and then at random, more often those that the model solves about half the time.

    A prompt's weight is p(1 − p) + floor, where p is the exponential moving average of its groups' pass rates, ½ until the first group is
    scored. p(1 − p) is the variance of a binary reward: with none, all completions of a group are rewarded alike and its advantages are 0.

    Args:
        decay: share of p that is kept when a group's pass rate comes in; at 0, p is the latest pass rate.
        floor: weight that every prompt has besides p(1 − p), which is at most ¼. It keeps prompts that were always or never solved from
            dropping out for good: the policy changes, and may come to solve them sometimes.
    """

    def __init__(self, num_prompts: int, shuffle: bool, seed: int, decay: float = 0.5, floor: float = 0.05) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"data.sampler.args.decay is {decay}; it must be at least 0 and below 1. Set it to 0.5.")
        if not (floor > 0 and math.isfinite(floor)):
            raise ConfigError(f"data.sampler.args.floor is {floor}; it must be above 0. Set it to 0.05.")
        self._num_prompts = num_prompts
        self._seed = seed
        self._decay = decay
        self._floor = floor
        self._first_pass = UniformSampler(num_prompts, shuffle, seed)
        self._weights = _WeightTree([0.0] * num_prompts)
        self._pass_rates: dict[int, float] = {}
        self._drawn = 0

    def next(self) -> int:
        self._drawn += 1
        if self._drawn > self._num_prompts:
            # Seeded by the number of the draw, so that a saved sampler needs no generator's state.
            return self._weights.find(random.Random(f"{self._seed}/draw {self._drawn}").random())
        index = self._first_pass.next()
        self._weights.set(index, self._weight(index))
        return index

    def observe(self, index: int, pass_rate: float) -> None:
        before = self._pass_rates.get(index, pass_rate)
        self._pass_rates[index] = self._decay * before + (1 - self._decay) * pass_rate
        self._weights.set(index, self._weight(index))

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "pass_rates": [[index, rate] for index, rate in sorted(self._pass_rates.items())]}

    def restore(self, state: dict[str, Any]) -> None:
        self._first_pass.restore({"drawn": 0})
        self._pass_rates = {int(index): float(rate) for index, rate in state["pass_rates"]}
        self._drawn = int(state["drawn"])
        weights = [0.0] * self._num_prompts
        for index in (
            *self._pass_rates,
            *(self._first_pass.next() for _ in range(min(self._drawn, self._num_prompts))),
        ):
            weights[index] = self._weight(index)
        self._weights = _WeightTree(weights)

    def _weight(self, index: int) -> float:
        rate = self._pass_rates.get(index, _UNKNOWN_PASS_RATE)
        return rate * (1 - rate) + self._floor


class MixSampler:
    """Draws from several sources by weight, in each as its own sampler does.

    The source that is furthest behind its weight's share of the draws comes next, so that none is ever a whole draw ahead of it: no batch
    is made of one source by chance. Prompts are numbered through, source after source.

    Args:
        sources: (number of prompts, sampler) of each.
        weights: above 0, one for each source.
    """

    def __init__(self, sources: Sequence[tuple[int, Sampler]], weights: Sequence[float]) -> None:
        self._sizes = [size for size, _ in sources]
        self._first = [0, *accumulate(self._sizes)]
        self._samplers = [sampler for _, sampler in sources]
        self._shares = [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(sources)

    def next(self) -> int:
        total = sum(self._drawn) + 1
        # The one that is furthest behind its share; of several the first.
        source = max(range(len(self._drawn)), key=lambda i: self._shares[i] * total - self._drawn[i])
        self._drawn[source] += 1
        index = operator.index(self._samplers[source].next())
        if not 0 <= index < self._sizes[source]:
            name = type(self._samplers[source]).__qualname__
            raise RunError(
                f"{name}.next gave {index}; its source has {self._sizes[source]} prompts, counted from 0. Mend the sampler."
            )
        return self._first[source] + index

    def observe(self, index: int, pass_rate: float) -> None:
        source = bisect_right(self._first, index) - 1
        self._samplers[source].observe(index - self._first[source], pass_rate)

    def state(self) -> dict[str, Any]:
        return {
            "sizes": self._sizes,
            "shares": self._shares,
            "drawn": list(self._drawn),
            "samplers": [sampler.state() for sampler in self._samplers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where the sampler with this `state` stood.

        Raises:
            ConfigError: it had sources of other sizes or weights, so that its place means nothing here.
        """
        if state["sizes"] != self._sizes or state["shares"] != self._shares:
            raise ConfigError(
                f"data.train.sources have {self._sizes} prompts and shares {self._shares}; those of the saved run had {state['sizes']} "
                f"and {state['shares']}. Resume with the config it was saved with."
            )
        self._drawn = [int(drawn) for drawn in state["drawn"]]
        for sampler, own in zip(self._samplers, state["samplers"], strict=True):
            sampler.restore(own)


class _WeightTree:
    """Draws an index by weight in O(log n): a binary tree in an array, root at 1, whose leaves are the weights and whose nodes are the
    sums of their two children.

    When a weight changes, the sums above it are added up again rather than corrected by the difference: rounding errors would pile up,
    and a restored tree, which never saw the old weights, would differ from the saved one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._leaves = 1 << (len(weights) - 1).bit_length()
        self._sums = array("d", bytes(16 * self._leaves))
        self._sums[self._leaves : self._leaves + len(weights)] = array("d", weights)
        for place in range(self._leaves - 1, 0, -1):
            self._sums[place] = self._sums[2 * place] + self._sums[2 * place + 1]

    def set(self, index: int, weight: float) -> None:
        place = self._leaves + index
        self._sums[place] = weight
        while place > 1:
            place //= 2
            self._sums[place] = self._sums[2 * place] + self._sums[2 * place + 1]

    def find(self, share: float) -> int:
        """Returns the index whose interval holds `share`, in [0, 1), where the weights divide [0, 1) in order; never one of weight 0."""
        place, left_over = 1, share * self._sums[1]
        while place < self._leaves:
            place *= 2
            # Rounding can leave slightly more than the whole left half; without weight on the right the index is still on the left.
            if left_over >= self._sums[place] and self._sums[place + 1] > 0:
                left_over -= self._sums[place]
                place += 1
        return place - self._leaves
