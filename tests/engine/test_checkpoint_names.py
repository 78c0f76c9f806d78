"""Weights piece by piece under the checkpoint's names: the same as `save_pretrained` writes, and what a real engine computes with them."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import random_models
import ray
import torch
from random_models import EXPERTS, random_model
from rollouts import make_prompt, sample, start_rollout
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Glm4MoeConfig,
    JambaConfig,
    Lfm2MoeConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from actors.checkpoint_names import pieces_of
from actors.deepspeed_engine import EngineWeights
from actors.lora import add_adapters, weights_of
from maspo_ray.config import LoraConfig

pytestmark = pytest.mark.engine

TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
# More ids than the tokenizer's 64 tokens.
SIZES: dict[str, Any] = {**random_models.SIZES, **TOKENS, "vocab_size": 96, "num_hidden_layers": 3}
GLM: dict[str, Any] = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
JAMBA: dict[str, Any] = {**EXPERTS, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
CONFIGS: dict[str, PreTrainedConfig] = {
    # Experts fused; of Mixtral renamed too, of GLM-4 beside a buffer that is saved, of Ernie behind a buffer whose name changes.
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32, decoder_sparse_step=1, mlp_only_layers=[]),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": Glm4MoeConfig(**SIZES, **GLM, head_dim=32),
    "ernie": Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    # With layers that are no attention, and dense ones.
    "jamba": JambaConfig(**SIZES, **JAMBA),
    "lfm2_moe": Lfm2MoeConfig(**SIZES, **EXPERTS, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"]),
    # Tied, nothing to convert.
    "gemma2": Gemma2Config(**SIZES, head_dim=32),
}


def _saved(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Returns a random model as a run gets it: read from a folder, buffers included."""
    random_model(config).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _published(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weights = weights_of(model)
    shapes = {name: (tuple(weight.value().shape), weight.value().dtype) for name, weight in weights.items()}
    found: dict[str, torch.Tensor] = {}
    for piece in pieces_of(model, shapes):
        made = piece.convert([weights[name].value() for name in piece.sources])
        assert {name: (tuple(weight.shape), weight.dtype) for name, weight in made.items()} == piece.shapes
        assert not found.keys() & made.keys()
        found |= made
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_pieces_are_together_what_save_pretrained_writes(kind: str, tmp_path: Path) -> None:
    model = _saved(CONFIGS[kind], tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    expected, found = load_file(tmp_path / "second" / "model.safetensors"), _published(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_pieces_of_one_projection_are_views_and_of_two_hold_one_copy(tmp_path: Path) -> None:
    model = _saved(CONFIGS["qwen3_moe"], tmp_path)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    found = _published(model)
    down = found["model.layers.0.mlp.experts.3.down_proj.weight"]
    assert down.untyped_storage().data_ptr() == experts.down_proj.untyped_storage().data_ptr()
    up, gate = (found[f"model.layers.0.mlp.experts.3.{name}_proj.weight"] for name in ("up", "gate"))
    # Row by row in memory: gate above up.
    assert torch.equal(torch.cat([gate, up]), experts.gate_up_proj[3])


def test_pieces_of_adapted_experts_are_merged(tmp_path: Path) -> None:
    model = _saved(CONFIGS["qwen3_moe"], tmp_path)
    before = {name: weight.clone() for name, weight in _published(model).items()}
    add_adapters(model, LoraConfig(rank=2, alpha=4, targets=("q_proj",)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    after = _published(model)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel]:
    from prepare import build_tokenizer

    folder = tmp_path_factory.mktemp("experts")
    model = _saved(CONFIGS["qwen3_moe"], folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder), model


@pytest.fixture(scope="module")
def engine(experts: tuple[str, PreTrainedModel], own_ray: None) -> Iterator[Any]:
    actor = start_rollout(experts[0], cpus=1)
    ray.get(actor.setup.remote())
    yield actor
    ray.get(actor.shutdown.remote())
    ray.kill(actor)


@pytest.mark.ray
def test_engine_samples_from_experts_that_were_published(engine: Any, experts: tuple[str, PreTrainedModel]) -> None:
    from actors.completion_text import REPLACEMENT
    from actors.weight_source import EngineWeightSource
    from maspo_ray.weight_sync.publisher import WeightPublisher

    model = experts[1]
    # What `EngineWeights` reads of a DeepSpeed engine.
    of_one_rank: Any = SimpleNamespace(
        module=SimpleNamespace(model=model), zero_optimization_partition_weights=lambda: False
    )
    source = EngineWeightSource(EngineWeights(of_one_rank))
    publisher = WeightPublisher(source, "gloo", 0, ray.util.get_node_ip_address(), 30.0)
    publisher.connect((0,), [engine], 1)
    num_nameless = 0
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        publisher.publish(version, (0,))
        prompt = make_prompt(6, 10, 13, 7, 11, 14)
        for completion in sample(engine, prompt, range(4), 12):
            ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logprobs.gather(1, ids[1:, None])[len(prompt.token_ids) - 1 :, 0]
            assert np.abs(completion.logprobs - expected.numpy()).max() <= 1e-4
            nameless = int((completion.token_ids >= 64).sum())
            assert completion.text.count(REPLACEMENT) == nameless
            num_nameless += nameless
    assert num_nameless > 0
    publisher.shutdown()
