"""Experiences → micro-batches within a token budget, balanced over the learner's ranks.

Promise: every scored rollout of a batch lies in exactly one micro-batch of one rank; every rank has the same number of
micro-batches (a step is a collective); no micro-batch is over the budget, padding counted. Works on lengths, not on tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maspo_ray.experience import Experience


@dataclass(frozen=True, slots=True)
class Item:
    """One rollout to train on. The positions are those of a rank's payloads.

    Attributes:
        num_tokens: completion tokens.
        reference: position of the reference log-probs, None without KL.
    """

    prompt: int
    completion: int
    reference: int | None
    advantage: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank's share of one optimizer step.

    Attributes:
        micro_batches: positions in `items`; empty where the rank only takes part in the collective.
        batch_tokens: completion tokens of the whole batch, all ranks: the normaliser of the loss.
    """

    items: tuple[Item, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    batch_tokens: int


def cut_micro_batches(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Returns for each rank its micro-batches, lists of positions in `lengths`.

    Sequences of like length share a micro-batch, since the shorter ones are padded. Micro-batches are dealt to the ranks
    longest first, each round in the other direction.

    Args:
        lengths: tokens of each sequence, prompt and completion.
        max_tokens: budget of rows × longest row.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cut: list[list[int]] = []
    for i in order:
        if cut and lengths[cut[-1][0]] * (len(cut[-1]) + 1) <= max_tokens:
            cut[-1].append(i)
        else:
            cut.append([i])
    while len(cut) % ranks:
        heaviest = max(cut, key=lambda rows: (len(rows) > 1, lengths[rows[0]] * len(rows)))
        if len(heaviest) == 1:
            cut.append([])
            continue
        half = len(heaviest) // 2
        cut.append(heaviest[half:])
        del heaviest[half:]
    cut.sort(key=lambda rows: -sum(lengths[i] for i in rows))
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for start in range(0, len(cut), ranks):
        dealt = cut[start : start + ranks]
        for rank, rows in enumerate(reversed(dealt) if (start // ranks) % 2 else dealt):
            shares[rank].append(rows)
    return shares


def pack(experiences: Sequence[Experience], ranks: int, max_tokens: int) -> list[tuple[RankPlan, tuple[Any, ...]]]:
    """Returns for each rank its plan and the payload references that the plan's positions speak of."""
    rollouts = [
        (experience, i)
        for experience in experiences
        for i, rollout in enumerate(experience.group.rollouts)
        # A rollout that could not be scored says nothing; it does not count in the normaliser either.
        if rollout.verdict.outcome == "scored"
    ]
    lengths = [e.group.prompt_tokens + e.group.rollouts[i].facts.num_tokens for e, i in rollouts]
    batch_tokens = sum(e.group.rollouts[i].facts.num_tokens for e, i in rollouts)
    plans = []
    for share in cut_micro_batches(lengths, ranks, max_tokens):
        payloads: list[Any] = []
        prompts: dict[int, int] = {}
        items: list[Item] = []
        micro_batches: list[tuple[int, ...]] = []
        for rows in share:
            micro_batches.append(tuple(range(len(items), len(items) + len(rows))))
            for experience, i in (rollouts[row] for row in rows):
                items.append(_item(experience, i, payloads, prompts))
        plans.append((RankPlan(tuple(items), tuple(micro_batches), batch_tokens), tuple(payloads)))
    return plans


def _item(experience: Experience, i: int, payloads: list[Any], prompts: dict[int, int]) -> Item:
    group = experience.group

    def position(payload: Any) -> int:
        payloads.append(payload)
        return len(payloads) - 1

    if group.group_id not in prompts:
        prompts[group.group_id] = position(group.prompt)
    return Item(
        prompt=prompts[group.group_id],
        completion=position(group.rollouts[i].payload),
        reference=position(experience.reference_logprobs[i]) if experience.reference_logprobs else None,
        advantage=experience.advantages[i],
        num_tokens=group.rollouts[i].facts.num_tokens,
    )
