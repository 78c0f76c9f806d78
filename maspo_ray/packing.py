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
    """One rollout to train on.

    Attributes:
        prompt: position of its prompt in the rank's payloads.
        completion: position of a list of completions there, and its own in the list.
        reference: position of a list of reference log-probs there, and its own in the list; None without KL.
        num_tokens: completion tokens.
    """

    prompt: int
    completion: tuple[int, int]
    reference: tuple[int, int] | None
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
        heaviest = max(cut, key=lambda rows: (len(rows) > 1, lengths[rows[0]] * len(rows) if rows else 0))
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
        positions: dict[Any, int] = {}
        items: list[Item] = []
        micro_batches: list[tuple[int, ...]] = []
        for rows in share:
            micro_batches.append(tuple(range(len(items), len(items) + len(rows))))
            for experience, i in (rollouts[row] for row in rows):
                items.append(_item(experience, i, positions))
        plans.append((RankPlan(tuple(items), tuple(micro_batches), batch_tokens), tuple(positions)))
    return plans


def _item(experience: Experience, i: int, positions: dict[Any, int]) -> Item:
    """Returns the item of the experience's i-th rollout; adds what it refers to to `positions`, each reference once."""

    def position(payload: Any) -> int:
        return positions.setdefault(payload, len(positions))

    group, reference = experience.group, experience.reference_logprobs
    rollout = group.rollouts[i]
    return Item(
        prompt=position(group.prompt),
        completion=(position(rollout.payload), rollout.position),
        reference=None if reference is None else (position(reference), i),
        advantage=experience.advantages[i],
        num_tokens=rollout.facts.num_tokens,
    )
