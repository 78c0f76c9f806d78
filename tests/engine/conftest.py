"""A tiny model and a Ray of the tests' own, shared by the tests that start an engine."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from maspo_ray.cluster import connected
from maspo_ray.config import PlacementConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with tied embeddings, head 32, vocabulary 64."""
    from prepare import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    model = build_model(seed=0)
    with torch.no_grad():
        # At its initial scale the model is all but uniform, and log-probs would agree for any weights.
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray that ends with its module: a process has one at a time, and other modules start theirs."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["PYTHONPATH"] = str(ROOT)
    with connected(PlacementConfig(object_store_gib=0.2)):
        yield
    assert not ray.is_initialized()
