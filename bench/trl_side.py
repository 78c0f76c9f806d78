"""What a user without a GPU would train with instead: TRL's `GRPOTrainer`, on the same experiences as our learner.

TRL is not among this project's dependencies: `.venv/bin/pip install "trl==1.16.*"`. `bench.learner` then compares; generation is
in neither side.
"""

import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.synthetic import SyntheticBatch

GROUP_SIZE = 8


def is_there() -> bool:
    """Returns whether TRL is installed."""
    return importlib.util.find_spec("trl") is not None


class TrlSide:
    """A `GRPOTrainer` that computes the loss of given experiences and its gradient, as its own training step does.

    Args:
        batch: groups of `GROUP_SIZE`.
    """

    def __init__(self, model_path: str, dtype: Any, batch: SyntheticBatch) -> None:
        # Set for DeepSpeed in this process; accelerate takes it for a launcher's.
        os.environ.pop("LOCAL_RANK", None)
        from datasets import IterableDataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa"),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                num_generations=GROUP_SIZE,
                per_device_train_batch_size=GROUP_SIZE,
                max_completion_length=512,
                report_to="none",
                max_steps=1,
            ),
            train_dataset=IterableDataset.from_generator(lambda: iter([{"prompt": "unused"}])),
            processing_class=tokenizer,
        )
        self._trainer.model.train()
        self._inputs = self._padded(list(batch.rollouts()))

    def _padded(self, rollouts: list[Any]) -> dict[str, Any]:
        """Returns what `GRPOTrainer` makes of a generation batch: completions padded to its longest."""
        import torch

        width = max(len(completion.token_ids) for _, completion, _ in rollouts)

        def rows(arrays: list[Any]) -> Any:
            return torch.from_numpy(np.stack([np.pad(a, (0, width - len(a))) for a in arrays]))

        prompts = torch.from_numpy(np.stack([prompt for prompt, _, _ in rollouts]).astype(np.int64))
        mask = rows([np.ones(len(completion.token_ids), np.int64) for _, completion, _ in rollouts])
        return {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": rows([completion.token_ids.astype(np.int64) for _, completion, _ in rollouts]),
            "completion_mask": mask,
            "old_per_token_logps": rows([completion.logprobs for _, completion, _ in rollouts]),
            "advantages": torch.tensor([advantage for _, _, advantage in rollouts]),
            "num_items_in_batch": mask.sum(),
        }

    def step(self, rows: int) -> Callable[[], object]:
        """Returns loss and backward pass of all rollouts, so many in one micro-batch."""
        trainer, count = self._trainer, len(self._inputs["advantages"])

        def run() -> None:
            trainer.model.zero_grad()
            # A generation batch makes one optimizer step.
            trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = count // rows
            for start in range(0, count, rows):
                part = slice(start, start + rows)
                inputs = {name: value[part] if value.ndim else value for name, value in self._inputs.items()}
                trainer.accelerator.backward(trainer.compute_loss(trainer.model, inputs))

        return run

    def gradient(self) -> Any:
        """Returns the gradient of the last step's embedding, [vocabulary, d]."""
        return self._trainer.model.get_input_embeddings().weight.grad
