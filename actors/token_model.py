"""The config's model as a function that returns the log-probs of given completion tokens.

Promise: learner and reference share this module, so that their log-probs are the same function of the weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from actors.attention_choice import choose_attention
from actors.packed_model import TokenModel
from actors.token_batch import Bundled, lay_out
from maspo_ray.config import LoraConfig, ModelConfig
from maspo_ray.errors import ConfigError


def load_token_model(
    config: ModelConfig, lora: LoraConfig | None = None, device: torch.device | None = None
) -> TokenModel:
    """Returns the config's model in its dtype, on the CPU; with `lora`, its weights frozen and adapters added to train.

    Args:
        device: where a slice of the model is tried, to find how its sequences are kept apart; the CPU by default.

    Raises:
        ConfigError: the model has not `model.attn_implementation`; `lora.targets` names no module that can have an adapter; the model's
            output layer is not one that can be used.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.path,
            attn_implementation=config.attn_implementation,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
        )
    except ValueError as error:
        architecture, found, _ = str(error).partition(" does not support ")
        if not found:
            raise
        raise ConfigError(
            f"model.attn_implementation is {config.attn_implementation}; {architecture} does not have it in transformers. "
            "Set eager, which every model has."
        ) from error
    if lora is not None:
        # Imported here, since peft takes time to import and is needed only with adapters.
        from actors.lora import add_adapters

        add_adapters(model, lora)
    return TokenModel(model, choose_attention(model, config.attn_implementation, device or torch.device("cpu")))


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
