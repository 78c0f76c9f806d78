"""How a rollout host calls reward actors.

Promise: picklable, so that it can be given to the hosts; a reward actor's failure comes out as one line with its name.
"""

from collections.abc import Sequence
from typing import Any

from maspo_ray.experience import Completion, Prompt, Verdict
from maspo_ray.fleet.calls import failures_named


class RewardCalls:
    """Calls the reward actor of a replica.

    Args:
        handles: in the order of the replicas.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)

    async def __call__(self, replica: int, prompt: Prompt, completions: Sequence[Completion]) -> list[Verdict]:
        """Returns a verdict for each completion."""
        with failures_named(f"reward/{replica}", "scoring"):
            verdicts: list[Verdict] = await self._handles[replica].score.remote(prompt, completions)
            return verdicts
