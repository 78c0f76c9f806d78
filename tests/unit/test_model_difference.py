"""How far two saved models are apart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maspo_ray.errors import RunError
from maspo_ray.replay.model_difference import model_difference

NAN, INF = float("nan"), float("inf")


def _saved(folder: Path, tensors: dict[str, list[float]], dtype: torch.dtype = torch.float32) -> Path:
    """Returns the folder, with a file for each tensor as of a model that is cut into shards; adapters go into theirs."""
    for name, values in tensors.items():
        place = folder / "adapter" if name.startswith("lora") else folder
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.tensor(values, dtype=dtype)}, place / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("first", "second", "largest", "tensor"),
    [
        ({"a": [1.0, 2.0], "b": [3.0]}, {"a": [1.0, 2.0], "b": [3.0]}, 0.0, None),
        # |1 - 1.5| = 0.5 in a, |3 - 1| = 2 in b.
        ({"a": [1.0, 2.0], "b": [3.0]}, {"a": [1.5, 2.0], "b": [1.0]}, 2.0, "b"),
        ({"a": [1.0], "lora": [0.25]}, {"a": [1.0], "lora": [0.5]}, 0.25, "lora"),
        ({"a": [NAN, INF, 0.0]}, {"a": [NAN, INF, -0.0]}, 0.0, None),
        ({"a": [NAN]}, {"a": [1.0]}, INF, "a"),
        ({"a": [INF]}, {"a": [1.0]}, INF, "a"),
    ],
)
def test_difference_is_the_largest_over_all_tensors(
    tmp_path: Path, first: dict[str, list[float]], second: dict[str, list[float]], largest: float, tensor: str | None
) -> None:
    found = model_difference(_saved(tmp_path / "first", first), _saved(tmp_path / "second", second))
    assert (found.largest, found.tensor) == (largest, tensor)
    assert found.num_parameters == sum(map(len, first.values()))


def test_difference_of_bfloat16_is_exact(tmp_path: Path) -> None:
    # Neighbours at 1: 1 + 2^-7.
    first = _saved(tmp_path / "first", {"a": [1.0]}, torch.bfloat16)
    second = _saved(tmp_path / "second", {"a": [1.0078125]}, torch.bfloat16)
    assert model_difference(first, second).largest == 2**-7


@pytest.mark.parametrize(
    ("second", "what"),
    [({"a": [1.0]}, "b is not in both"), ({}, "a is not in both"), ({"a": [1.0], "b": [1.0, 2.0]}, "the shapes of b")],
)
def test_difference_of_other_tensors_is_refused(tmp_path: Path, second: dict[str, list[float]], what: str) -> None:
    first = _saved(tmp_path / "first", {"a": [1.0], "b": [1.0]})
    with pytest.raises(RunError, match=what):
        model_difference(first, _saved(tmp_path / "second", second))
