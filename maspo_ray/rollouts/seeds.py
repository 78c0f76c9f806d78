"""Seeds of the sampling, so that what an engine draws does not depend on when or where it is drawn.

Promise: a completion's seed follows from the run's seed, its prompt, how often that was drawn before, and its place in the group
alone.
"""

from hashlib import shake_128
from struct import unpack


def sampling_seeds(run_seed: int, prompt_id: str, times_drawn: int, count: int) -> list[int]:
    """Returns a seed for each completion of a group, at least 0 and below 2^63.

    Args:
        times_drawn: how often the prompt was drawn before, so that a prompt that comes again does not repeat its samples.
    """
    key = f"{run_seed}/{times_drawn}/{prompt_id}".encode()
    return [number >> 1 for number in unpack(f">{count}Q", shake_128(key).digest(8 * count))]
