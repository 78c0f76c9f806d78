"""What an objective did to which tokens: by the advantage's sign, by how likely the token was, and by how stale it is.

Promise: sums in fixed tables that add up over micro-batches and ranks, whatever the split; the names and the means are made of the
sums at the end. Detached; nothing waits for the device before that.
"""

import math

import torch
from torch import Tensor

from maspo_ray.objectives.base import PolicyLoss
from maspo_ray.objectives.metrics import REFERENCE_CLIP
from maspo_ray.objectives.peers import within_clip
from maspo_ray.objectives.tensor_ops import MAX_LOG_RATIO

_MAX_LAG = 15
_LABELS = (
    "negative",
    "positive",
    *(f"prob_0.{tenth}" for tenth in range(10)),
    *(f"lag_{lag}" for lag in range(_MAX_LAG + 1)),
)
_PROBABILITIES, _LAGS = 2, 12
"""Where the rows of a table that are by probability begin, and those that are by lag."""

_STATISTICS = (
    *("tokens", "gate", "gate_below_0.9", "gate_below_0.5", "gate_below_0.1"),
    *("clipped", "entropy", "ratio", "ratio_squared", "behaviour_kl"),
)
"""The columns of a table, each a sum over tokens."""

_BIN_WIDTH, _HALF_BINS = 0.01, 200
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


class Breakdown:
    """One rank's sums, of an update or of several.

    Attributes:
        table: [labels, statistics] float64.
        histogram: [lags, bins] float64, tokens by log ρ.
    """

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(len(_LABELS), len(_STATISTICS), dtype=torch.float64, device=device)
        self.histogram = torch.zeros(_MAX_LAG + 1, 2 * _HALF_BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        loss: PolicyLoss,
        logprobs: Tensor,
        old_logprobs: Tensor,
        behaviour_logprobs: Tensor,
        entropy: Tensor,
        advantages: Tensor,
        lags: Tensor,
        mask: Tensor,
    ) -> None:
        """Adds a micro-batch; every argument is [tokens].

        Args:
            logprobs: log π_θ.
            behaviour_logprobs: log μ, of what sampled the tokens; not log π_old where that is recomputed.
            entropy: of the current policy where it met the token.
            lags: int64, weight versions between the oldest that the token is of and what is updated.
            mask: bool, which tokens count.
        """
        gate, ratio = loss.gate, loss.ratio
        counts = mask.double()
        clipped = ~within_clip(ratio, advantages, REFERENCE_CLIP, REFERENCE_CLIP)
        rows = [counts, gate, gate < 0.9, gate < 0.5, gate < 0.1, clipped, entropy, ratio, ratio.square()]
        rows.append(_behaviour_kl(logprobs, behaviour_logprobs))
        statistics = torch.stack([torch.where(mask, row, 0).double() for row in rows], dim=1)
        probability = (old_logprobs.exp() * 10).long().clamp(0, 9) + _PROBABILITIES
        lag = lags.clamp(0, _MAX_LAG)
        # A token without an advantage has no gradient, whatever its gate: it is in neither row of the signs.
        signed = statistics * (advantages != 0).unsqueeze(1)
        for label, values in (((advantages > 0).long(), signed), (probability, statistics), (lag + _LAGS, statistics)):
            self.table.index_add_(0, label, values)
        bins = (ratio.log() / _BIN_WIDTH).floor().long().clamp(-_HALF_BINS, _HALF_BINS - 1) + _HALF_BINS
        self.histogram.view(-1).index_add_(0, lag * 2 * _HALF_BINS + bins, counts)

    def merge(self, other: "Breakdown") -> None:
        """Adds what another has gathered."""
        self.table += other.table
        self.histogram += other.histogram

    def metrics(self) -> dict[str, float]:
        """Returns means by label and the quantiles of ρ, always by the same names; what has no tokens is NaN.

        objective/gate_mean/…, objective/gate_below_0.9/… (0.5, 0.1), objective/clip_0.2_share/…, objective/entropy/… for every label;
        for each lag also objective/token_share/…, objective/ratio_mean/…, objective/effective_sample_share/…, (Σ ρ)² / (n Σ ρ²),
        objective/behaviour_kl/…, KL(μ || π_θ), and objective/ratio_p01/… (p10, p50, p90, p99), quantiles of the ratio's histogram,
        exact to 1 %; beyond e^±2 they read e^±2. The effective sample share, the KL and the quantiles are given over all lags too.
        The last lag stands for all that are larger. A token share is NaN only where no lag has tokens.
        """
        total = dict(zip(_STATISTICS, self.table[_LAGS:].sum(0).tolist(), strict=True))
        found = {
            "objective/effective_sample_share": _effective_share(total),
            "objective/behaviour_kl": _ratio(total["behaviour_kl"], total["tokens"]),
        } | _quantiles(self.histogram.sum(0), "")
        for label, values in zip(_LABELS, self.table.tolist(), strict=True):
            row = dict(zip(_STATISTICS, values, strict=True))
            mean = {name: _ratio(value, row["tokens"]) for name, value in row.items()}
            found[f"objective/gate_mean/{label}"] = mean["gate"]
            for bound in (0.9, 0.5, 0.1):
                found[f"objective/gate_below_{bound}/{label}"] = mean[f"gate_below_{bound}"]
            found[f"objective/clip_{REFERENCE_CLIP}_share/{label}"] = mean["clipped"]
            found[f"objective/entropy/{label}"] = mean["entropy"]
            if label.startswith("lag_"):
                found[f"objective/token_share/{label}"] = _ratio(row["tokens"], total["tokens"])
                found[f"objective/ratio_mean/{label}"] = mean["ratio"]
                found[f"objective/effective_sample_share/{label}"] = _effective_share(row)
                found[f"objective/behaviour_kl/{label}"] = mean["behaviour_kl"]
                found |= _quantiles(self.histogram[int(label.removeprefix("lag_"))], f"/{label}")
        return found


def _behaviour_kl(logprobs: Tensor, behaviour_logprobs: Tensor) -> Tensor:
    """Returns [tokens] float64 terms, at least 0, whose mean over tokens that μ sampled estimates KL(μ || π_θ).

    r − 1 − log r with r = π_θ / μ (Schulman, "Approximating KL divergence", 2020, k3): since E_μ[r] = 1, its mean under μ is that
    of −log r. log r is bounded as the objective's. In float64, where r − 1 and log r are taken from each other.
    """
    log_ratio = (logprobs.double() - behaviour_logprobs.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def _ratio(value: float, over: float) -> float:
    """Returns NaN where it is over nothing."""
    return value / over if over else math.nan


def _effective_share(row: dict[str, float]) -> float:
    return _ratio(row["ratio"] ** 2, row["tokens"] * row["ratio_squared"])


def _quantiles(histogram: Tensor, suffix: str) -> dict[str, float]:
    """Returns the quantiles of a histogram, [bins]; NaN of an empty one."""
    reached = histogram.cumsum(0)
    wanted = torch.tensor(QUANTILES, dtype=torch.float64, device=reached.device) * reached[-1]
    bins = torch.searchsorted(reached, wanted)
    values = torch.where(reached[-1] > 0, ((bins - _HALF_BINS + 0.5) * _BIN_WIDTH).exp(), math.nan).tolist()
    return {f"objective/ratio_p{round(100 * q):02d}{suffix}": value for q, value in zip(QUANTILES, values, strict=True)}
