"""The keys that say how completions are sampled, those that training (`rollout`) and evaluation (`eval`) have in common.

Promise: as in `sections`, each is consistent with itself. Imports neither torch, ray nor vllm.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from maspo_ray.config.section import Section


def _as_list(value: Any) -> Any:
    """Returns a lone string or number as a list of it: `stop: "</answer>"`."""
    return (value,) if isinstance(value, (str, int)) else value


def _no_empty_string(value: Any) -> Any:
    if isinstance(value, Sequence) and "" in value:
        raise ValueError("an empty string would end every completion at once. Remove it")
    return value


StopStrings = Annotated[tuple[str, ...], BeforeValidator(_no_empty_string), BeforeValidator(_as_list)]
StopTokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_list)]


class TruncationConfig(Section):
    """Which of the tokens that the model gives a probability may be sampled. Each is off by default."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the fewest tokens that together have this probability; 1 for all."""
    top_k: int | None = Field(None, ge=1)
    """Sample from so many most probable tokens."""
    min_p: float = Field(0.0, ge=0, lt=1)
    """Sample from tokens with at least this share of the most probable one's probability."""
