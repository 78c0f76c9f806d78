"""Seeds of the sampling, so that what an engine draws does not depend on when or where it is drawn.

Promise: a completion's seed follows from the run's seed, its prompt, the epoch and its place in the group alone.
"""

from hashlib import blake2b


def sampling_seeds(run_seed: int, prompt_id: str, epoch: int, count: int) -> list[int]:
    """Returns a seed for each completion of a group, at least 0 and below 2^63."""
    return [
        int.from_bytes(blake2b(f"{run_seed}/{epoch}/{i}/{prompt_id}".encode(), digest_size=8).digest()) >> 1
        for i in range(count)
    ]
