"""Architectures that do more than attention and hidden @ head: their log-probs and gradients are transformers' own, or they are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.attention_choice import choose_attention
from actors.lora import adapters_of, weights_of
from actors.model_check import check_model, largest_distance, plain_logprobs
from actors.model_slice import slice_of
from actors.packed_model import TokenModel
from actors.token_batch import apart, lay_out
from actors.token_model import load_token_model
from bench.tiny_models import FAMILIES, build, sequences
from maspo_ray.config import LearnerConfig, LoraConfig, ModelConfig
from maspo_ray.errors import ConfigError

pytestmark = pytest.mark.engine

CPU = torch.device("cpu")
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("family", "implementation", "attention"),
    [
        ("gemma2", "eager", "packed"),  # a final soft cap, and one in the attention
        ("cohere", "sdpa", "trees"),  # a scale of the logits
        ("granite", "sdpa", "trees"),
        ("minicpm3", "sdpa", "trees"),  # a scale before the output layer
        ("falcon_h1", "sdpa", "alone"),  # layers with a state, and a multiplier
        ("phi", "sdpa", "trees"),  # a bias of the output layer
        ("opt", "sdpa", "alone"),  # dropout by function, and positions of its own
        ("nemotron", "sdpa", "packed"),  # keeps the attention's arguments to itself
        ("gpt_oss", "eager", "alone"),  # its masks do not know of packing
        ("mpt", "eager", "alone"),  # takes no positions
        ("phimoe", "sdpa", "trees"),  # noise in its router
    ],
)
def test_what_the_learner_computes_is_what_transformers_computes(
    tmp_path: Path, family: str, implementation: Any, attention: str
) -> None:
    path = build(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation, dtype=torch.float32).eval()
    model = load_token_model(ModelConfig(path=path, dtype="float32", attn_implementation=implementation)).train()
    assert model.attention == attention
    bundles = sequences(64)
    expected = plain_logprobs(plain, bundles, 0.7, CPU)
    found, _ = model(lay_out(bundles if model.shares_prompts else apart(bundles), CPU), 0.7)
    assert (found - expected).abs().max() < 2e-5
    weights = torch.linspace(-1, 2, len(found))
    distance, name = largest_distance(
        *(
            {n: p.grad for n, p in m.named_parameters()}
            for m in (_backward(model.model, found, weights), _backward(plain, expected, weights))
        )
    )
    assert distance < 1e-4, name


def _backward(model: Any, logprobs: torch.Tensor, weights: torch.Tensor) -> Any:
    (logprobs * weights).sum().backward()
    return model


class _Dotted(LlamaForCausalLM):
    """Makes its logits without its output layer."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = super().forward(input_ids, **inputs)
        output.logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.T
        return output


class _Scaled(LlamaForCausalLM):
    """Scales its logits by something of the hidden states."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = super().forward(input_ids, **inputs)
        output.logits = output.logits * (1 + self.model(input_ids).last_hidden_state.mean(-1, keepdim=True))
        return output


class _Masked(LlamaForCausalLM):
    """Runs only with a mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **inputs)


class _Mixed(LlamaForCausalLM):
    """Has more than a linear layer there."""

    def set_head(self) -> Any:
        self.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        return self


