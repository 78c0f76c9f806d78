"""Prompts and completions → the one row of tokens that a forward pass takes.

Promise: nothing is padded, and no hidden state is computed that predicts nothing: a completion's last token is a target only. Positions
are those that each sequence has alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Bundled = tuple[NDArray[np.int32], Sequence[NDArray[np.int32]]]
"""Token ids of a prompt and of the completions behind this copy of it."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Lengths, in tokens of the row: a prompt, then the branches that each attend to it and to themselves alone."""

    prompt_tokens: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + sum(self.branches)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Bundles one after the other, each a prompt and its completions.

    Attributes:
        input_ids: [1, tokens] int64.
        position_ids: [1, tokens] int64, counted from 0 in each prompt and on from there in each of its branches.
        trees: what attends to what; they cover the row.
        targets: [targets] int64, the completions' tokens, completion after completion.
        predictors: [targets] int64, where in the row the hidden state lies that predicts each target.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    trees: tuple[Tree, ...]
    targets: torch.Tensor
    predictors: torch.Tensor


def lay_out(bundles: Sequence[Bundled], device: torch.device) -> TokenBatch:
    """Returns the bundles as one row.

    Args:
        bundles: at least one; each prompt and each completion has at least one token.
    """
    ids: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    predictors: list[NDArray[np.int64]] = []
    trees = []
    start = 0
    for prompt, completions in bundles:
        trees.append(Tree(len(prompt), tuple(len(completion) - 1 for completion in completions)))
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        last = start + len(prompt) - 1
        start = last + 1
        for completion in completions:
            steps = np.arange(len(completion) - 1)
            ids.append(completion[:-1])
            positions.append(len(prompt) + steps)
            # The prompt's last token predicts the first, and each of them the next.
            predictors += [np.array([last]), start + steps]
            start += len(steps)
    targets = [completion for _, completions in bundles for completion in completions]

    def tensor(parts: Sequence[NDArray[np.integer]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return TokenBatch(tensor(ids)[None], tensor(positions)[None], tuple(trees), tensor(targets), tensor(predictors))
