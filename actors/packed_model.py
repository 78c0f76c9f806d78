"""A causal language model's forward pass over one row of several sequences.

Promise: no token attends to another sequence's. Logits are computed for completion tokens only, in chunks, and turned into log-probs in
float32; `[tokens, vocab]` never exists whole.
"""

from typing import Literal, Self

import torch
from transformers import PreTrainedModel

from actors import tree_attention
from actors.output_layer import OutputLayer
from actors.token_batch import TokenBatch
from maspo_ray.objectives.tensor_ops import chunked_logprobs

Attention = Literal["trees", "blocks", "packed", "alone"]
"""How a forward pass keeps the sequences of one row apart.

`trees`: `tree_attention`, on PyTorch's attention; completions may share a prompt.
`blocks`: FlexAttention with a block mask; completions may share a prompt.
`packed`: transformers' own, which takes a sequence to begin where the position ids do (FlashAttention's variable-length path, or a mask).
`alone`: a forward pass for each sequence.
"""


class TokenModel(torch.nn.Module):
    """Wraps a Hugging Face causal language model; `model` is that model, its parameters under their own names."""

    def __init__(self, model: PreTrainedModel, attention: Attention) -> None:
        super().__init__()
        self.model = model.eval()
        self.attention = attention
        self._output = OutputLayer(model)

    def train(self, mode: bool = True) -> Self:
        """Puts the model into evaluation mode whatever the mode: an engine samples without dropout and without noise in its router, so that
        log-probs with them would be another policy's. Modules that recompute their activations do so in training mode alone, and are put
        there; those within them are not."""
        super().train(False)
        for module in self.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        return self

    @property
    def shares_prompts(self) -> bool:
        """Whether several completions may stand behind one copy of their prompt."""
        return self.attention in ("trees", "blocks")

    @property
    def changes_logits(self) -> bool:
        """Whether the architecture's logits are other than its output layer's products."""
        return self._output.transform is not None

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (log-probs, entropy) of the targets, each [targets] float32; entropy has no gradient."""
        hidden = self.hidden(batch)
        head, transform = self._output.linear, self._output.transform
        return chunked_logprobs(hidden, head.weight, batch.targets, temperature, bias=head.bias, transform=transform)

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Returns [targets, d], what the output layer is given to predict the targets from."""
        return self._row(batch)[0].index_select(0, batch.predictors)

    def _row(self, batch: TokenBatch) -> torch.Tensor:
        """Returns [1, tokens, d], what the output layer is given for the whole row."""
        assert self.shares_prompts or all(len(tree.branches) == 1 for tree in batch.trees), "a prompt is shared"
        if self.attention == "alone":
            sizes = [tree.num_tokens for tree in batch.trees]
            # Each begins at position 0, which is what a model takes that it is not told positions.
            return torch.cat([self._output.hidden(input_ids=ids) for ids in batch.input_ids.split(sizes, 1)], dim=1)
        if self.attention == "trees":
            return self._output.hidden(input_ids=batch.input_ids, position_ids=batch.position_ids, trees=batch.trees)
        if self.attention == "blocks":
            mask = tree_attention.tree_block_mask(batch.trees, batch.input_ids.device)
            return self._output.hidden(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=mask)
        return self._output.hidden(input_ids=batch.input_ids, position_ids=batch.position_ids)
