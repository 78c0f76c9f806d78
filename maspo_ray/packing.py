"""Experiences → micro-batches within a token budget, balanced over the learner's ranks.

Promise: every rollout of a batch that is trained on lies in exactly one micro-batch of one rank; every rank has the same number of
micro-batches (a step is a collective); no micro-batch is over the budget. Works on lengths, not on tokens.

What is packed is a *bundle*: one copy of a prompt and completions of it behind it, each of which attends to the prompt and to itself
alone. A prompt's forward and backward pass are then paid once for all of them. Not sharing prompts is the case of one
completion to a bundle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Any, NamedTuple

from maspo_ray.experience import Experience

_PAIRS_PER_TOKEN = 12_288
"""Query-key pairs whose attention costs as much as one token in the linear layers. A token takes about 12 · hidden² multiplications in a
layer, a pair 2 · hidden: 6 × hidden size, here of 2048. It only weighs the ranks' shares against each other."""


class Item(NamedTuple):
    """One rollout to train on. A tuple, since a step has very many.

    Attributes:
        sample: its place among the completions of its group's payload, and among the reference's log-probs.
        num_tokens: completion tokens.
    """

    sample: int
    advantage: float
    num_tokens: int


class Bundle(NamedTuple):
    """Completions behind one copy of their prompt.

    Attributes:
        payload: position of their `SampledGroup` in the rank's payloads.
        reference: position of the group's reference log-probs there; None without KL.
        group_id: of the group that they are from.
        replica: of the rollout actor that sampled them.
    """

    payload: int
    reference: int | None
    group_id: int
    replica: int
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """A rank's share of one optimizer update.

    Attributes:
        micro_batches: empty ones where the rank only takes part in the collective.
        batch_tokens: completion tokens of the update, all ranks: the normaliser of the loss.
    """

    micro_batches: tuple[tuple[Bundle, ...], ...]
    batch_tokens: int


class _Cut(NamedTuple):
    """Rollouts of an experience that share a prompt.

    Attributes:
        rollouts: their places in the group; advantages, of all that are trained on, by place.
        completion_tokens: of these rollouts; num_tokens, with the prompt's.
        cost: of a forward pass, in tokens.
    """

    experience: Experience
    advantages: dict[int, float]
    rollouts: list[int]
    completion_tokens: int
    num_tokens: int
    cost: float


def cut_by_budget(prompt_tokens: int, lengths: Sequence[int], max_tokens: int, share: bool) -> list[list[int]]:
    """Returns the places in `lengths` of the completions that share a copy of their prompt, longest first.

    Each copy, with what is behind it, has at most `max_tokens` tokens, unless one completion alone has more.
    """
    if not share:
        return [[i] for i in range(len(lengths))]
    longest_first = _largest_first(lengths)
    if lengths and prompt_tokens + sum(lengths) <= max_tokens:
        return [longest_first]
    cut: list[list[int]] = []
    free: list[int] = []
    for i in longest_first:
        for j, room in enumerate(free):
            if lengths[i] <= room:
                cut[j].append(i)
                free[j] -= lengths[i]
                break
        else:
            cut.append([i])
            free.append(max_tokens - prompt_tokens - lengths[i])
    return cut


def _largest_first(sizes: Sequence[float]) -> list[int]:
    """Returns the places in `sizes`, of equal ones the first first."""
    return sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Returns for each rank places in `costs`: the costliest first, each to the rank with the least so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for i in _largest_first(costs):
        load, rank = loads[0]
        shares[rank].append(i)
        heapreplace(loads, (load + costs[i], rank))
    return shares


def fill(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns micro-batches, lists of places in `sizes`: the largest first, each to the first that has room for it."""
    filled: list[list[int]] = []
    free: list[int] = []
    for i in _largest_first(sizes):
        j = next((j for j, room in enumerate(free) if sizes[i] <= room), None)
        if j is None:
            filled.append([i])
            free.append(max_tokens - sizes[i])
        else:
            filled[j].append(i)
            free[j] -= sizes[i]
    return filled


def level(shares: list[list[list[int]]]) -> None:
    """Halves micro-batches of the ranks that have fewer until all have as many, in place; an empty one where none has two."""
    most = max(map(len, shares))
    for share in shares:
        while len(share) < most:
            largest = max(share, key=len, default=[])
            half = len(largest) // 2
            share.append(largest[:half])
            del largest[:half]


def pack(
    experiences: Sequence[Experience], ranks: int, max_tokens: int, share_prompts: bool, updates: int = 1
) -> list[tuple[tuple[RankPlan, ...], tuple[Any, ...]]]:
    """Returns for each rank its plans, one for each update, and the payload references that their positions speak of.

    Args:
        updates: how many to make of the batch; each takes as many experiences, in the order given.
    """
    size = len(experiences) // updates
    assert size * updates == len(experiences), f"{len(experiences)} experiences do not make {updates} equal updates"
    plans: list[list[RankPlan]] = [[] for _ in range(ranks)]
    positions: list[dict[Any, int]] = [{} for _ in range(ranks)]
    for start in range(0, len(experiences), size):
        cuts = [cut for e in experiences[start : start + size] for cut in _cuts(e, max_tokens, share_prompts)]
        batch_tokens = sum([cut.completion_tokens for cut in cuts])
        dealt = [[cuts[i] for i in share] for share in deal([cut.cost for cut in cuts], ranks)]
        shares = [fill([cut.num_tokens for cut in share], max_tokens) for share in dealt]
        level(shares)
        for rank, (own, micro_batches) in enumerate(zip(dealt, shares, strict=True)):
            bundles = tuple([tuple([_bundle(own[i], positions[rank]) for i in places]) for places in micro_batches])
            plans[rank].append(RankPlan(bundles, batch_tokens))
    return [(tuple(own), tuple(places)) for own, places in zip(plans, positions, strict=True)]


def _cuts(experience: Experience, max_tokens: int, share: bool) -> Iterator[_Cut]:
    group, prompt = experience.group, experience.group.prompt_tokens
    # What is not trained on says nothing; it does not count in the normaliser either.
    advantages = experience.trained
    trained = list(advantages)
    lengths = [group.rollouts[i].facts.num_tokens for i in trained]
    for places in cut_by_budget(prompt, lengths, max_tokens, share):
        own = [lengths[place] for place in places]
        tokens = sum(own)
        # A prompt's tokens see each other, a completion's the prompt and each other, in each case those before.
        pairs = prompt * prompt / 2 + prompt * tokens + sum([length * length for length in own]) / 2
        cost = prompt + tokens + pairs / _PAIRS_PER_TOKEN
        yield _Cut(experience, advantages, [trained[place] for place in places], tokens, prompt + tokens, cost)


def _bundle(cut: _Cut, positions: dict[Any, int]) -> Bundle:
    """Returns the bundle of a cut; adds what it refers to to `positions`, each reference once."""
    group, reference = cut.experience.group, cut.experience.reference_logprobs
    items = tuple([Item(i, cut.advantages[i], group.rollouts[i].facts.num_tokens) for i in cut.rollouts])
    payload = positions.setdefault(group.payload, len(positions))
    logprobs = None if reference is None else positions.setdefault(reference, len(positions))
    return Bundle(payload, logprobs, group.group_id, group.replica, items)
