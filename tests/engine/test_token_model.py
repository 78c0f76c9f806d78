"""Log-probs of packed sequences against plain transformers, one sequence at a time; gradients too."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from actors.lora import adapters_of, weights_of
from actors.token_batch import Bundled, Tree, apart, lay_out
from actors.token_model import TokenModel, completion_logprobs, load_token_model
from actors.tree_attention import tree_mask
from maspo_ray.config import LoraConfig, ModelConfig
from maspo_ray.errors import ConfigError

pytestmark = pytest.mark.engine

TEMPERATURE = 0.7
SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}


def _save(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    if kind == "llama":
        LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).save_pretrained(folder)
    elif kind == "sliding":
        MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=4)).save_pretrained(folder)
    else:
        MambaForCausalLM(MambaConfig(**SIZES, initializer_range=0.1)).save_pretrained(folder)
    return str(folder)


def _bundles(seed: int) -> list[Bundled]:
    rng = np.random.default_rng(seed)

    def ids(length: int) -> Any:
        return rng.integers(3, 60, size=length).astype(np.int32)

    # A completion of one token has no branch of its own.
    return [(ids(5), [ids(n) for n in (9, 1, 4)]), (ids(1), [ids(3)]), (ids(7), [ids(n) for n in (1, 1, 6, 12)])]


def _plain(model: torch.nn.Module, bundles: list[Bundled]) -> torch.Tensor:
    """Returns the completions' log-probs, one sequence after the other through transformers' own forward pass."""
    rows = []
    for prompt, [completion] in apart(bundles):
        ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        rows.append(logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(rows)


def _with_gradients(model: torch.nn.Module, logprobs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weights = torch.linspace(-1, 2, len(logprobs))
    gradients = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
    return logprobs.detach(), [gradient.detach() for gradient in gradients]


def _assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("shared", [True, False])
def test_packed_logprobs_and_gradients_equal_those_of_sequences_alone(tmp_path: Path, shared: bool) -> None:
    path = _save(tmp_path, "llama")
    token_model = load_token_model(ModelConfig(path=path, dtype="float32"))
    assert token_model.attention == "trees"
    plain = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    bundles = _bundles(1)
    expected, expected_gradients = _with_gradients(plain, _plain(plain, bundles))
    batch = lay_out(bundles if shared else apart(bundles), torch.device("cpu"))
    logprobs, gradients = _with_gradients(token_model.model, token_model(batch, TEMPERATURE)[0])
    assert (logprobs - expected).abs().max() < 1e-5 * expected.abs().max()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        _assert_close(gradient, expected_gradient)


@pytest.mark.parametrize(("kind", "attention"), [("sliding", "packed"), ("mamba", "alone")])
def test_models_that_cannot_share_a_prompt_are_exact_without(tmp_path: Path, kind: str, attention: str) -> None:
    path = _save(tmp_path, kind)
    implementation: Any = "eager" if kind == "mamba" else "sdpa"
    token_model = load_token_model(ModelConfig(path=path, dtype="float32", attn_implementation=implementation))
    assert token_model.attention == attention
    assert not token_model.shares_prompts
    plain = type(token_model.model).from_pretrained(path, dtype=torch.float32)
    bundles = _bundles(2)
    expected, expected_gradients = _with_gradients(plain, _plain(plain, bundles))
    batch = lay_out(apart(bundles), torch.device("cpu"))
    logprobs, gradients = _with_gradients(token_model.model, token_model(batch, TEMPERATURE)[0])
    assert (logprobs - expected).abs().max() < 1e-5 * expected.abs().max()
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        _assert_close(gradient, expected_gradient)
    with pytest.raises(AssertionError, match="a prompt is shared"):
        token_model(lay_out(bundles, torch.device("cpu")), TEMPERATURE)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_neighbours_in_a_row_do_not_change_a_sequence(tmp_path: Path, implementation: Any) -> None:
    config = ModelConfig(path=_save(tmp_path, "llama"), dtype="float32", attn_implementation=implementation)
    token_model = load_token_model(config)
    first, *others = apart(_bundles(3))
    probe = len(first[1][0])
    alone, _ = token_model(lay_out([first], torch.device("cpu")), TEMPERATURE)
    for neighbours in (others, apart(_bundles(4))):
        packed, _ = token_model(lay_out([*neighbours, first], torch.device("cpu")), TEMPERATURE)
        assert (packed[-probe:] - alone).abs().max() < 1e-5


def test_block_mask_lets_a_branch_see_its_prompt_and_itself_only() -> None:
    trees = (Tree(2, (0, 0, 0, 1, 2)), Tree(1, (0, 0, 1)))
    # Nodes of the tokens by hand: prompt a a, branches b, c c; prompt d, branch e.
    nodes, sees = "aabccde", {"a": "a", "b": "ab", "c": "ac", "d": "d", "e": "de"}
    expected = [[q >= k and nodes[k] in sees[nodes[q]] for k in range(7)] for q in range(7)]
    attends = tree_mask(trees, torch.device("cpu"))
    index = torch.arange(7)
    assert attends(None, None, index[:, None], index[None, :]).tolist() == expected


def test_output_layers_bias_counts(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False, attn_implementation="eager"))
    model.lm_head = torch.nn.Linear(64, 64, bias=True)
    bundles = _bundles(5)
    logprobs, _ = TokenModel(model, "packed")(lay_out(apart(bundles), torch.device("cpu")), TEMPERATURE)
    _assert_close(logprobs.detach(), _plain(model, bundles).detach())


def test_completion_logprobs_do_not_depend_on_how_many_fit_a_row(tmp_path: Path) -> None:
    token_model = load_token_model(ModelConfig(path=_save(tmp_path, "llama"), dtype="float32"))
    bundles = _bundles(6)
    results = [completion_logprobs(token_model, bundles, TEMPERATURE, torch.device("cpu"), n) for n in (1, 24, 4096)]
    for row in results:
        assert [len(part) for part in row] == [9, 1, 4, 3, 1, 1, 6, 12]
        assert np.abs(np.concatenate(row) - np.concatenate(results[0])).max() < 1e-5


@pytest.mark.parametrize(
    ("targets", "rule"),
    [
        (("nothing",), "Target modules .* not found in the base model"),
        (("q_proj", "nothing"), "no module is called nothing. Name linear modules of the layers, such as q_proj."),
        (("q_proj", "lm_head"), "lm_head cannot have an adapter that is merged for the engines."),
        (("q_proj", "embed_tokens"), "model.embed_tokens cannot have an adapter that is merged for the engines."),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(tmp_path: Path, targets: tuple[str, ...], rule: str) -> None:
    config = ModelConfig(path=_save(tmp_path, "llama"), dtype="float32")
    with pytest.raises(ConfigError, match=rf"learner.lora.targets is \['.*'\]; {rule}"):
        load_token_model(config, LoraConfig(targets=targets))


def test_adapters_are_merged_under_the_names_of_the_model_without_them(tmp_path: Path) -> None:
    config = ModelConfig(path=_save(tmp_path, "llama"), dtype="float32")
    plain = dict(load_token_model(config).model.named_parameters())
    adapted = load_token_model(config, LoraConfig(rank=2, alpha=6)).model
    with torch.no_grad():
        for name, parameter in adapters_of(adapted).items():
            if "lora_B" in name:
                parameter.normal_()
    merged = {name: weight.value() for name, weight in weights_of(adapted).items()}
    assert list(merged) == list(plain)
    for name, weight in merged.items():
        change = weight - plain[name]
        # Every linear module of the layers has changed by a matrix of rank 2, nothing else has.
        assert torch.linalg.matrix_rank(change, rtol=1e-4).item() == 2 if "_proj" in name else not change.any()
    q = adapted.get_submodule("model.layers.0.self_attn.q_proj")
    expected = 3 * q.lora_B["default"].weight @ q.lora_A["default"].weight  # alpha / rank = 3
    change = merged["model.layers.0.self_attn.q_proj.weight"] - plain["model.layers.0.self_attn.q_proj.weight"]
    assert (change - expected).abs().max() < 1e-5
