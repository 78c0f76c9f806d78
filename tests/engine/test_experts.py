"""The routers of a mixture of experts: frozen or trained, and the load-balancing loss against transformers' own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from learners import random_batch, start_learners
from random_models import EXPERTS, SIZES, random_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from actors.experts import LoadBalance, balance_coefficient, freeze_routers, routers_of
from actors.lora import add_adapters
from actors.token_batch import lay_out
from actors.token_model import load_token_model
from maspo_ray.config import LoraConfig, ModelConfig
from maspo_ray.errors import ConfigError
from maspo_ray.packing import pack

pytestmark = pytest.mark.engine

QWEN: dict[str, Any] = {**SIZES, **EXPERTS, "head_dim": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
JAMBA: dict[str, Any] = {**SIZES, **EXPERTS, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    from prepare import build_tokenizer

    folder = tmp_path_factory.mktemp("experts")
    random_model(Qwen3MoeConfig(**QWEN)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (Qwen3MoeConfig(**QWEN), ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        (MixtralConfig(**SIZES, num_local_experts=4), ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        # Its router is a plain linear layer, as others of its layers are; its first layer has no experts.
        (JambaConfig(**JAMBA), ["model.layers.1.feed_forward.router"]),
        (LlamaConfig(**SIZES), []),
    ],
    ids=["qwen3", "mixtral", "jamba", "dense"],
)
def test_routers_are_those_that_the_model_declares(config: PreTrainedConfig, names: list[str]) -> None:
    model = random_model(config)
    assert list(routers_of(model)) == names
    if names:
        freeze_routers(model)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert frozen == [f"{name}.weight" for name in names]


def test_router_with_an_adapter_is_one_router() -> None:
    model = random_model(JambaConfig(**JAMBA))
    add_adapters(model, LoraConfig(rank=2, alpha=4, targets=("router", "q_proj")))
    assert list(routers_of(model)) == ["model.layers.1.feed_forward.router"]
    freeze_routers(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition("_proj.")[0] for name in trained} == {"model.layers.1.self_attn.q"}


def test_frozen_router_of_a_model_without_one_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^learner\.router is frozen; LlamaForCausalLM has no router .* Remove it\.$"
    ):
        freeze_routers(random_model(LlamaConfig(**SIZES)))
    with pytest.raises(ConfigError, match=r"^learner\.router_aux_loss_coef is 0\.1; LlamaForCausalLM has no load-bal"):
        LoadBalance(random_model(LlamaConfig(**SIZES)), 0.1)


def test_coefficient_is_the_model_s_where_it_asks_for_the_loss() -> None:
    quiet = random_model(Qwen3MoeConfig(**QWEN, router_aux_loss_coef=0.02))
    asking = random_model(Qwen3MoeConfig(**QWEN, router_aux_loss_coef=0.02, output_router_logits=True))
    assert balance_coefficient(quiet, None) == 0.0
    assert balance_coefficient(asking, None) == 0.02
    assert (balance_coefficient(asking, 0.0), balance_coefficient(quiet, 0.5)) == (0.0, 0.5)
    assert balance_coefficient(random_model(LlamaConfig(**SIZES)), None) == 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_balance_is_transformers_own_gradients_included(experts: str, checkpointing: bool) -> None:
    plain: Any = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32)
    ids = np.arange(3, 24, dtype=np.int32)
    # Of a sequence the learner does not read the last token, after which nothing is predicted.
    row = torch.from_numpy(ids[:-1].astype(np.int64))[None]
    # transformers adds 0.7 · balance to the labels' loss where it is asked for the routers' logits.
    plain.router_aux_loss_coef = 0.7
    with_balance = plain(row, labels=row, output_router_logits=True)
    expected = torch.autograd.grad(with_balance.loss - plain(row, labels=row).loss, list(plain.parameters()))

    token_model = load_token_model(ModelConfig(path=experts, dtype="float32")).train()
    if checkpointing:
        token_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    balance = LoadBalance(token_model.model, 0.7)
    for _ in range(2):
        with balance.recording():
            logprobs, _ = token_model(lay_out([(ids[:5], [ids[5:]])], torch.device("cpu")), 1.0)
        loss = balance.loss()
        assert abs(loss.item() - with_balance.aux_loss.item()) <= 1e-6
        token_model.zero_grad()
        (logprobs.sum() * 0 + balance.coefficient * loss).backward()
    for (name, parameter), gradient in zip(token_model.model.named_parameters(), expected, strict=True):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (found - gradient).abs().max() <= 1e-6, name
    assert token_model.model.get_parameter("model.layers.1.mlp.gate.weight").grad.abs().max() > 1e-4


@pytest.mark.ray
def test_learner_trains_experts_with_the_load_balance_and_leaves_a_frozen_router(
    experts: str, own_ray: None, tmp_path: Path
) -> None:
    experiences, rows = random_batch(seed=1)
    plain: Any = AutoModelForCausalLM.from_pretrained(experts, dtype=torch.float32)
    logits: list[torch.Tensor] = []
    for prompt, completion, *_ in rows:
        ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int64))
        logits += [layer.detach() for layer in plain(ids[None, :-1], output_router_logits=True).router_logits]
    # Of all tokens at once, so that each is in the one micro-batch: transformers' formula by hand.
    probabilities = torch.cat(logits).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0)
    expected = 4 * float((chosen.mean(0) * probabilities.mean(0)).sum())

    [learner] = start_learners(experts, 1, None, 4096, router="frozen", router_aux_loss_coef=0.1, share_prompts=False)
    [(plan, payloads)] = pack(experiences, 1, 4096, False, 1)
    [report] = ray.get(learner.train_step.remote(0, plan, *payloads))
    assert report.applied
    assert abs(report.metrics["objective/load_balance"] - expected) <= 1e-5
    ray.get(learner.save.remote(str(tmp_path / "saved")))
    before, after = load_file(Path(experts) / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert same == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    ray.kill(learner)
