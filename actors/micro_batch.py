"""Bundles of a plan and the payloads that they speak of → the tensors of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.token_batch import TokenBatch, lay_out
from maspo_ray.experience import Completion
from maspo_ray.packing import Bundle


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        tokens: the row; the other fields have a value for each of its targets.
        mask: [targets] bool, which of them count; none where the rank only takes part in the collective.
        behaviour_logprobs: [targets] float32, log μ.
        advantages: [targets] float32.
        lags: [targets] int64, weight versions between the oldest that a token is of and `version`. A completion that ran through an
            update goes on over the cache of what it began with, so that all its tokens are of that.
        reference_logprobs: [targets] float32; None without KL.
    """

    tokens: TokenBatch
    mask: torch.Tensor
    behaviour_logprobs: torch.Tensor
    advantages: torch.Tensor
    lags: torch.Tensor
    reference_logprobs: torch.Tensor | None


def gather_micro_batch(
    bundles: Sequence[Bundle], payloads: Sequence[Any], version: int, device: torch.device
) -> MicroBatch:
    """Returns the micro-batch of bundles; of none, one of a single token that does not count.

    Args:
        version: of the weights that meet the batch.
    """
    if not bundles:
        one = np.zeros(1, np.int32)
        zero = torch.zeros(1, device=device)
        return MicroBatch(lay_out([(one, [one])], device), zero > 0, zero, zero, zero.long(), zero)

    def tensor(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    items = [item for bundle in bundles for item in bundle.items]
    completions: list[Completion] = [payloads[payload][i] for payload, i in (item.completion for item in items)]
    ids = iter([completion.token_ids for completion in completions])
    tokens = lay_out(
        [(payloads[bundle.prompt].token_ids, list(islice(ids, len(bundle.items)))) for bundle in bundles], device
    )
    counts = [item.num_tokens for item in items]
    newest = max(completion.spans[-1].version for completion in completions)
    assert newest <= version, f"a token was sampled by weights newer than version {version}"
    lags = np.array([version - completion.spans[0].version for completion in completions])
    references = [payloads[item.reference[0]][item.reference[1]] for item in items if item.reference is not None]
    return MicroBatch(
        tokens=tokens,
        mask=torch.ones(sum(counts), dtype=torch.bool, device=device),
        behaviour_logprobs=tensor([completion.logprobs for completion in completions]),
        advantages=tensor([np.repeat(np.array([item.advantage for item in items], np.float32), counts)]),
        lags=tensor([np.repeat(lags, counts)]),
        reference_logprobs=tensor(references) if references else None,
    )
