"""Attention for completions that share a prompt: a tree, whose branches each attend to the prompt and to themselves.

Promise: output and gradient of each branch are those of prompt and branch as one sequence by itself, and no pair of tokens is computed that
does not attend. It is registered with transformers as an attention implementation, so that it serves every model that takes its attention
from there. For FlexAttention the same trees are made into a block mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface

from actors.token_batch import Tree

NAME = "maspo_trees"


class CannotShare(Exception):
    """A model's attention is more than `tree_attention` computes."""


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trees: Sequence[Tree] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Returns the attention's output, [1, tokens, heads, d], and None for its weights; the signature is transformers'.

    Calls PyTorch's attention once for each prompt with its first branch, and once for each further branch. Measured on a CPU, this is
    faster than padding the branches to one batch and than one call with a dense mask.

    Args:
        query: [1, heads, tokens, d]; key and value: [1, key-value heads, tokens, d].
        attention_mask: None, since `trees` says which tokens attend to which.

    Raises:
        CannotShare: the model does not hand its arguments on, or hands on some that are not known here.
    """
    if trees is None or attention_mask is not None:
        raise CannotShare("the model's attention has a mask of its own, or is not given the trees")
    assert dropout == 0.0, "a policy's log-probs have no dropout"
    unknown = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if others.get(name) is not None]
    if unknown:
        raise CannotShare(f"the model's attention has {unknown}, which trees do not know")
    repeats = query.shape[1] // key.shape[1]
    # Repeated here rather than by `enable_gqa`, which not every device has a kernel for when there is a mask.
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    # A prompt and its first branch are one causal sequence, so that a tree of one branch takes one call.
    trunks = [tree.prompt_tokens + tree.branches[0] for tree in trees]
    sizes = [size for tree, trunk in zip(trees, trunks, strict=True) for size in (trunk, *tree.branches[1:])]
    # The backward pass of one split fills one gradient; each slice instead would have a gradient of the whole length to add.
    parts = iter(zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True))
    outputs = []
    for tree in trees:
        trunk_query, trunk_key, trunk_value = next(parts)
        outputs.append(
            F.scaled_dot_product_attention(trunk_query, trunk_key, trunk_value, is_causal=True, scale=scaling)
        )
        prompt_key, prompt_value = (x[:, :, : tree.prompt_tokens] for x in (trunk_key, trunk_value))
        for size in tree.branches[1:]:
            own_query, own_key, own_value = next(parts)
            if size == 0:
                outputs.append(own_value)
                continue
            outputs.append(
                F.scaled_dot_product_attention(
                    own_query,
                    torch.cat([prompt_key, own_key], dim=2),
                    torch.cat([prompt_value, own_value], dim=2),
                    attn_mask=_branch_mask(size, tree.prompt_tokens, query.device),
                    scale=scaling,
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _branch_mask(branch_tokens: int, prompt_tokens: int, device: torch.device) -> torch.Tensor:
    """Returns the mask of a branch's queries, [branch, prompt + branch] bool: True for the prompt, and for the branch up to the query."""
    ones = torch.ones(branch_tokens, prompt_tokens + branch_tokens, dtype=torch.bool, device=device)
    return ones.tril(prompt_tokens)


def _no_mask(*, local_size: int | None = None, use_vmap: bool = False, **_others: Any) -> None:
    """Returns no mask where the model asks for a causal one; the signature is transformers'.

    Raises:
        CannotShare: the mask is a window's, a chunk's or one of the model's own making.
    """
    if local_size is not None or use_vmap:
        raise CannotShare("the model's attention has a window, or a mask of its own making")


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def tree_mask(trees: Sequence[Tree], device: torch.device) -> Any:
    """Returns the trees as FlexAttention's `mask_mod`: (batch, head, query, key) indices → whether the query attends to the key."""
    nodes: list[int] = []
    roots: list[int] = []
    root = 0
    for tree in trees:
        sizes = (tree.prompt_tokens, *tree.branches)
        nodes += [root + i for i, size in enumerate(sizes) for _ in range(size)]
        roots += [root] * tree.num_tokens
        root += len(sizes)
    node, root_of = torch.tensor(nodes, device=device), torch.tensor(roots, device=device)

    def attends(_batch: Any, _head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & ((node[k] == node[q]) | (node[k] == root_of[q]))

    return attends


def tree_block_mask(trees: Sequence[Tree], device: torch.device) -> BlockMask:
    """Returns the trees as FlexAttention's block mask, as transformers' `flex_attention` takes it."""
    tokens = sum(tree.num_tokens for tree in trees)
    return create_block_mask(tree_mask(trees, device), None, None, tokens, tokens, device=str(device))
