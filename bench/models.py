"""Families of models, tiny and random: what the learner computes against transformers, and what engines compute of what it publishes.

    python -m bench.models
    python -m bench.models --families llama gemma2 --without_engine
    python -m bench.models --model path/to/a/model --without_engine

Of each family, in float32: log-probs and gradient of a row of sequences by the learner's own model against transformers' plain forward
pass of each sequence by itself, with eager attention; log-probs with LoRA adapters against those of the saved, merged model; and, of the
families of ENGINE, parity with a vLLM engine: at the weights that both load, after a step of all weights and after one of adapters, both
published as in a run. A family whose `model.attn_implementation` must not be sdpa is tried with eager, as its refusal says.

models_tried     families
models_exact     log-probs within 1e-5 of the largest of them, with adapters too, and each parameter's gradient within 1e-4 of its norm
models_refused   by one line at set-up; the table has it
models_wrong     neither
models_served    engines at most 1e-3 from the learner at each of the three
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.tiny_models import FAMILIES, KINDS, build, sequences

ENGINE = (
    "llama",
    "qwen2",
    "qwen3",
    "phi3",
    "olmo2",
    "stablelm",
    "gpt2",
    "gemma",
    "mistral",
    "gemma3_text",
    "gemma2",
    "cohere",
    "granite",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
_EXACT_LOGPROB, _EXACT_GRADIENT, _PARITY = 1e-5, 1e-4, 1e-3
_TEMPERATURE = 0.7


@dataclass(slots=True)
class Row:
    """What was found of a family.

    Attributes:
        way: how sequences are kept apart.
        output: whether the architecture does more to its logits than its output layer.
        logprob: the largest |Δ log-prob| / the largest |log-prob|.
        gradient: the largest ‖Δ‖ / ‖gradient‖ of a parameter.
        adapters: as `logprob`, of the model with LoRA adapters from the saved, merged one.
        check_s: of the set-up's check.
        parity: the largest |Δ log-prob| to the engine, over the versions of the run; None where there was none.
        engine_fault: what an engine that failed said last.
        refused: the line that ended the set-up.
    """

    family: str
    kind: str
    implementation: str = ""
    way: str = ""
    output: str = ""
    logprob: float | None = None
    gradient: float | None = None
    adapters: float | None = None
    check_s: float | None = None
    parity: float | None = None
    engine_fault: str = ""
    refused: str = ""

    @property
    def exact(self) -> bool:
        return (
            self.logprob is not None
            and self.logprob <= _EXACT_LOGPROB
            and self.gradient is not None
            and self.gradient <= _EXACT_GRADIENT
            and self.adapters is not None
            and self.adapters <= _EXACT_LOGPROB
        )


def learner_side(row: Row, path: str) -> None:
    """Fills in what the learner computes.

    Raises:
        ConfigError: the model was refused.
    """
    from maspo_ray.errors import ConfigError

    try:
        _compare(row, path, "sdpa")
    except ConfigError as error:
        if "eager" not in str(error):
            raise
        _compare(row, path, "eager")


def _compare(row: Row, path: str, implementation: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from actors.model_check import check_model, largest_distance, plain_logprobs
    from actors.token_batch import apart, lay_out
    from actors.token_model import load_token_model
    from maspo_ray.config import LearnerConfig, LoraConfig, ModelConfig

    cpu, config = torch.device("cpu"), ModelConfig(path=path, dtype="float32", attn_implementation=implementation)
    row.implementation = implementation
    model = load_token_model(config).train()
    started = perf_counter()
    check_model(model, config, LearnerConfig(), cpu)
    row.check_s = perf_counter() - started
    row.way, row.output = model.attention, "own" if model.changes_logits else ""

    def plain(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)

    def gradients(owner: Any, logprobs: Any) -> dict[str, Any]:
        (logprobs * torch.linspace(-1, 2, len(logprobs))).sum().backward()
        return {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}

    # The last rows of a vocabulary may be padding.
    bundles = sequences(model.model.config.get_text_config().vocab_size * 3 // 4)
    batch = lay_out(bundles if model.shares_prompts else apart(bundles), cpu)
    expected_model = plain(path)
    expected = plain_logprobs(expected_model, bundles, _TEMPERATURE, cpu)
    found, _ = model(batch, _TEMPERATURE)
    row.logprob = relative(found, expected)
    row.gradient, _ = largest_distance(gradients(model.model, found), gradients(expected_model, expected))

    adapted = load_token_model(config, LoraConfig(rank=4, alpha=8)).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    found, _ = adapted(batch, _TEMPERATURE)
    with tempfile.TemporaryDirectory() as folder:
        save_merged(adapted.model, folder)
        with torch.no_grad():
            merged = plain_logprobs(plain(folder), bundles, _TEMPERATURE, cpu)
    row.adapters = relative(found, merged)
    assert relative(merged, expected) > 1e-3, f"the adapters of {row.family} change nothing"


def relative(found: Any, expected: Any) -> float:
    """Returns the largest |found − expected| / the largest |expected|."""
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def save_merged(model: Any, folder: str) -> None:
    """Writes the model with its adapters merged, as the learner saves it."""
    from actors.lora import weights_of

    model.save_pretrained(folder, state_dict={name: weight.value() for name, weight in weights_of(model).items()})


def engine_side(row: Row, path: str, handle: Any) -> None:
    """Fills in the parity with an engine; an engine that fails is told of in the row, and not to be asked again."""
    from ray.exceptions import RayError

    from bench.served_models import parity
    from maspo_ray.config import ModelConfig
    from maspo_ray.errors import ActorError

    config = ModelConfig.model_validate({"path": path, "dtype": "float32", "attn_implementation": row.implementation})
    try:
        row.parity = parity(handle, config)
    except (RayError, ActorError) as error:
        row.engine_fault = (str(error).strip().splitlines() or [type(error).__name__])[-1]


def try_family(family: str, kind: str, path: str | None, handle: Any) -> Row:
    """Returns what was found of a family, or of the model in a folder.

    Args:
        handle: of the actor that holds the engines; None to leave them out.
    """
    from maspo_ray.errors import ConfigError

    row = Row(family, kind)
    with tempfile.TemporaryDirectory() as scratch:
        model = path or build(family, Path(scratch, "model"))
        try:
            learner_side(row, model)
        except ConfigError as error:
            row.refused = str(error).replace(f"model.path is {model}; ", "")
            return row
        if handle is not None:
            if path is None:
                sys.path.insert(0, "examples/quickstart")
                from prepare import build_tokenizer

                build_tokenizer().save_pretrained(model)
            engine_side(row, model, handle)
    return row


def try_all(families: Sequence[str], path: str | None, served: Sequence[str]) -> Iterator[Row]:
    """Yields what was found of each family, those with an engine last."""
    kinds = {family: kind for kind, known in KINDS.items() for family in known}

    def tried(family: str, handle: Any) -> Row:
        started = perf_counter()
        row = try_family(family, kinds.get(family, ""), path, handle)
        print(f"{table([row]).splitlines()[-1]} {perf_counter() - started:.1f} s", flush=True)
        return row

    yield from (tried(family, None) for family in families if family not in served)
    if not served:
        return
    from bench.served_models import engines

    with engines() as start:
        handle = start()
        for family in served:
            row = tried(family, handle)
            yield row
            if row.engine_fault:
                handle = start()


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as Markdown."""
    lines = [
        "| family | particular | attention | sequences | its own logits | Δ log-prob | Δ gradient | with LoRA | parity |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        numbers = ["" if x is None else f"{x:.0e}" for x in (row.logprob, row.gradient, row.adapters, row.parity)]
        cells = [row.family, row.kind, row.implementation, row.way, row.output, *numbers]
        cells[-1] = row.refused or row.engine_fault or cells[-1]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> dict[str, int]:
    refused = [row for row in rows if row.logprob is None]
    exact = [row for row in rows if row.exact]
    return {
        "models_tried": len(rows),
        "models_exact": len(exact),
        "models_refused": len(refused),
        "models_wrong": len(rows) - len(exact) - len(refused),
        "models_served": sum(row.parity is not None and row.parity <= _PARITY for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), help="these alone")
    parser.add_argument("--model", help="a model's folder, in place of the families")
    parser.add_argument("--without_engine", action="store_true")
    parser.add_argument(
        "--record", type=Path, help="a file that earlier parts' rows are read from, and this one's added to"
    )
    options = parser.parse_args()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, Row] = {}
    if options.record is not None and options.record.is_file():
        found = {row["family"]: Row(**row) for row in map(json.loads, options.record.read_text().splitlines())}
    chosen = [Path(options.model).name] if options.model else list(options.families or FAMILIES)
    served = [] if options.without_engine else chosen if options.model else [f for f in chosen if f in ENGINE]
    for row in try_all(chosen, options.model, served):
        found[row.family] = row
        if options.record is not None:
            with options.record.open("a") as record:
                record.write(json.dumps(asdict(row)) + "\n")
    rows = [found[family] for family in [*FAMILIES, *(set(found) - set(FAMILIES))] if family in found]
    checks = sorted(row.check_s for row in rows if row.check_s is not None)
    print(table(rows))
    print(
        f"the set-up's check: {checks[len(checks) // 2]:.2f} s at the median, {checks[-1]:.2f} s at most"
        if checks
        else ""
    )
    print(json.dumps({"bench": "models", **figures(rows)}))


if __name__ == "__main__":
    main()
