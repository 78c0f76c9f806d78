"""What a learner's update reports: sums over micro-batches, then over ranks, then means over the batch's tokens.

Promise: the figures do not depend on how the batch was cut; a few small all-reduces an update.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from maspo_ray.objectives.base import PolicyLoss
from maspo_ray.objectives.breakdown import Breakdown, ScoredTokens
from maspo_ray.objectives.metrics import objective_sums
from maspo_ray.objectives.tensor_ops import masked_sum
from maspo_ray.packing import RankPlan

_SHARES = {
    "gate_sum": "objective/gate_mean",
    "gate_below_0.9": "objective/gate_below_0.9",
    "gate_below_0.5": "objective/gate_below_0.5",
    "gate_below_0.1": "objective/gate_below_0.1",
    "ratio_sum": "objective/ratio_mean",
    "abs_log_ratio_sum": "objective/abs_log_ratio",
    "clip_0.2": "objective/clip_0.2_share",
    "cap_3": "objective/cap_3_share",
    "entropy": "objective/entropy",
    "importance_weight": "objective/importance_weight_mean",
    "policy_loss": "objective/policy_loss",
    "kl": "objective/kl",
    "load_balance": "objective/load_balance",
    "loss": "loss",
}
"""A sum over tokens → the column of metrics.jsonl that its mean over the batch's tokens is."""


class UpdateSums:
    """Accumulates one update's sums on one rank; its `breakdown` is not reduced here, but over a step."""

    def __init__(self, device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}
        self._ratio_max = self._zero
        self.breakdown = Breakdown(device)

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Adds a micro-batch's values, [tokens], where the mask holds."""
        self._sums[name] = self._sums.get(name, self._zero) + masked_sum(values.detach(), mask)

    def add_objective(self, policy: PolicyLoss, tokens: ScoredTokens) -> None:
        """Adds what the objective did to a micro-batch."""
        self.breakdown.add(policy, tokens)
        self.add("entropy", tokens.entropy, tokens.mask)
        sums = objective_sums(policy, tokens.advantages, tokens.mask)
        self._ratio_max = torch.maximum(self._ratio_max, sums["ratio_max"])
        for name in filter(_SHARES.__contains__, sums):
            self._sums[name] = self._sums.get(name, self._zero) + sums[name]

    def reduce(self, batch_tokens: int) -> dict[str, float]:
        """Returns the update's means over its tokens, the same on every rank. A collective, for which all ranks must have added the same
        names."""
        sums = torch.stack(list(self._sums.values()))
        dist.all_reduce(sums)
        dist.all_reduce(self._ratio_max, op=dist.ReduceOp.MAX)
        shares = (sums / batch_tokens).tolist()
        metrics = {_SHARES[name]: share for name, share in zip(self._sums, shares, strict=True)}
        return metrics | {"objective/ratio_max": self._ratio_max.item()}


def reduce_breakdown(breakdown: Breakdown) -> dict[str, float]:
    """Returns the metrics of all ranks' breakdowns, added up. A collective."""
    for tensor in (breakdown.table, breakdown.histogram):
        dist.all_reduce(tensor)
    return breakdown.metrics()


def faulty_groups(plan: RankPlan, token_losses: Sequence[Tensor]) -> tuple[int, ...]:
    """Returns the ids of the groups, of all ranks, with a loss that is not finite. A collective.

    Args:
        token_losses: of each micro-batch of the plan, [tokens].
    """
    own = set()
    for bundles, losses in zip(plan.micro_batches, token_losses, strict=True):
        sizes = [sum(item.num_tokens for item in bundle.items) for bundle in bundles]
        parts = losses.split(sizes) if bundles else ()
        own |= {b.group_id for b, part in zip(bundles, parts, strict=True) if not part.isfinite().all()}
    gathered: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return tuple(sorted(set().union(*gathered)))
