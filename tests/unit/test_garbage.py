"""Looking for cycles rarely: still looked for, and the setting goes back."""

import gc

import pytest

from maspo_ray.pipeline.garbage import collecting_rarely


def test_collecting_rarely_is_rarer_within_and_as_before_after_a_failure() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="no"), collecting_rarely():
        within = gc.get_threshold()
        raise ValueError("no")
    assert within[0] > before[0] and within[1:] == before[1:]
    assert gc.get_threshold() == before and gc.isenabled()
