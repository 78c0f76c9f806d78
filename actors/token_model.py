"""A causal language model as a function that returns the log-probs of given completion tokens.

Promise: logits are computed for completion tokens only, in chunks, and turned into log-probs in float32; `[tokens, vocab]` never exists
whole. No token attends to another sequence's. Learner and reference share this module, so that their log-probs are the same function of
the weights.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors import tree_attention
from actors.token_batch import Bundled, TokenBatch, lay_out
from maspo_ray.config import LoraConfig, ModelConfig
from maspo_ray.objectives.tensor_ops import chunked_logprobs

Attention = Literal["trees", "blocks", "packed", "alone"]
"""How a forward pass keeps the sequences of one row apart.

`trees`: `tree_attention`, on PyTorch's attention; completions may share a prompt.
`blocks`: FlexAttention with a block mask; completions may share a prompt.
`packed`: transformers' own, which takes a sequence to begin where the position ids do (FlashAttention's variable-length path, or a mask).
`alone`: a forward pass for each sequence.
"""


def attention_of(config: Any, supports_backends: bool, implementation: str) -> Attention:
    """Returns the kind of attention by which a model's sequences in one row cannot influence each other.

    Args:
        config: transformers' config of the model.
        supports_backends: whether the model takes its attention from transformers' registry.
        implementation: `model.attn_implementation`.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if not supports_backends or kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        # Recurrent layers (Mamba and the like) would carry their state from one sequence into the next.
        return "alone"
    limited = kinds != {"full_attention"} if kinds else getattr(text, "sliding_window", None) is not None
    if limited or implementation in ("eager", "flash_attention_2"):
        return "packed"
    return "blocks" if implementation == "flex_attention" else "trees"


class TokenModel(torch.nn.Module):
    """Wraps a Hugging Face causal language model; `model` is that model, its parameters under their own names."""

    def __init__(self, model: PreTrainedModel, attention: Attention) -> None:
        super().__init__()
        self.model = model
        self.attention = attention

    @property
    def shares_prompts(self) -> bool:
        """Whether several completions may stand behind one copy of their prompt."""
        return self.attention in ("trees", "blocks")

    def forward(self, batch: TokenBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (log-probs, entropy) of the targets, each [targets] float32; entropy has no gradient."""
        hidden = self._hidden(batch)[0].index_select(0, batch.predictors)
        head = self.model.get_output_embeddings()
        return chunked_logprobs(hidden, head.weight, batch.targets, temperature, bias=head.bias)

    def _hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Returns [1, tokens, d], the last hidden states."""
        assert self.shares_prompts or all(len(tree.branches) == 1 for tree in batch.trees), "a prompt is shared"
        if self.attention == "alone":
            sizes = [tree.num_tokens for tree in batch.trees]
            rows = zip(batch.input_ids.split(sizes, 1), batch.position_ids.split(sizes, 1), strict=True)
            return torch.cat([self._backbone(*row) for row in rows], dim=1)
        if self.attention == "trees":
            return self._backbone(batch.input_ids, batch.position_ids, trees=batch.trees)
        if self.attention == "blocks":
            mask = tree_attention.tree_block_mask(batch.trees, batch.input_ids.device)
            return self._backbone(batch.input_ids, batch.position_ids, attention_mask=mask)
        return self._backbone(batch.input_ids, batch.position_ids)

    def _backbone(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        decoder = self.model.get_decoder()
        hidden: torch.Tensor = decoder(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **inputs
        ).last_hidden_state
        return hidden


def load_token_model(config: ModelConfig, lora: LoraConfig | None = None) -> TokenModel:
    """Returns the config's model in its dtype, on the CPU; with `lora`, its weights frozen and adapters added to train.

    Raises:
        ConfigError: `lora.targets` names no module that can have an adapter.
    """
    there = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(
        config.path, attn_implementation=config.attn_implementation, config=there, **options
    )
    attention = attention_of(there, model._supports_attention_backend, config.attn_implementation)
    if attention == "trees":
        model.set_attn_implementation(tree_attention.NAME)
        if model.config._attn_implementation != tree_attention.NAME:
            attention = "packed"
    _remove_dropout(model)
    if lora is not None:
        # Imported here, since peft takes time to import and is needed only with adapters.
        from actors.lora import add_adapters

        add_adapters(model, lora)
    return TokenModel(model, attention)


def _remove_dropout(model: PreTrainedModel) -> None:
    """Sets every dropout to 0: the engine samples without dropout, so that log-probs with it would be another policy's."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (a Module's attributes are typed as tensors)


@torch.no_grad()
def completion_logprobs(
    model: torch.nn.Module, bundles: Sequence[Bundled], temperature: float, device: torch.device, max_tokens: int
) -> list[NDArray[np.float32]]:
    """Returns the log-probs of each completion, [tokens] float32, in the order of the bundles and of the completions in them.

    Args:
        model: a `TokenModel`, or an engine that wraps one.
        max_tokens: limit of one forward pass, exceeded only by a bundle that alone has more.
    """
    scored: list[NDArray[np.float32]] = []
    row: list[Bundled] = []
    for i, bundle in enumerate(bundles):
        row.append(bundle)
        if i + 1 < len(bundles) and sum(map(_num_tokens, [*row, bundles[i + 1]])) <= max_tokens:
            continue
        logprobs, _ = model(lay_out(row, device), temperature)
        lengths = [len(completion) for _, completions in row for completion in completions]
        scored += [part.numpy() for part in logprobs.cpu().split(lengths)]
        row = []
    return scored


def _num_tokens(bundle: Bundled) -> int:
    return len(bundle[0]) + sum(map(len, bundle[1]))
