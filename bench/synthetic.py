"""Made-up experiences of given lengths, for benches that need a batch and no engine."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maspo_ray.experience import (
    Completion,
    CompletionFacts,
    Experience,
    Group,
    Prompt,
    Rollout,
    SampledGroup,
    Verdict,
    VersionSpan,
)
from maspo_ray.packing import RankPlan, pack


def lognormal_lengths(count: int, mean: float, most: int, seed: int) -> list[int]:
    """Returns lengths in tokens, log-normal with σ = 1 and the given mean, then cut to 1 … `most`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, size=count)
    return [int(length) for length in np.clip(drawn.round(), 1, most)]


class SyntheticBatch:
    """Groups of random tokens, old log-probs and advantages.

    Args:
        lengths: of each group's completions, in tokens.
    """

    def __init__(self, prompt_tokens: int, lengths: Sequence[Sequence[int]], vocabulary: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._payloads: dict[str, SampledGroup] = {}
        self.experiences: list[Experience] = []
        for g, group_lengths in enumerate(lengths):
            ids = rng.integers(3, vocabulary, size=prompt_tokens).astype(np.int32)
            completions = tuple(
                Completion(
                    rng.integers(3, vocabulary, size=length).astype(np.int32),
                    (rng.normal(size=length) - 8).astype(np.float32),
                    (VersionSpan(0, 0, length),),
                    "stop",
                    "",
                )
                for length in group_lengths
            )
            payload = f"group {g}"
            self._payloads[payload] = SampledGroup(Prompt(f"bench/{g}", "", ids, ""), completions)
            rollouts = tuple(Rollout(CompletionFacts.of(c), Verdict.from_reward(1.0)) for c in completions)
            group = Group(g, f"bench/{g}", payload, prompt_tokens, 0, 0, rollouts)
            self.experiences.append(Experience(group, tuple(rng.normal(size=len(rollouts)).tolist())))

    def plan(self, max_tokens: int, share_prompts: bool) -> tuple[RankPlan, list[Any]]:
        """Returns the plan of a learner of one rank, and its payloads."""
        [((plan,), references)] = pack(self.experiences, 1, max_tokens, share_prompts)
        return plan, [self._payloads[reference] for reference in references]

    def rollouts(self) -> Iterator[tuple[NDArray[np.int32], Completion, float]]:
        """Yields prompt ids, completion and advantage of each rollout."""
        for experience in self.experiences:
            group = self._payloads[experience.group.payload]
            for completion, advantage in zip(group.completions, experience.trained.values(), strict=True):
                yield group.prompt.token_ids, completion, advantage

    def sequences(self) -> list[NDArray[np.int32]]:
        """Returns each prompt with each of its completions."""
        return [np.concatenate([prompt, completion.token_ids]) for prompt, completion, _ in self.rollouts()]
