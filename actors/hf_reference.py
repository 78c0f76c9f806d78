"""Reference actor: the frozen policy that the KL is measured to, by transformers.

Promise: log-probs at the sampling temperature, under the weights that the run started from.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import ModelConfig
from maspo_ray.experience import Completion, Prompt


class HFReference:
    """One frozen model. See `maspo_ray.protocols.ReferenceActor`."""

    def __init__(self, *, model: ModelConfig, temperature: float, threads: int) -> None:
        self._config = model
        self._temperature = temperature
        self._threads = threads

    def setup(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch

        from actors.token_model import load_token_model

        torch.set_num_threads(self._threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_token_model(self._config).eval().requires_grad_(False).to(self._device)

    def completion_logprobs(self, prompt: Prompt, *batches: Sequence[Completion]) -> Sequence[NDArray[np.float32]]:
        from actors.token_model import completion_logprobs

        completions = [completion.token_ids for batch in batches for completion in batch]
        shared = self._model.shares_prompts
        bundles = [(prompt.token_ids, part) for part in ([completions] if shared else [[c] for c in completions])]
        return completion_logprobs(self._model, bundles, self._temperature, self._device)
