"""Whether bfloat16 pays on this machine's CPU: judged by a short product of matrices, since flags do not say.

Promise: takes some 0.2 s beside the import of torch, which is imported only where the answer matters. With AVX-512 and its
bfloat16 instructions, but without AMX, a product takes about twice as long in bfloat16 as in float32; with AVX2 alone, far longer.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from maspo_ray.config import LearnerConfig, ModelConfig

_log = logging.getLogger(__name__)

_SIZE = 256
_SECONDS, _FEWEST_ROUNDS = 0.2, 3


def warn_of_slow_bfloat16(model: ModelConfig, learner: LearnerConfig) -> None:
    """Warns where a learner on a CPU such as this machine's would be faster in float32 than in the bfloat16 of the config."""
    if model.dtype != "bfloat16" or learner.gpus > 0:
        return
    slowdown = bfloat16_slowdown()
    if slowdown > 1:
        _log.warning(
            "model.dtype is bfloat16; on this machine's CPU its matrix products take %.1f times as long as float32's. Set it to float32.",
            slowdown,
        )


def hint_at_slow_bfloat16(model: ModelConfig, learner: LearnerConfig, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Warns as `warn_of_slow_bfloat16` does, by the CPU's flags in place of a measurement, which would have `maspo check` wait for torch."""
    if model.dtype != "bfloat16" or learner.gpus > 0:
        return
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return
    if flags is not None and "amx_bf16" not in flags.group(1).split():
        _log.warning(
            "model.dtype is bfloat16; this machine's CPU has no AMX, without which float32 is faster as a rule: a run measures it at its "
            "start. Set it to float32."
        )


def bfloat16_slowdown() -> float:
    """Returns the time of a product of matrices in bfloat16 over that in float32."""
    import torch

    single = torch.randn(_SIZE, _SIZE)
    half = single.bfloat16()
    threads = torch.get_num_threads()
    # Of one core: on a busy machine threads wait for each other longer than a product this small takes.
    torch.set_num_threads(1)
    try:
        return times_as_long(lambda: half @ half, lambda: single @ single, _SECONDS)
    finally:
        torch.set_num_threads(threads)


def times_as_long(one: Callable[[], object], other: Callable[[], object], seconds: float) -> float:
    """Returns the least time of a call over that of another, both called in turn for so long, after a round that does not count."""
    rounds: list[tuple[float, float]] = []
    begun = perf_counter()
    while len(rounds) < 1 + _FEWEST_ROUNDS or perf_counter() - begun < seconds:
        rounds.append((_time_of(one), _time_of(other)))
    of_one, of_other = zip(*rounds[1:], strict=True)
    return min(of_one) / min(of_other)


def _time_of(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
