"""Reference actor: the frozen policy that the KL is measured to, by transformers.

Promise: log-probs at the sampling temperature, under the weights that the run started from.
"""

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maspo_ray.config import ModelConfig
from maspo_ray.experience import SampledGroup

_ROW_TOKENS = 8192
"""Of one forward pass, unless one sequence has more."""


class HFReference:
    """One frozen model. See `maspo_ray.protocols.ReferenceActor`."""

    def __init__(self, *, model: ModelConfig, temperature: float, threads: int) -> None:
        self._config = model
        self._temperature = temperature
        self._threads = threads

    def setup(self) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch

        from actors.model_check import check_model
        from actors.token_model import load_token_model

        torch.set_num_threads(self._threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_token_model(self._config, device=self._device).requires_grad_(False)
        check_model(model, self._config, None, self._device)
        self._model = model.to(self._device)

    def completion_logprobs(self, group: SampledGroup) -> tuple[Sequence[NDArray[np.float32]], int]:
        from actors.token_model import completion_logprobs

        prompt, completions = group.prompt.token_ids, [completion.token_ids for completion in group.completions]
        # So many behind one copy of the prompt that each row is about full.
        room = max(1, (_ROW_TOKENS - len(prompt)) // max(map(len, completions)))
        size = room if self._model.shares_prompts else 1
        bundles = [(prompt, completions[i : i + size]) for i in range(0, len(completions), size)]
        found = completion_logprobs(self._model, bundles, self._temperature, self._device, _ROW_TOKENS)
        return found, sum(map(len, completions))
