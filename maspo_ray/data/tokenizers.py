"""The model's tokenizer and its config, as transformers reads them.

Promise: whoever needs them, for prompts or to save them beside a model, reads them here, so that `model.trust_remote_code` holds for all; what
cannot be read is one line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maspo_ray.config import ModelConfig
from maspo_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a model's folder or hub id.

    Raises:
        ConfigError: it cannot be read, or is code that `model.trust_remote_code` does not allow.
    """
    # Imported here: transformers takes seconds, during which the actors start.
    from transformers import AutoTokenizer

    with _in_one_line(model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return cast("PreTrainedTokenizerBase", tokenizer)


def save_tokenizer(model: ModelConfig, folder: Path) -> None:
    """Writes the tokenizer of a model into a folder, with the code that it is, if it is code of its own.

    Raises:
        ConfigError: as `load_tokenizer` does.
    """
    load_tokenizer(model).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own_class = tree.get("auto_map", {}).get("AutoTokenizer")
    if isinstance(own_class, str):
        # transformers 5.19 reads a slow and a fast class there, but writes the two only of a class whose name has "Tokenizer" in it.
        tree["auto_map"]["AutoTokenizer"] = [None, own_class]
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def load_model_config(model: ModelConfig) -> "PreTrainedConfig":
    """Returns transformers' config of a model's folder or hub id.

    Raises:
        ConfigError: it cannot be read, or is code that `model.trust_remote_code` does not allow.
    """
    from transformers import AutoConfig

    with _in_one_line(model, "config"):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return cast("PreTrainedConfig", config)


@contextmanager
def _in_one_line(model: ModelConfig, part: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Of the library, of the hub's client, of code that comes with the model.
        if not model.trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.trust_remote_code is False; the {part} of {model.path} needs code that comes with it. Read that code, and set it "
                "to true."
            ) from None
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model.path is {model.path}; its {part} cannot be read ({cause}). Mend its files."
        ) from error
