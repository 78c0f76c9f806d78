"""Packing: every scored rollout once, the same number of micro-batches on every rank, no micro-batch over the budget."""

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.experience import CompletionFacts, Experience, Group, Outcome, Rollout, Verdict
from maspo_ray.packing import cut_micro_batches, pack

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


def _padded_tokens(rows: list[int], lengths: list[int]) -> int:
    return len(rows) * max((lengths[i] for i in rows), default=0)


@given(lengths=LENGTHS, ranks=st.integers(1, 4), max_tokens=st.integers(1, 200))
def test_cut_every_sequence_lies_in_exactly_one_micro_batch(lengths: list[int], ranks: int, max_tokens: int) -> None:
    shares = cut_micro_batches(lengths, ranks, max_tokens)
    assert len(shares) == ranks
    assert sorted(i for share in shares for rows in share for i in rows) == list(range(len(lengths)))


@given(lengths=LENGTHS, ranks=st.integers(1, 4), max_tokens=st.integers(1, 200))
def test_cut_every_rank_has_as_many_micro_batches(lengths: list[int], ranks: int, max_tokens: int) -> None:
    assert len({len(share) for share in cut_micro_batches(lengths, ranks, max_tokens)}) == 1


@given(lengths=LENGTHS, ranks=st.integers(1, 4), max_tokens=st.integers(1, 200))
def test_cut_no_micro_batch_is_over_the_budget_unless_one_sequence_is(
    lengths: list[int], ranks: int, max_tokens: int
) -> None:
    for share in cut_micro_batches(lengths, ranks, max_tokens):
        for rows in share:
            assert len(rows) <= 1 or _padded_tokens(rows, lengths) <= max_tokens


@given(lengths=LENGTHS, ranks=st.integers(1, 4), max_tokens=st.integers(1, 200))
def test_cut_a_rank_is_idle_only_where_there_are_fewer_sequences_than_places(
    lengths: list[int], ranks: int, max_tokens: int
) -> None:
    shares = cut_micro_batches(lengths, ranks, max_tokens)
    empty = sum(not rows for share in shares for rows in share)
    # One sequence to a micro-batch is the finest cut, so that only then a place may stay empty, and in one round at most.
    assert empty < ranks
    if empty:
        assert all(len(rows) <= 1 for share in shares for rows in share)


def test_cut_fills_the_budget_with_sequences_of_like_length() -> None:
    # Longest first: 8 and 8 pad to 16; 3, 3, 2 to 9, and a fourth of 8 would have made 3 × 8 = 24.
    assert cut_micro_batches([3, 8, 2, 8, 3], 1, 16) == [[[1, 3], [0, 4, 2]]]


def test_cut_deals_the_ranks_alike_loads() -> None:
    # One sequence each, 10 9 | 8 7: the second round goes the other way, 10 + 7 and 9 + 8.
    shares = cut_micro_batches([10, 9, 8, 7], 2, 10)
    assert shares == [[[0], [3]], [[1], [2]]]


def test_cut_halves_a_micro_batch_so_that_the_ranks_come_out_even() -> None:
    # All four fit into one micro-batch, which two ranks cannot share: two and two.
    assert cut_micro_batches([5, 5, 5, 5], 2, 20) == [[[0, 1]], [[2, 3]]]


def test_cut_one_sequence_leaves_the_other_ranks_an_empty_micro_batch() -> None:
    assert cut_micro_batches([5], 3, 20) == [[[0]], [[]], [[]]]


# Plans. Payloads are named by strings, as references would be: equal exactly if they are the same.


