"""The estimate of activations against what PyTorch keeps of the learner's model for its backward pass."""

import inspect

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from actors import hf_reference, tree_attention
from actors.packed_model import TokenModel
from actors.token_batch import lay_out
from maspo_ray.actor_memory import LOGIT_CHUNK_TOKENS, REFERENCE_ROW_TOKENS, activation_bytes
from maspo_ray.config import RunConfig
from maspo_ray.model_shape import ModelShape
from maspo_ray.objectives.tensor_ops import chunked_logprobs

pytestmark = pytest.mark.engine
LAYERS, TOKENS = 3, 420


def _kept_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of all that autograd keeps of a row of completions behind a shared prompt, the weights left out."""
    model.set_attn_implementation(tree_attention.NAME)
    wrapped = TokenModel(model, "trees").train()
    batch = lay_out([(np.zeros(20, np.int32), [np.zeros(101, np.int32)] * 4)], torch.device("cpu"))
    assert batch.input_ids.numel() == TOKENS
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            # Its address must not be given to another.
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = wrapped(batch, 1.0)
    assert logprobs.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "checkpointed"])
def test_estimated_activations_are_what_autograd_keeps(kind: str, dtype: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model: PreTrainedModel = (
        Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))
        if kind == "qwen2"
        else LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    )
    model.to(getattr(torch, dtype))
    if kind == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = RunConfig.model_validate(
        {
            "model": {"path": "org/model", "dtype": dtype},
            "data": {"train": {"kind": "jsonl", "path": "rows.jsonl"}},
            "learner": {"gradient_checkpointing": kind == "checkpointed"},
        }
    )
    shape = ModelShape(64, 192, LAYERS, 6, 2, 32, 512, 10**6, True, LAYERS)
    estimated, kept = activation_bytes(config, shape, TOKENS), _kept_bytes(model)
    if kind == "checkpointed":
        # One layer's tensors are there in the backward pass, not before.
        kept += int(TOKENS * _layer_bytes(config, shape))
    assert estimated == pytest.approx(kept, rel=0.1)


def _layer_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Returns what the estimate takes for one layer of a token."""
    whole = config.model_copy(update={"learner": config.learner.model_copy(update={"gradient_checkpointing": False})})
    two = ModelShape(64, 192, 2, 6, 2, 32, 512, 10**6, True, 2)
    one = ModelShape(64, 192, 1, 6, 2, 32, 512, 10**6, True, 1)
    return activation_bytes(whole, two, 1) - activation_bytes(whole, one, 1)


def test_estimate_s_sizes_of_passes_are_the_actors_own() -> None:
    assert inspect.signature(chunked_logprobs).parameters["chunk_tokens"].default == LOGIT_CHUNK_TOKENS
    assert hf_reference._ROW_TOKENS == REFERENCE_ROW_TOKENS
