"""What a learner step reports: sums over micro-batches, then over ranks, then means over the batch's tokens.

Promise: the figures do not depend on how the batch was cut; one small all-reduce a step.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from maspo_ray.objectives.base import PolicyLoss
from maspo_ray.objectives.metrics import objective_sums

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
    "policy_loss": "objective/policy_loss",
    "kl": "objective/kl",
    "loss": "loss",
}


class StepSums:
    """Accumulates one step's sums on one rank."""

    def __init__(self, device: torch.device) -> None:
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in _SHARES}
        self._ratio_max = torch.zeros((), dtype=torch.float64, device=device)

    def add_objective(
        self, policy: PolicyLoss, advantages: Tensor, mask: Tensor, loss: Tensor, entropy: Tensor
    ) -> None:
        """Adds a micro-batch. `loss` is its summed policy loss; the other arguments are [tokens]."""
        sums = objective_sums(policy, advantages, mask)
        self._ratio_max = torch.maximum(self._ratio_max, sums["ratio_max"])
        sums |= {"policy_loss": loss.detach(), "loss": loss.detach(), "entropy": entropy.detach().sum()}
        for name in sums.keys() & self._sums.keys():
            self._sums[name] += sums[name]

    def add_kl(self, divergence: Tensor, coef: float) -> None:
        """Adds a micro-batch's summed KL to the reference."""
        self._sums["kl"] += divergence.detach()
        self._sums["loss"] += coef * divergence.detach()

    def reduce(self, batch_tokens: int) -> dict[str, float]:
        """Returns the metrics of the whole batch, the same on every rank. A collective."""
        sums = torch.stack(list(self._sums.values()))
        dist.all_reduce(sums)
        dist.all_reduce(self._ratio_max, op=dist.ReduceOp.MAX)
        shares = (sums / batch_tokens).tolist()
        metrics = dict(zip(_SHARES.values(), shares, strict=True))
        return metrics | {"objective/ratio_max": self._ratio_max.item(), "tokens/trained": float(batch_tokens)}
