"""The environment that an actor's process starts with, by its role and what its slot has."""

import os
import sys
from pathlib import Path

import pytest

from maspo_ray.fleet.environment import actor_environment, import_path
from maspo_ray.fleet.placement import Slot


def _environment(role: str, gpus: float) -> dict[str, str]:
    return actor_environment(Slot(role, 0, "node-0", gpus, 1.0), threads=3)


def test_actor_environment_hides_gpus_from_an_actor_without_one() -> None:
    assert _environment("reference", 0)["CUDA_VISIBLE_DEVICES"] == ""
    # Ray sets it for those that have one.
    assert "CUDA_VISIBLE_DEVICES" not in _environment("reference", 0.5)


@pytest.mark.parametrize("role", ["rollout", "reference", "learner"])
def test_actor_environment_of_an_engine_on_a_cpu_waits_passively_and_keeps_its_memory(role: str) -> None:
    wanted = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "MALLOC_MMAP_MAX_": "0"}
    assert wanted.items() <= _environment(role, 0).items()
    on_gpu = _environment(role, 1)
    assert on_gpu["OMP_NUM_THREADS"] == "3"
    assert not {"OMP_WAIT_POLICY", "KMP_BLOCKTIME", "MALLOC_MMAP_MAX_"} & on_gpu.keys()


def test_actor_environment_of_a_reward_is_left_to_the_user() -> None:
    assert not {"OMP_WAIT_POLICY", "KMP_BLOCKTIME", "MALLOC_MMAP_MAX_"} & _environment("reward", 0).keys()


def test_import_path_is_this_processs_own_from_its_folder_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/a", "/b", "/a"])
    assert import_path().split(os.pathsep) == [str(tmp_path), "/a", "/b"]
