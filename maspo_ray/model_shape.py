"""What a model's folder says of its size, read without transformers: config.json and the headers of its safetensors.

Promise: takes milliseconds and reads no weight. Keys of config.json that a family calls by its own name are looked up by the names that
transformers maps them from; what is not said there is None, and what depends on it is not judged.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maspo_ray.errors import ConfigError

_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk"),
    "expert_size": ("moe_intermediate_size",),
}
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len")
_UNSCALED_ROPES = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling", "mrope")
"""Kinds of rope whose `max_position_embeddings` is the longest sequence as it stands; others multiply it (vLLM 0.32,
`_get_and_verify_max_len`)."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model, in elements; of a mixture of experts `intermediate_size` is that of the experts a token meets.

    Attributes:
        num_parameters: all, a tied output layer once.
        counted: whether they were counted in the weights' files; else they follow from the other sizes.
        cached_layers: layers whose keys and values are cached for each token; the rest have windows or states.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_parameters: int
    counted: bool
    cached_layers: int

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Returns what the keys and values of one token take in the layers that keep them all."""
        return 2 * self.cached_layers * self.num_kv_heads * self.head_dim * element_bytes


def model_folder(path: str) -> Path | None:
    """Returns the folder of a model's files on this machine, of a hub's model its newest in the cache; None if there is none."""
    if Path(path).is_dir():
        return Path(path)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cached = (
        Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser() / f"models--{path.replace('/', '--')}"
    )
    try:
        folder = cached / "snapshots" / (cached / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() else None


def read_config_json(folder: Path, where: str) -> dict[str, Any]:
    """Returns a model's config.json, with the keys of its text part, where it has one, over the rest.

    Args:
        where: begins the line of an error.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}; its config.json is not a JSON object. Mend or replace the file.")
    nested = tree.get("text_config")
    return tree | nested if isinstance(nested, dict) else tree


def longest_sequence(tree: dict[str, Any]) -> int | None:
    """Returns the longest sequence of the model of a config.json, in tokens, as vLLM derives it; None where it does not say."""
    if isinstance(own := tree.get("model_max_length"), int):
        return own
    lengths = [value for name in _LENGTHS if isinstance(value := tree.get(name), int) and value > 0]
    rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if not lengths or not isinstance(rope, dict):
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Per kind of layer, or scaled by a factor of its own: left to vLLM.
    return min(lengths) if kind in _UNSCALED_ROPES and not any(isinstance(v, dict) for v in rope.values()) else None


def model_shape(folder: Path, tree: dict[str, Any]) -> ModelShape | None:
    """Returns the sizes of a model; None where its config.json does not say them as a transformer's does.

    Args:
        tree: its `read_config_json`.
    """
    found = {name: _first_int(tree, names) for name, names in _NAMES.items()}
    vocab, hidden, layers, heads = (found[n] for n in ("vocab_size", "hidden_size", "num_layers", "num_heads"))
    if vocab is None or hidden is None or layers is None or heads is None:
        return None
    inner = found["intermediate_size"] or 4 * hidden
    experts, per_token = found["num_experts"], found["experts_per_token"] or 1
    expert = found["expert_size"] or inner
    head_dim, kv_heads = found["head_dim"] or hidden // heads, found["num_kv_heads"] or heads
    kinds = tree.get("layer_types")
    counted = _count_parameters(folder)
    # Query, key, value and output; gate, up and down; embedding and output layer. Norms and biases are next to nothing.
    layer = 2 * hidden * head_dim * (heads + kv_heads) + 3 * hidden * (expert * experts if experts else inner)
    derived = layers * layer + vocab * hidden * (1 if tree.get("tie_word_embeddings") else 2)
    return ModelShape(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=expert * per_token if experts else inner,
        num_parameters=counted or derived,
        counted=counted is not None,
        cached_layers=kinds.count("full_attention") if isinstance(kinds, list) else layers,
    )


def _first_int(tree: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := tree.get(name), int) and value > 0), None)


def _count_parameters(folder: Path) -> int | None:
    """Returns how many elements the weights of a folder have; None where it has no safetensors that can be read."""
    files = sorted(folder.glob("model*.safetensors"))
    sizes: dict[str, int] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError, MemoryError, OverflowError):
            return None
        for name, tensor in header.items():
            if name != "__metadata__":
                sizes[name] = _product(tensor["shape"])
    return sum(sizes.values()) or None


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
