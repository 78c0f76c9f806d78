"""bfloat16 on a CPU: what is timed, and who is warned."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from maspo_ray import dtype_speed
from maspo_ray.config import LearnerConfig, ModelConfig
from maspo_ray.dtype_speed import bfloat16_slowdown, hint_at_slow_bfloat16, times_as_long, warn_of_slow_bfloat16


def test_times_as_long_calls_both_in_turn_and_compares_the_least() -> None:
    calls: list[str] = []

    def takes(name: str, seconds: list[float]) -> Any:
        def call() -> None:
            calls.append(name)
            time.sleep(seconds[min(calls.count(name), len(seconds)) - 1])

        return call

    # Of each the first does not count; of the rest one is delayed.
    ratio = times_as_long(takes("a", [0.001, 0.02, 0.06, 0.02]), takes("b", [0.0, 0.04, 0.005, 0.005]), seconds=0.0)
    assert calls == ["a", "b"] * 4
    assert 2 < ratio < 4.5


def test_slowdown_takes_a_moment_and_leaves_torchs_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, timed = torch.get_num_threads(), []

    def note(one: Any, other: Any, seconds: float) -> float:
        timed.append((one().dtype, other().dtype, torch.get_num_threads()))
        return times_as_long(one, other, seconds)

    monkeypatch.setattr(dtype_speed, "times_as_long", note)
    bfloat16_slowdown()
    started = time.monotonic()
    assert 0.01 < bfloat16_slowdown() < 1000
    assert time.monotonic() - started < 3
    assert timed == [(torch.bfloat16, torch.float32, 1)] * 2
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("dtype", "gpus", "slowdown", "warning"),
    [
        ("bfloat16", 0, 1.94, "model.dtype is bfloat16; on this machine's CPU its matrix products take 1.9 times as long as"),
        ("bfloat16", 0, 0.5, None),
        ("bfloat16", 1, 1.94, None),
        ("float32", 0, 1.94, None),
    ],
)  # fmt: skip
def test_warning_is_for_a_learner_on_a_cpu_that_is_slower_in_bfloat16(
    dtype: Any,
    gpus: int,
    slowdown: float,
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[float] = []
    monkeypatch.setattr(dtype_speed, "bfloat16_slowdown", lambda: asked.append(slowdown) or slowdown)
    with caplog.at_level(logging.WARNING):
        warn_of_slow_bfloat16(ModelConfig(path="org/model", dtype=dtype), LearnerConfig(gpus=gpus))
    messages = [record.getMessage() for record in caplog.records]
    assert [message[: len(warning or "")] for message in messages] == ([warning] if warning else [])
    # Where the answer does not matter, torch is not imported for it.
    assert len(asked) == (dtype == "bfloat16" and gpus == 0)


@pytest.mark.parametrize(
    ("flags", "dtype", "gpus", "said"),
    [
        ("fpu avx2", "bfloat16", 0, True),
        ("fpu avx512_bf16 amx_tile", "bfloat16", 0, True),
        ("fpu amx_bf16 amx_tile", "bfloat16", 0, False),
        ("fpu avx2", "float32", 0, False),
        ("fpu avx2", "bfloat16", 1, False),
    ],
)
def test_hint_of_check_goes_by_the_flags_of_the_cpu(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: str, dtype: Any, gpus: float, said: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
    hint_at_slow_bfloat16(ModelConfig(path="org/m", dtype=dtype), LearnerConfig(gpus=gpus), tmp_path / "cpuinfo")
    assert [line.startswith("model.dtype is bfloat16; this machine's CPU has no AMX") for line in caplog.messages] == [
        True
    ] * said


def test_hint_of_check_is_left_out_where_the_machine_tells_no_flags(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hint_at_slow_bfloat16(ModelConfig(path="org/m", dtype="bfloat16"), LearnerConfig(), tmp_path / "nothing")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\n")
    hint_at_slow_bfloat16(ModelConfig(path="org/m", dtype="bfloat16"), LearnerConfig(), tmp_path / "cpuinfo")
    assert caplog.messages == []
