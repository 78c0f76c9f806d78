"""A causal language model as what reinforcement learning needs of it: the log-probs of given completion tokens.

Promise: logits are computed for completion tokens only, in chunks, in float32; `[tokens, vocab]` never exists whole. Shared by
the learner and the reference, so that their log-probs are the same function of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from maspo_ray.config import ModelConfig
from maspo_ray.tensor_ops import chunked_logprobs


@dataclass(frozen=True, slots=True)
class PaddedSequences:
    """Sequences as rows, padded on the right.

    Attributes:
        input_ids: [rows, width] int64.
        attention_mask: [rows, width] int64, 0 on padding.
        completion_mask: [rows, width] bool, the tokens whose log-probs are wanted; never a row's first.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor


def pad_sequences(
    pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], device: torch.device
) -> PaddedSequences:
    """Returns rows of (prompt, completion) pairs of token ids."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    input_ids = np.zeros((len(pairs), width), dtype=np.int64)
    kind = np.zeros((len(pairs), width), dtype=np.int8)
    for row, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        input_ids[row, : len(prompt)] = prompt
        input_ids[row, len(prompt) : end] = completion
        kind[row, : len(prompt)] = 1
        kind[row, len(prompt) : end] = 2
    kinds = torch.from_numpy(kind).to(device)
    return PaddedSequences(torch.from_numpy(input_ids).to(device), (kinds > 0).long(), kinds == 2)


class TokenModel(torch.nn.Module):
    """Wraps a Hugging Face causal language model; `model` is that model, its parameters under their own names."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (log-probs, entropy), each [completion tokens] float32, row after row; entropy has no gradient."""
        backbone = self.model.get_decoder()
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        wanted = completion_mask[:, 1:]
        head = self.model.get_output_embeddings()
        return chunked_logprobs(hidden[:, :-1][wanted], head.weight, input_ids[:, 1:][wanted], temperature)


def load_token_model(config: ModelConfig) -> TokenModel:
    """Returns the model of the config in its dtype, on the CPU."""
    model = AutoModelForCausalLM.from_pretrained(
        config.path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    return TokenModel(model)


@torch.no_grad()
def sequence_logprobs(
    model: torch.nn.Module,
    pairs: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]],
    temperature: float,
    device: torch.device,
) -> list[NDArray[np.float32]]:
    """Returns for each (prompt, completion) pair the completion's [tokens] float32 log-probs."""
    batch = pad_sequences(pairs, device)
    logprobs, _ = model(batch.input_ids, batch.attention_mask, batch.completion_mask, temperature)
    lengths = [len(completion) for _, completion in pairs]
    return [part.numpy() for part in logprobs.cpu().split(lengths)]
