"""An objective's metrics by kind of token: by the advantage's sign, by the token's probability, and by its staleness.

Promise: the sums are tables of a fixed shape that add up over micro-batches and ranks, however the batch was split. They carry no
gradient and stay on the device until `metrics` turns them into named means.
"""

import math
from dataclasses import dataclass

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
"""The first row by probability, and the first by lag: `_LABELS` are the rows of a table."""

_STATISTICS = (
    *("tokens", "gate", "gate_below_0.9", "gate_below_0.5", "gate_below_0.1"),
    *("clipped", "entropy", "ratio", "ratio_squared", "behaviour_kl"),
)
"""The columns of a table, each a sum over tokens."""

_BIN_WIDTH, _HALF_BINS = 0.01, 200
"""The histogram of log ρ has bins of 1 % from e^−2 to e^2; ratios outside fall into the first and the last."""
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Tokens of a micro-batch under the policies that have scored them; each field is [tokens].

    Attributes:
        logprobs: log π_θ.
        old_logprobs: log π_old.
        behaviour_logprobs: log μ of the behaviour policy, which sampled the tokens; log π_old is another where it is recomputed.
        entropy: of the current policy's distribution at the token.
        lags: int64, staleness in weight versions: the version being updated minus the oldest that the token's completion was
            sampled by.
        mask: bool, True for the tokens to count.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    behaviour_logprobs: Tensor
    entropy: Tensor
    advantages: Tensor
    lags: Tensor
    mask: Tensor


class Breakdown:
    """One rank's sums over the tokens of one update or of several.

    Attributes:
        table: [labels, statistics] float64: for each kind of token, the sum of each statistic.
        histogram: [lags, bins] float64: for each lag, the number of tokens by log ρ.
    """

    def __init__(self, device: torch.device) -> None:
        self.table = torch.zeros(len(_LABELS), len(_STATISTICS), dtype=torch.float64, device=device)
        self.histogram = torch.zeros(_MAX_LAG + 1, 2 * _HALF_BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: PolicyLoss, tokens: "ScoredTokens") -> None:
        """Adds a micro-batch's tokens, and what the objective made of them."""
        advantages, mask = tokens.advantages, tokens.mask
        gate, ratio = loss.gate, loss.ratio
        counts = mask.double()
        clipped = ~within_clip(ratio, advantages, REFERENCE_CLIP, REFERENCE_CLIP)
        rows = [counts, gate, gate < 0.9, gate < 0.5, gate < 0.1, clipped, tokens.entropy, ratio, ratio.square()]
        rows.append(_behaviour_kl(tokens.logprobs, tokens.behaviour_logprobs))
        statistics = torch.stack([torch.where(mask, row, 0).double() for row in rows], dim=1)
        probability = (tokens.old_logprobs.exp() * 10).long().clamp(0, 9) + _PROBABILITIES
        lag = tokens.lags.clamp(0, _MAX_LAG)
        # A token whose advantage is 0 has no gradient, whatever its gate, and counts neither as positive nor as negative.
        signed = statistics * (advantages != 0).unsqueeze(1)
        for label, values in (((advantages > 0).long(), signed), (probability, statistics), (lag + _LAGS, statistics)):
            self.table.index_add_(0, label, values)
        bins = (ratio.log() / _BIN_WIDTH).floor().long().clamp(-_HALF_BINS, _HALF_BINS - 1) + _HALF_BINS
        self.histogram.view(-1).index_add_(0, lag * 2 * _HALF_BINS + bins, counts)

    def merge(self, other: "Breakdown") -> None:
        """Adds another breakdown's sums."""
        self.table += other.table
        self.histogram += other.histogram

    def metrics(self) -> dict[str, float]:
        """Returns means over the tokens of each label, and quantiles of ρ, always by the same names; NaN where there are no tokens.

        Of every label: objective/gate_mean/…, objective/gate_below_0.9/… (0.5, 0.1), objective/clip_0.2_share/…, objective/entropy/….
        Of every lag also: objective/token_share/…, its share of all tokens; objective/ratio_mean/…; objective/effective_sample_share/…,
        (Σ ρ)² / (n Σ ρ²); objective/behaviour_kl/…, KL(μ || π_θ); and objective/ratio_p01/… (p10, p50, p90, p99), the quantiles of the
        ratio to 1 %, which read e^±2 where they lie beyond. The effective sample share, the KL and the quantiles are also given over
        all lags together. The largest lag's row holds all larger lags too.
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
    """Returns each token's estimate of KL(μ || π_θ), [tokens] float64: how far the policy has moved from the one that sampled.

    r − 1 − log r with r = π_θ / μ, the k3 of Schulman, "Approximating KL divergence", 2020. It is never negative, and unbiased, since
    under μ the mean of r − 1 is 0 and that of −log r is the KL. log r is clamped as in the objective. In float64, since r − 1 and log r
    nearly cancel where the policies are alike.
    """
    log_ratio = (logprobs.double() - behaviour_logprobs.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def _ratio(value: float, over: float) -> float:
    """Returns NaN where it is over nothing."""
    return value / over if over else math.nan


def _effective_share(row: dict[str, float]) -> float:
    return _ratio(row["ratio"] ** 2, row["tokens"] * row["ratio_squared"])


def _quantiles(histogram: Tensor, suffix: str) -> dict[str, float]:
    """Returns the quantiles of ρ from a histogram of log ρ, [bins]; NaN of an empty one. `suffix` ends their names."""
    cumulative = histogram.cumsum(0)
    ranks = torch.tensor(QUANTILES, dtype=torch.float64, device=cumulative.device) * cumulative[-1]
    bins = torch.searchsorted(cumulative, ranks)
    values = torch.where(cumulative[-1] > 0, ((bins - _HALF_BINS + 0.5) * _BIN_WIDTH).exp(), math.nan).tolist()
    return {f"objective/ratio_p{round(100 * q):02d}{suffix}": value for q, value in zip(QUANTILES, values, strict=True)}
