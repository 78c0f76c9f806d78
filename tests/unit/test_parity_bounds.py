"""How far an engine may be from the learner: which statistic, over which tokens, and what is said where it is too far."""

import math
from typing import Literal

import pytest

from maspo_ray.errors import RunError
from maspo_ray.evaluation.parity import ParityBounds, statistic_of
from maspo_ray.experience import Parity

Dtype = Literal["float32", "bfloat16"]


def _refused(bounds: ParityBounds, found: Parity, replica: int = 0) -> str | None:
    """Returns why the difference ends the run, None where it does not."""
    try:
        bounds.check(7, {replica: found})
    except RunError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("dtype", "bound", "within", "beyond"),
    # Of the other statistic, and of outliers in bfloat16, nothing is said.
    [
        ("float32", None, Parity(1e-3, 1e-4, 300), Parity(1.1e-3, 1e-4, 300)),
        ("bfloat16", None, Parity(0.8, 0.1, 300), Parity(0.8, 0.101, 300)),
        ("float32", 0.25, Parity(0.25, 0.2, 300), Parity(0.26, 0.2, 300)),
        ("bfloat16", 0.25, Parity(0.8, 0.25, 300), Parity(0.8, 0.26, 300)),
    ],
)
def test_parity_bound_follows_the_dtype_unless_set(
    dtype: Dtype, bound: float | None, within: Parity, beyond: Parity
) -> None:
    assert _refused(ParityBounds(dtype, bound), within) is None
    cause = _refused(ParityBounds(dtype, bound), beyond, replica=3)
    assert cause is not None
    distance = beyond.max if statistic_of(dtype) == "max" else beyond.mean
    assert cause.startswith(f"parity is {distance:.3g} between the learner and rollout/3 at version 7; the ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_that_is_no_number_is_refused(dtype: Dtype) -> None:
    assert _refused(ParityBounds(dtype, None), Parity(math.nan, math.nan, 300)) is not None


def test_parity_in_bfloat16_may_be_three_times_what_it_was_first() -> None:
    bounds = ParityBounds("bfloat16", None)
    assert _refused(bounds, Parity(0.2, 0.01, 300)) is None
    assert _refused(bounds, Parity(0.2, 0.03, 300), replica=1) is None
    # An update that never arrived is within 0.1.
    assert "at most 0.03" in (_refused(bounds, Parity(0.2, 0.031, 300), replica=1) or "")
