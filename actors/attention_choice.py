"""How a model's sequences are kept apart in one row of tokens, found by trying.

Promise: a way is taken only if, on a few tokens, each sequence's hidden states in a row of several are those that it has alone, and if
all of the attention is the implementation's that was asked for; of the ways that are left, the one that computes the least.
"""

import logging

import numpy as np
import torch
from transformers import PreTrainedModel

from actors import tree_attention
from actors.model_slice import slice_of
from actors.packed_model import Attention, TokenModel
from actors.token_batch import Bundled, apart, lay_out
from maspo_ray.errors import ConfigError

_FLOAT32_DISTANCE, _HALF_DISTANCE = 1e-3, 5e-2
"""Of a token's hidden states in a row from those alone, relative to their length. What leaks from a neighbour moves them by more."""

_WAYS: dict[str, tuple[Attention, ...]] = {
    "sdpa": ("trees", "packed"),
    "flex_attention": ("blocks", "packed"),
    "eager": ("packed",),
    "flash_attention_2": ("packed",),
}


def try_dtype(implementation: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which a slice is tried: float32, but FlashAttention's kernels take halves alone."""
    return dtype if implementation.startswith("flash") else torch.float32


def choose_attention(model: PreTrainedModel, implementation: str, device: torch.device) -> Attention:
    """Returns how the model's sequences are kept apart; its attention is set to it.

    Args:
        implementation: `model.attn_implementation`.
        device: where to try.

    Raises:
        ConfigError: the model does not run.
    """
    tried = slice_of(model, try_dtype(implementation, model.dtype), device)
    bundles = probe_bundles(model)
    set_attention(tried, "alone", implementation)
    try:
        alone = _states(tried, "alone", apart(bundles), device)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model.path is {model.name_or_path}; {type(model).__name__} does not run on a few tokens ({error}). Take a model of another "
            "architecture, or of another attention by model.attn_implementation."
        ) from error
    limit = _FLOAT32_DISTANCE if alone.dtype == torch.float32 else _HALF_DISTANCE
    for way in _WAYS[implementation]:
        if way == "trees" and not model._supports_attention_backend:
            continue
        set_attention(tried, way, implementation)
        try:
            states = _states(tried, way, bundles if way in ("trees", "blocks") else apart(bundles), device)
        except Exception as error:
            # Whatever a model's code raises, it says that this way is not for it; the last way, a sequence alone, raises what it may.
            logging.getLogger(__name__).info("%s: not %s: %s", type(model).__name__, way, error)
            continue
        if bool(((states - alone).norm(dim=-1) <= limit * alone.norm(dim=-1)).all()):
            break
    else:
        way = "alone"
    set_attention(model, way, implementation)
    return way


def set_attention(model: PreTrainedModel, way: Attention, implementation: str) -> None:
    """Sets the attention that a way takes."""
    wanted = tree_attention.NAME if way == "trees" else implementation
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def probe_bundles(model: PreTrainedModel) -> list[Bundled]:
    """Returns a few random tokens of the model's vocabulary, none of which its config gives a meaning: prompts, and completions of each,
    one of which has a single token."""
    config = model.config.get_text_config()
    # The last rows may be padding, of which the architecture makes no logits.
    rows = min(len(model.get_output_embeddings().weight) // 2, 512)
    special = {value for each in (config, model.config) for key, value in each.to_dict().items() if key.endswith("_id")}
    usual = [token for token in range(rows) if token not in special] or [0]
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.choice(usual, length).astype(np.int32)

    return [(ids(6), [ids(7), ids(1), ids(5)]), (ids(3), [ids(6)])]


@torch.no_grad()
def _states(model: PreTrainedModel, way: Attention, bundles: list[Bundled], device: torch.device) -> torch.Tensor:
    """Returns [targets, d], the hidden states that predict the completions' tokens."""
    batch = lay_out(bundles, device)
    return TokenModel(model, way).hidden(batch)
