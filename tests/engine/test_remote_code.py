"""Models and tokenizers that are code of their own: read, trained and saved where `model.trust_remote_code` allows it, else one line."""

import json
import shutil
from pathlib import Path

import pytest
import ray
from learners import random_batch, start_learners
from transformers import AutoModelForCausalLM, AutoTokenizer

from maspo_ray.config import ModelConfig
from maspo_ray.data.tokenizers import load_model_config, load_tokenizer, save_tokenizer
from maspo_ray.errors import ConfigError
from maspo_ray.packing import pack

pytestmark = pytest.mark.engine

TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny_model: str, tmp_path: Path) -> str:
    """Folder of the tiny model, its tokenizer and its architecture as code beside the weights."""
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    (folder / "own_tokenizer.py").write_text(TOKENIZER)
    (folder / "own_model.py").write_text(MODEL)
    changes = {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
            "tokenizer_class": "OwnTokenizer",
        },
        "config.json": {
            "auto_map": {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"},
            "model_type": "own_llama",
            "architectures": ["OwnModel"],
        },
    }
    for name, changed in changes.items():
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | changed))
    return str(folder)


def test_code_that_is_not_allowed_is_one_line(own_code: str) -> None:
    model = ModelConfig(path=own_code)
    for load, part in ((load_tokenizer, "tokenizer"), (load_model_config, "config")):
        with pytest.raises(ConfigError) as caught:
            load(model)
        assert str(caught.value) == (
            f"model.trust_remote_code is False; the {part} of {own_code} needs code that comes with it. Read that code, and set it to "
            "true."
        )


def test_tokenizer_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"^model\.path is .*; its tokenizer cannot be read \([^\n]+\)\. Mend its files\.$"
    ):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["OwnTokenizer", "OwnTok"])
def test_tokenizer_that_is_saved_is_read_again(own_code: str, tmp_path: Path, name: str) -> None:
    for file in ("own_tokenizer.py", "tokenizer_config.json"):
        path = Path(own_code) / file
        path.write_text(path.read_text().replace("OwnTokenizer", name))
    save_tokenizer(ModelConfig(path=own_code, trust_remote_code=True), tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert (
        type(again).__name__ == name
        and again("1+2")["input_ids"]
        == load_tokenizer(ModelConfig(path=own_code, trust_remote_code=True))("1+2")["input_ids"]
    )


@pytest.mark.ray
def test_learner_saves_what_is_code_of_its_own(own_code: str, own_ray: None, tmp_path: Path) -> None:
    [learner] = start_learners(own_code, 1, None, 4096, trust_remote_code=True)
    experiences, _ = random_batch(seed=2)
    [(plan, payloads)] = pack(experiences, 1, 4096, True, 1)
    ray.get(learner.train_step.remote(0, plan, *payloads))
    saved = tmp_path / "saved"
    ray.get(learner.save.remote(str(saved)))
    ray.kill(learner)
    assert type(AutoTokenizer.from_pretrained(saved, trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert type(AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)).__name__ == "OwnModel"
