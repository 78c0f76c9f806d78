"""How far two saved models are apart, parameter by parameter.

Promise: holds one parameter of each at a time; what only one of them has is named.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from maspo_ray.errors import RunError


@dataclass(frozen=True, slots=True)
class ModelDifference:
    """The largest |Δ| over all parameters, infinite where one side is not a number, and the tensor that has it; None if it is 0."""

    largest: float
    tensor: str | None
    num_parameters: int


def model_difference(first: Path, second: Path) -> ModelDifference:
    """Returns how far two models are apart that were saved as safetensors, their adapters included.

    Raises:
        RunError: they do not have the same tensors.
    """
    files, others = _tensor_files(first), _tensor_files(second)
    lone = sorted(files.keys() ^ others.keys())
    if lone or not files:
        raise RunError(
            f"{first} and {second} cannot be compared: {lone[0] if lone else 'any tensor'} is not in both of them."
        )
    largest, tensor, num_parameters = 0.0, None, 0
    for name in files:
        a, b = _read(files[name], name), _read(others[name], name)
        if a.shape != b.shape:
            raise RunError(
                f"{first} and {second} cannot be compared: the shapes of {name} are {a.shape} and {b.shape}."
            )
        difference = _distance(a, b)
        num_parameters += a.numel()
        if difference > largest:
            largest, tensor = difference, name
    return ModelDifference(largest, tensor, num_parameters)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Returns which file has each tensor."""
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("adapter/*.safetensors")]):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> Any:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _distance(a: Any, b: Any) -> float:
    """Returns max |a - b|, where what is equal, or not a number on both sides, is no distance apart."""
    a, b = a.double(), b.double()
    apart = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()) if apart.numel() else 0.0
