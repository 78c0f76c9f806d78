"""Which prompt is drawn next: all alike, or those that the model solves sometimes more often.

Promise: what is drawn depends on the seed, on how many were drawn, and on what was observed alone, so that a restored sampler
goes on with exactly what the saved one would have given; a draw costs O(log n) of n prompts. Another sampler is a class of one's own
(`protocols.Sampler`), which `data.sampler.path` names.
"""

import math
import random
from array import array
from collections.abc import Sequence
from typing import Any

from maspo_ray.errors import ConfigError

_UNKNOWN_PASS_RATE = 0.5


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
        """Does nothing: all prompts stay alike."""

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
    """Draws each prompt once, as `UniformSampler` does, and from then on by what the model made of it.

    A prompt's weight is p(1 − p) + floor, where p is an exponential mean of its groups' pass rates: p(1 − p) is the variance of a
    binary reward, which is what a group's advantages live on, and 0 where the model always or never solves the prompt. Until its
    first group was scored p is ½.

    Args:
        decay: what of p stays when a new pass rate comes; 0 keeps the latest alone.
        floor: what keeps a prompt that was always or never solved in the game, since the policy changes; beside at most ¼.
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
            # A generator for each draw: the place in the sequence is all that there is to save.
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


class _WeightTree:
    """Weights of indices, and the sums of every half, quarter and so on of them: a heap whose root is at 1.

    A sum is made of what is below it anew whenever that changes, never by a difference, so that it does not depend on what the weights
    were before.
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
        """Returns the index at which the weights before it come to `share`, in [0, 1), of all; never one of weight 0."""
        place, left_over = 1, share * self._sums[1]
        while place < self._leaves:
            place *= 2
            # Rounding may leave a little more than there is: it must not lead to where there is nothing.
            if left_over >= self._sums[place] and self._sums[place + 1] > 0:
                left_over -= self._sums[place]
                place += 1
        return place - self._leaves
