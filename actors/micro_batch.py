"""Bundles of a plan and the payloads that they speak of → the tensors of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.token_batch import TokenBatch, lay_out
from maspo_ray.experience import SampledGroup
from maspo_ray.packing import Bundle


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        tokens: the row; the other fields have a value for each of its targets.
        mask: [targets] bool, which of them count; none where the rank only takes part in the collective.
        behaviour_logprobs: [targets] float32, log μ.
        advantages: [targets] float32.
        lags: [targets] int64, how many versions the weights that a token's completion began with are behind those that meet the batch.
            All tokens of a completion have its first one's lag: after an update it goes on over cached keys of the older weights.
        replicas: [targets] int64, of the rollout actor that sampled the token.
        reference_logprobs: [targets] float32; None without KL.
    """

    tokens: TokenBatch
    mask: torch.Tensor
    behaviour_logprobs: torch.Tensor
    advantages: torch.Tensor
    lags: torch.Tensor
    replicas: torch.Tensor
    reference_logprobs: torch.Tensor | None


def gather_micro_batch(
    bundles: Sequence[Bundle], payloads: Sequence[Any], version: int, device: torch.device
) -> MicroBatch:
    """Returns the micro-batch of bundles; of none, one of a single token that does not count.

    Args:
        payloads: the rank's, of which the bundles hold the positions.
        version: of the weights that meet the batch.
    """
    if not bundles:
        one = np.zeros(1, np.int32)
        zero = torch.zeros(1, device=device)
        return MicroBatch(lay_out([(one, [one])], device), zero > 0, zero, zero, zero.long(), zero.long(), zero)

    def tensor(arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    def by_token(values: Sequence[float], dtype: type[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype), counts)).to(device)

    groups: list[SampledGroup] = [payloads[bundle.payload] for bundle in bundles]
    own = [[group.completions[item.sample] for item in b.items] for group, b in zip(groups, bundles, strict=True)]
    rows = [
        (group.prompt.token_ids, [completion.token_ids for completion in completions])
        for group, completions in zip(groups, own, strict=True)
    ]
    completions = [completion for behind in own for completion in behind]
    items = [item for bundle in bundles for item in bundle.items]
    counts = [item.num_tokens for item in items]
    newest = max(completion.spans[-1].version for completion in completions)
    assert newest <= version, f"a token was sampled by weights newer than version {version}"
    references = [payloads[b.reference][item.sample] for b in bundles if b.reference is not None for item in b.items]
    return MicroBatch(
        tokens=lay_out(rows, device),
        mask=torch.ones(sum(counts), dtype=torch.bool, device=device),
        behaviour_logprobs=tensor([completion.logprobs for completion in completions]),
        advantages=by_token([item.advantage for item in items], np.float32),
        lags=by_token([version - completion.spans[0].version for completion in completions], np.int64),
        replicas=by_token([bundle.replica for bundle in bundles for _ in bundle.items], np.int64),
        reference_logprobs=tensor(references) if references else None,
    )
