"""How far the engines' log-probs are from the learner's, from tokens that the learner scores anyhow.

Promise: only tokens count whose completion began with the very weights that meet them, so that what is left is numerics, or an engine
that does not hold the learner's weights. Values that are not finite are left out: an update watch judges those.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from actors.micro_batch import MicroBatch
from maspo_ray.experience import Parity


class ParitySums:
    """Gathers |Δ log-prob| of one rank, by the replica that sampled the token."""

    def __init__(self) -> None:
        # Replica → largest, sum and count.
        self._sums: dict[int, Tensor] = {}

    @torch.no_grad()
    def add(self, logprobs: Tensor, batch: MicroBatch) -> None:
        """Adds a micro-batch, of which `logprobs`, [targets], are the learner's."""
        deltas = (logprobs - batch.behaviour_logprobs).abs().double()
        counts = batch.mask & (batch.lags == 0) & deltas.isfinite()
        deltas, replicas = deltas[counts], batch.replicas[counts]
        for replica in replicas.unique().tolist():
            own = deltas[replicas == replica]
            found = torch.stack([own.max(), own.sum(), torch.full_like(own[0], len(own))])
            before = self._sums.get(replica)
            if before is not None:
                found = torch.cat([torch.maximum(found[:1], before[:1]), found[1:] + before[1:]])
            self._sums[replica] = found

    def reduce(self) -> dict[int, Parity]:
        """Returns the differences by replica, over all ranks, the same on each. A collective."""
        own = {replica: tuple(sums.tolist()) for replica, sums in self._sums.items()}
        gathered: list[dict[int, tuple[float, float, float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        found: dict[int, Parity] = {}
        for replica in sorted({replica for rank in gathered for replica in rank}):
            largest, totals, counts = zip(*(rank[replica] for rank in gathered if replica in rank), strict=True)
            found[replica] = Parity(max(largest), sum(totals) / sum(counts), int(sum(counts)))
        return found
