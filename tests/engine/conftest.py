"""A tiny model and a Ray of the tests' own, shared by the tests that start an engine."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from maspo_ray.config import PlacementConfig
from maspo_ray.fleet.ray_session import connected

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama with tied embeddings, head 32, vocabulary 64."""
    from prepare import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("model")
    build_model(seed=0).save_pretrained(folder)
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