@st.composite
def _experiences(draw: st.DrawFn, with_reference: bool = False) -> list[Experience]:
    experiences = []
    for g in range(draw(st.integers(1, 5))):
        rollouts: list[Rollout] = []
        for p in range(draw(st.integers(1, 3))):
            for position in range(draw(st.integers(1, 3))):
                facts = CompletionFacts(draw(st.integers(1, 12)), 0, 0, "stop")
                outcome = draw(st.sampled_from(list(Outcome)))
                verdict = Verdict(0.5 if outcome is Outcome.SCORED else math.nan, True, outcome)
                rollouts.append(Rollout(f"payload {g} {p}", position, facts, verdict))
        group = Group(g, f"train/{g}", f"prompt {g}", draw(st.integers(1, 6)), 0, tuple(rollouts))
        advantages = tuple(100.0 * g + i for i in range(len(rollouts)))
        experiences.append(Experience(group, advantages, f"reference {g}" if with_reference else None))
    return experiences


def _scored(experiences: list[Experience]) -> list[tuple[Experience, int]]:
    return [
        (experience, i)
        for experience in experiences
        for i, rollout in enumerate(experience.group.rollouts)
        if rollout.verdict.outcome is Outcome.SCORED
    ]


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60))
def test_pack_scored_rollouts_come_out_once_with_their_payload_and_advantage(
    experiences: list[Experience], ranks: int, max_tokens: int
) -> None:
    packed = Counter(
        (payloads[item.prompt], payloads[item.completion[0]], item.completion[1], item.advantage, item.num_tokens)
        for plan, payloads in pack(experiences, ranks, max_tokens)
        for item in plan.items
    )
    expected = Counter(
        (e.group.prompt, r.payload, r.position, e.advantages[i], r.facts.num_tokens)
        for e, i in _scored(experiences)
        for r in [e.group.rollouts[i]]
    )
    assert packed == expected


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60))
def test_pack_normaliser_is_the_scored_completion_tokens_of_the_whole_batch_on_every_rank(
    experiences: list[Experience], ranks: int, max_tokens: int
) -> None:
    plans = pack(experiences, ranks, max_tokens)
    tokens = sum(e.group.rollouts[i].facts.num_tokens for e, i in _scored(experiences))
    assert [plan.batch_tokens for plan, _ in plans] == [tokens] * ranks
    assert sum(item.num_tokens for plan, _ in plans for item in plan.items) == tokens


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60))
def test_pack_micro_batches_cover_the_ranks_items_and_count_the_prompt_in_the_budget(
    experiences: list[Experience], ranks: int, max_tokens: int
) -> None:
    plans = pack(experiences, ranks, max_tokens)
    assert len({len(plan.micro_batches) for plan, _ in plans}) == 1
    prompt_tokens = {e.group.prompt: e.group.prompt_tokens for e in experiences}
    for plan, payloads in plans:
        assert [i for rows in plan.micro_batches for i in rows] == list(range(len(plan.items)))
        for rows in plan.micro_batches:
            lengths = [prompt_tokens[payloads[plan.items[i].prompt]] + plan.items[i].num_tokens for i in rows]
            assert len(rows) <= 1 or len(rows) * max(lengths) <= max_tokens


@given(experiences=_experiences(with_reference=True), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60))
def test_pack_sends_a_rank_each_payload_once_and_none_that_it_does_not_use(
    experiences: list[Experience], ranks: int, max_tokens: int
) -> None:
    for plan, payloads in pack(experiences, ranks, max_tokens):
        used = {p for item in plan.items for p in (item.prompt, item.completion[0], (item.reference or (0, 0))[0])}
        assert used == set(range(len(payloads)))
        assert len(set(payloads)) == len(payloads)


@given(experiences=_experiences(with_reference=True), ranks=st.integers(1, 4))
def test_pack_reference_is_the_rollouts_place_in_its_group(experiences: list[Experience], ranks: int) -> None:
    for plan, payloads in pack(experiences, ranks, 60):
        for item in plan.items:
            assert item.reference is not None
            # The advantages above number the rollouts of a group: 100 · group + place.
            group, place = divmod(int(item.advantage), 100)
            assert (payloads[item.reference[0]], item.reference[1]) == (f"reference {group}", place)


@given(experiences=_experiences(), ranks=st.integers(1, 4))
def test_pack_without_kl_has_no_reference(experiences: list[Experience], ranks: int) -> None:
    assert all(item.reference is None for plan, _ in pack(experiences, ranks, 60) for item in plan.items)
