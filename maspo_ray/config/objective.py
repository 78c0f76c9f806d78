"""The sections that say what is optimised: the objective's gate, the advantages, the KL to the reference policy.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maspo_ray.config.section import Section


class _GateConfig(Section):
    ratio_cap: float | None = Field(None, gt=1)
    """Gate 0 where the advantage is negative and the ratio is above this (dual-clip PPO's gradient, arXiv:1912.09729)."""
    old_policy: Literal["behaviour", "recompute"] = "behaviour"
    """What the ratio is measured against: the policy that sampled the token, so that the ratio holds staleness and the difference
    between engine and learner too; or, as in the paper, the learner's when the batch arrived."""
    importance_cap: float = Field(2.0, gt=0)
    """With `recompute`, the bound of the detached weight min(π_old / μ, importance_cap) that corrects for the policy that sampled;
    `behaviour` has none, since its ratio holds it."""


class MaspoConfig(_GateConfig):
    """arXiv:2602.17550, section 3; the clamps are the released implementation's."""

    kind: Literal["maspo"] = "maspo"
    sigma_base: float = Field(1.0, gt=0)
    """Least width σ of the gate, in units of the ratio."""
    alpha: float = Field(0.3, ge=0)
    """0.5 suits models of 1.5B parameters and fewer."""
    sigma_max: float = Field(10.0, gt=0)
    """Largest width, of rare tokens."""
    beta_pos: float = Field(0.03, ge=0)
    """How much a positive advantage widens the gate: by the factor 1 + β Â."""
    beta_neg: float = Field(0.03, ge=0)
    """How much a negative advantage narrows it: by the factor 1 / (1 − β Â)."""
    risk_min: float = Field(0.1, gt=0)
    """Lower bound of these two factors."""
    risk_max: float = Field(10.0, gt=0)
    """Upper bound of these two factors."""

    @model_validator(mode="after")
    def _ordered_bounds(self) -> Self:
        if self.sigma_max < self.sigma_base:
            raise ValueError(
                f"sigma_max is {self.sigma_max}; it must be at least sigma_base ({self.sigma_base}). Raise it."
            )
        if self.risk_max < self.risk_min:
            raise ValueError(f"risk_max is {self.risk_max}; it must be at least risk_min ({self.risk_min}). Raise it.")
        return self


class GrpoConfig(_GateConfig):
    """The hard clip of PPO as GRPO uses it, arXiv:2402.03300."""

    kind: Literal["grpo"] = "grpo"
    epsilon: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped to 1 ± this."""


ObjectiveConfig = Annotated[MaspoConfig | GrpoConfig, Field(discriminator="kind")]


class AdvantageConfig(Section):
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """What a group's rewards become: minus their mean and over their standard deviation (grpo), minus their mean (dr_grpo), or minus
    the mean of the others' (rloo)."""


class KLConfig(Section):
    coef: float = Field(0.0, ge=0)
    """Weight of the KL to the reference policy in the loss; the reference actors start only above 0."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """−log r (k1), ½ (log r)² (k2) or r − 1 − log r (k3), where r is the reference's probability of a token over the learner's."""
