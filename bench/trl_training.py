"""What a user without a GPU would run instead of `maspo train`: TRL's `GRPOTrainer` with transformers' generation, timed step by step.

Promise: it trains as `bench.end_to_end` has our side train, with the same prompts, lengths, reward, clip and optimizer settings. A step is
a generation batch: every group is sampled, then trained on in micro-batches. `bench.end_to_end` starts it in a process of its own.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.end_to_end import text_parity
from bench.trl_side import GROUP_SIZE


def read_prompts(path: str) -> Iterator[dict[str, str]]:
    """Yields the rows of a JSONL file without end."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    while True:
        yield from rows


def parity_rewards(completions: Sequence[str], **_: Any) -> list[float]:
    return [text_parity(completion) for completion in completions]


def train(model: str, prompts: str, rows: int, groups: int, max_new_tokens: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of each step and the mean length of its completions in tokens.

    Args:
        prompts: JSONL file.
        rows: completions of a micro-batch.
    """
    import torch
    from datasets import IterableDataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class StepTimes(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(perf_counter())

    times = StepTimes()
    batch = groups * GROUP_SIZE
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=parity_rewards,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=True,
            bf16=False,
            # Recomputing activations would cost TRL a forward pass for memory that it does not need here.
            gradient_checkpointing=False,
            num_generations=GROUP_SIZE,
            generation_batch_size=batch,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=batch // rows,
            max_completion_length=max_new_tokens,
            learning_rate=1e-7,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            loss_type="grpo",
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            max_steps=steps,
        ),
        train_dataset=IterableDataset.from_generator(read_prompts, gen_kwargs={"path": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[times],
    )
    trainer.train()
    ends = times.ends
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    return {"seconds": [b - a for a, b in zip(ends, ends[1:], strict=False)], "lengths": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--max_new_tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    print(json.dumps(train(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
