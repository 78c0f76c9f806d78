"""What parity compares."""

import numpy as np

from maspo_ray.evaluation.parity import Parity, compare_logprobs


def test_compare_logprobs_is_over_all_tokens_of_all_sequences() -> None:
    # Differences: 0.5, 0.25 and 0.0: largest 0.5, mean 0.75 / 3 = 0.25.
    learner = [np.array([-1.0, -2.0], dtype=np.float32), np.array([-3.0], dtype=np.float32)]
    engine = [np.array([-1.5, -1.75], dtype=np.float32), np.array([-3.0], dtype=np.float32)]
    assert compare_logprobs(learner, engine) == Parity(0.5, 0.25)


def test_compare_logprobs_of_a_nan_is_nan() -> None:
    row = [np.array([np.nan, -1.0], dtype=np.float32)]
    parity = compare_logprobs(row, [np.zeros(2, dtype=np.float32)])
    assert np.isnan(parity.max)
    assert np.isnan(parity.mean)