class _Doubled(LlamaForCausalLM):
    """Is another function of a row that shares a prompt."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        shared = any(len(tree.branches) > 1 for tree in inputs.get("trees") or ())
        self.model.norm.variance_epsilon = 1.0 if shared else 1e-6
        return super().forward(*args, **inputs)


def test_an_output_layer_that_is_not_linear_is_refused_by_name() -> None:
    model = _Mixed(LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=False)).set_head()
    with pytest.raises(
        ConfigError, match="_Mixed cannot be trained here: its output layer is Sequential, and not linear. Take"
    ):
        TokenModel(model, "alone")


def test_a_model_that_does_not_run_on_token_ids_alone_is_refused_by_name() -> None:
    model = _Masked(LlamaConfig(**SIZES, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="_Masked cannot be trained here: .* missing 1 required positional argument"):
        choose_attention(model, "sdpa", CPU)


def test_logits_made_without_the_output_layer_are_refused_by_name() -> None:
    model = _Dotted(LlamaConfig(**SIZES, num_hidden_layers=1, tie_word_embeddings=False))
    with pytest.raises(
        ConfigError, match="_Dotted cannot be trained here: its forward pass does more around its output layer"
    ):
        TokenModel(model, "alone")


def test_logits_that_no_part_explains_are_refused_by_the_numbers() -> None:
    model = _Scaled(LlamaConfig(**SIZES, num_hidden_layers=1, initializer_range=0.2))
    with pytest.raises(
        ConfigError, match=r"differ by up to .* of _Scaled.* No setting avoids it: take a model of another"
    ):
        check_model(TokenModel(model, "alone"), ModelConfig(path="scaled", dtype="float32"), LearnerConfig(), CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_difference_names_the_setting_that_avoids_it(dtype: Any) -> None:
    model = _Doubled(LlamaConfig(**SIZES, num_hidden_layers=2, dtype=dtype, initializer_range=0.2))
    choose_attention(LlamaForCausalLM(model.config), "sdpa", CPU)
    model.set_attn_implementation("maspo_trees")
    config = ModelConfig(path="doubled", dtype=dtype)
    token_model = TokenModel(model.to(getattr(torch, dtype)), "trees")
    with pytest.raises(ConfigError) as refused:
        check_model(token_model, config, LearnerConfig(), CPU)
    message = str(refused.value)
    assert message.startswith("model.path is doubled; the learner's log-probs differ by up to ")
    assert message.endswith("Set learner.share_prompts: false, which avoids it.")
    assert "\n" not in message
    check_model(token_model, config, LearnerConfig(share_prompts=False), CPU)


def test_a_tiny_gemma2_in_bfloat16_is_told_which_attention_has_its_soft_cap(tmp_path: Path) -> None:
    # transformers' sdpa leaves the attention's soft cap out, which the engine applies.
    config = ModelConfig(path=build("gemma2", tmp_path), dtype="bfloat16")
    with pytest.raises(
        ConfigError, match="the reference's log-probs differ .* Set model.attn_implementation: eager, which avoids it."
    ):
        check_model(load_token_model(config), config, None, CPU)
    eager = config.model_copy(update={"attn_implementation": "eager"})
    check_model(load_token_model(eager), eager, LearnerConfig(gradient_checkpointing=True), CPU)


def test_dropout_within_recomputed_layers_is_found_in_the_gradient(tmp_path: Path) -> None:
    config = ModelConfig(path=build("opt", tmp_path), dtype="float32")
    model = load_token_model(config)
    check_model(model, config, LearnerConfig(), CPU)
    with pytest.raises(ConfigError, match="Set learner.gradient_checkpointing: false, which avoids it."):
        check_model(model, config, LearnerConfig(gradient_checkpointing=True), CPU)


def test_an_attention_that_a_model_has_not_is_one_line(tmp_path: Path) -> None:
    config = ModelConfig(path=build("mamba", tmp_path), dtype="float32")
    with pytest.raises(
        ConfigError, match="^model.attn_implementation is sdpa; MambaForCausalLM does not have it .* Set eager"
    ):
        load_token_model(config)


def test_a_slice_has_a_layer_of_each_kind_and_few_rows_of_the_vocabulary() -> None:
    kinds = ["conv", "conv", "full_attention", "conv", "full_attention", "conv"]
    config = {
        **FAMILIES["lfm2"],
        "num_hidden_layers": 6,
        "layer_types": kinds,
        "vocab_size": 2048,
        "pad_token_id": 2000,
    }
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    model: Any = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("lfm2", **{**sizes, **config}), dtype=torch.bfloat16
    )
    tried: Any = slice_of(model, torch.float32, CPU, whole_parameters=0)
    assert len(tried.model.layers) == 3 and len(model.model.layers) == 6
    assert tried.lm_head.weight is tried.model.embed_tokens.weight and tried.lm_head.weight.shape == (512, 64)
    assert {p.dtype for p in tried.parameters()} == {torch.float32}
    whole: Any = slice_of(model, torch.float32, CPU)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(
        whole.model.layers[2].self_attn.q_proj.weight, model.model.layers[2].self_attn.q_proj.weight.float()
    )
    assert torch.equal(whole(ids).logits, model.float()(ids).logits)
    assert tried(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("family", "adapted", "left_out"),
    [
        # Its experts are one tensor of a layer, its router no linear module.
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj", "model.layers.1.mlp.experts"),
        # Its step's weight is read without the module.
        ("jamba", "model.layers.0.mamba.in_proj", "model.layers.0.mamba.dt_proj"),
        # A class of its own, which is linear nonetheless.
        ("falcon", "transformer.h.0.self_attention.query_key_value", "lm_head"),
    ],
)
def test_adapters_of_all_linear_modules_are_those_that_count_and_can_be_merged(
    tmp_path: Path, family: str, adapted: str, left_out: str
) -> None:
    config = ModelConfig(path=build(family, tmp_path), dtype="float32")
    model = load_token_model(config, LoraConfig(rank=2, alpha=6))
    names = {name for name, module in model.model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted in names and left_out not in names
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters_of(model.model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    check_model(model, config, LearnerConfig(), CPU)
    plain = AutoModelForCausalLM.from_pretrained(config.path, attn_implementation="eager", dtype=torch.float32)
    before = plain_logprobs(plain, sequences(64), 0.7, CPU)
    plain.load_state_dict({name: weight.value() for name, weight in weights_of(model.model).items()}, strict=False)
    merged = plain_logprobs(plain, sequences(64), 0.7, CPU)
    found, _ = model(lay_out(sequences(64) if model.shares_prompts else apart(sequences(64)), CPU), 0.7)
    assert (merged - before).abs().max() > 0.05
    assert (found - merged).abs().max() < 2e-5


def test_a_module_whose_weight_is_read_without_it_is_refused_as_a_target(tmp_path: Path) -> None:
    config = ModelConfig(path=build("jamba", tmp_path), dtype="float32")
    with pytest.raises(ConfigError, match="dt_proj cannot have an adapter that is merged for the engines"):
        load_token_model(config, LoraConfig(targets=("dt_proj",)))
