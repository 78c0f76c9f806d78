"""What a checksum sees of an update, and what ends a run."""

import pytest
import torch

from maspo_ray.config import Dtype
from maspo_ray.errors import RunError
from maspo_ray.experience import UpdateReport
from maspo_ray.rollouts.publishing import WeightChecksums, must_show
from maspo_ray.weight_sync.checksum import weight_checksum


def test_checksum_of_the_same_weights_is_the_same_and_of_a_step_s_another() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 3))
    before = weight_checksum(model)
    assert weight_checksum(model) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6)
    assert weight_checksum(model) != before


def test_checksum_of_bfloat16_and_of_small_and_empty_tensors() -> None:
    model = torch.nn.Module()
    model.register_parameter("a", torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)))
    model.register_parameter("b", torch.nn.Parameter(torch.empty(0)))
    before = weight_checksum(model)
    with torch.no_grad():
        model.get_parameter("a")[2] = 2.0
    assert weight_checksum(model) != before


def test_check_that_replicas_change_with_the_learner_and_agree() -> None:
    checksums = WeightChecksums()
    checksums.check(0, ["a", "a"], changed=False)
    checksums.check(1, ["b", "b"], changed=True)
    # An update that was left out changes nothing.
    checksums.check(2, ["b", "b"], changed=False)
    checksums.check(3, ["c", "c"], changed=True)


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (["a", "a"], r"^rollout/0, rollout/1 did not take up version 1: "),
        (["b", "a"], r"^rollout/1 did not take up version 1: "),
        (["b", "c"], r"^rollout/1 and rollout/0 hold different weights after version 1 was published to them\."),
    ],
)
def test_check_names_the_engine_that_does_not_hold_the_version(found: list[str | None], error: str) -> None:
    checksums = WeightChecksums()
    checksums.check(0, ["a", "a"], changed=False)
    with pytest.raises(RunError, match=error):
        checksums.check(1, found, changed=True)


def test_check_of_engines_that_cannot_say_is_none() -> None:
    checksums = WeightChecksums()
    for version in range(3):
        checksums.check(version, [None, None], changed=True)


@pytest.mark.parametrize(
    ("sizes", "dtype", "shows"),
    [
        ([4e-5], "bfloat16", True),
        # The last of 1,000 steps of a cosine: 2.5e-6 of the learning rate, and one weight in 4e7 changes.
        ([1e-10], "bfloat16", False),
        ([1e-9], "float32", True),
        ([0.0], "float32", False),
        ([0.0, 4e-5], "bfloat16", True),
    ],
)
def test_updates_must_show_where_they_move_enough_weights(sizes: list[float], dtype: Dtype, shows: bool) -> None:
    reports = [UpdateReport({"learner/update_to_weight": size}, True, ()) for size in sizes]
    assert must_show(reports, dtype) == shows


def test_update_that_was_left_out_need_not_show_and_one_of_unknown_size_must() -> None:
    left_out, unknown = UpdateReport({"learner/update_to_weight": float("nan")}, False, ()), UpdateReport({}, True, ())
    assert not must_show([left_out], "float32")
    assert must_show([left_out, unknown], "float32")
