"""What an actor's process starts with in its environment: what must be set before an engine is imported.

Promise: an actor finds the modules that this process finds, sees the GPUs of its slot alone, and on a CPU shares the cores with its
neighbours. Starting the process is `fleet`'s.
"""

import os
import sys

from maspo_ray.fleet.placement import Slot

CPU_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Without these glibc returns large blocks to the system after each step and faults them in again: 10-25 % of a CPU step, and a third
of the time in which an engine loads weights."""

PASSIVE_WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""A thread that waits for the others of its process sleeps (GNU's and Intel's OpenMP): on a CPU, engines and learner share the cores,
and a busy wait in one process takes the core that another would compute on."""


def import_path() -> str:
    """Returns the PYTHONPATH of what this process starts: where it finds the user's modules they must find them too."""
    return os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(None, sys.path)]))


def actor_environment(slot: Slot, threads: int) -> dict[str, str]:
    """Returns the environment of an actor in a slot, as far as it differs from its node's."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": import_path(),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
    if slot.gpus == 0:
        # Ray 2.60 leaves all GPUs of the node visible to an actor that asked for none.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if slot.role != "reward" and slot.gpus == 0:
        environment |= CPU_ALLOCATOR | PASSIVE_WAITS
    return environment
