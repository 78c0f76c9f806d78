"""Prompts and completions → one row of tokens for a forward pass.

Promise: there is no padding. A completion's last token is a target but no input, since no target follows it. Position ids are those that
each sequence would have by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Bundled = tuple[NDArray[np.int32], Sequence[NDArray[np.int32]]]
"""Token ids of a prompt, and of the completions that share this copy of it."""


@dataclass(frozen=True, slots=True)
class Tree:
    """Lengths of a prompt and of its branches, in tokens of the row; a branch is a completion without its last token.

    Each branch attends to the prompt and to itself, not to the other branches.
    """

    prompt_tokens: int
    branches: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + sum(self.branches)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """One row of bundles, each a prompt and its completions.

    Attributes:
        input_ids: [1, tokens] int64.
        position_ids: [1, tokens] int64, from 0 in each prompt, and on from the prompt's length in each of its branches.
        trees: one for each bundle, which together cover the row; they say which tokens attend to which.
        targets: [targets] int64, the tokens of all completions in turn.
        predictors: [targets] int64, for each target the place in the row whose hidden state predicts it.
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
            # The prompt's last token predicts the completion's first, and each token of the completion its next.
            predictors += [np.array([last]), start + steps]
            start += len(steps)
    targets = [completion for _, completions in bundles for completion in completions]

    def tensor(parts: Sequence[NDArray[np.integer]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return TokenBatch(tensor(ids)[None], tensor(positions)[None], tuple(trees), tensor(targets), tensor(predictors))


def apart(bundles: Sequence[Bundled]) -> list[Bundled]:
    """Returns the bundles with a copy of the prompt for each completion."""
    return [(prompt, [completion]) for prompt, completions in bundles for completion in completions]
