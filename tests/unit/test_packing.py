"""Packing: every rollout that is trained on once, the same number of micro-batches on every rank, no micro-batch over the budget."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.experience import CompletionFacts, Experience, Group, Rollout, Verdict
from maspo_ray.packing import Bundle, Item, RankPlan, cut_by_budget, deal, fill, level, pack

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(prompt=st.integers(1, 20), lengths=LENGTHS, max_tokens=st.integers(1, 200), share=st.booleans())
def test_cut_every_completion_lies_behind_one_copy_of_the_prompt_within_the_budget(
    prompt: int, lengths: list[int], max_tokens: int, share: bool
) -> None:
    cut = cut_by_budget(prompt, lengths, max_tokens, share)
    assert sorted(i for places in cut for i in places) == list(range(len(lengths)))
    for places in cut:
        assert len(places) <= (len(lengths) if share else 1)
        assert len(places) == 1 or prompt + sum(lengths[i] for i in places) <= max_tokens


def test_cut_shares_the_prompt_by_all_that_fit() -> None:
    # Behind a prompt of 4 there is room for 16. Longest first, each where it fits first: 9 and 7; 8, 5 and 2.
    assert cut_by_budget(4, [5, 9, 7, 2, 8], 20, share=True) == [[1, 2], [4, 0, 3]]
    assert cut_by_budget(4, [5, 9, 2], 20, share=True) == [[1, 0, 2]]
    assert cut_by_budget(4, [5, 9, 2], 20, share=False) == [[0], [1], [2]]


@given(sizes=LENGTHS, max_tokens=st.integers(1, 200))
def test_fill_every_bundle_lies_in_one_micro_batch_within_the_budget(sizes: list[int], max_tokens: int) -> None:
    filled = fill(sizes, max_tokens)
    assert sorted(i for places in filled for i in places) == list(range(len(sizes)))
    assert all(len(places) == 1 or sum(sizes[i] for i in places) <= max_tokens for places in filled)
    # First fit leaves at most one micro-batch that is less than half full.
    assert sum(2 * sum(sizes[i] for i in places) < max_tokens for places in filled) <= 1


@given(costs=st.lists(st.floats(0.1, 100), max_size=30), ranks=st.integers(1, 5))
def test_deal_ranks_differ_by_no_more_than_one_bundle(costs: list[float], ranks: int) -> None:
    shares = deal(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0) + 1e-9


def test_deal_gives_the_costliest_first_to_the_rank_with_least() -> None:
    # 10 | 9, then 8 to the 9 (17 would be 18): 10 + 7 and 9 + 8.
    assert deal([10, 9, 8, 7], 2) == [[0, 3], [1, 2]]


@given(sizes=st.lists(LENGTHS, min_size=1, max_size=4), max_tokens=st.integers(1, 100))
def test_level_gives_every_rank_as_many_and_loses_nothing(sizes: list[list[int]], max_tokens: int) -> None:
    shares = [fill(own, max_tokens) for own in sizes]
    level(shares)
    assert len({len(share) for share in shares}) == 1
    for share, own in zip(shares, sizes, strict=True):
        assert sorted(i for places in share for i in places) == list(range(len(own)))
        # A place stays empty only where no micro-batch has two bundles.
        assert all(share) or all(len(places) <= 1 for places in share)


def _pack(
    experiences: list[Experience], ranks: int, max_tokens: int, share: bool
) -> list[tuple[RankPlan, tuple[str, ...]]]:
    return [(plan, payloads) for (plan,), payloads in pack(experiences, ranks, max_tokens, share)]


def _items(plan: RankPlan) -> list[tuple[Bundle, Item]]:
    """Returns each item with its bundle."""
    return [(bundle, item) for bundles in plan.micro_batches for bundle in bundles for item in bundle.items]


# Plans. Payloads are named by strings, as references would be: equal exactly if they are the same.


@st.composite
def _experiences(draw: st.DrawFn, with_reference: bool = False) -> list[Experience]:
    experiences = []
    for g in range(draw(st.integers(1, 5))):
        rollouts: list[Rollout] = []
        for _ in range(draw(st.integers(1, 9))):
            facts = CompletionFacts(draw(st.integers(1, 12)), 0, 0, "stop")
            rollouts.append(Rollout(facts, Verdict.from_reward(1.0)))
        replica = draw(st.integers(0, 3))
        group = Group(g, f"train/{g}", f"payload {g}", draw(st.integers(1, 6)), 0, replica, tuple(rollouts))
        advantages = tuple(100.0 * g + i if draw(st.booleans()) else None for i in range(len(rollouts)))
        experiences.append(Experience(group, advantages, f"reference {g}" if with_reference else None))
    return experiences


def _trained(experiences: list[Experience]) -> list[tuple[Experience, int]]:
    return [(e, i) for e in experiences for i, advantage in enumerate(e.advantages) if advantage is not None]


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60), share=st.booleans())
def test_pack_rollouts_that_are_trained_on_come_out_once_with_their_payload_replica_and_advantage(
    experiences: list[Experience], ranks: int, max_tokens: int, share: bool
) -> None:
    packed = Counter(
        (payloads[bundle.payload], bundle.replica, item.sample, item.advantage, item.num_tokens)
        for plan, payloads in _pack(experiences, ranks, max_tokens, share)
        for bundle, item in _items(plan)
    )
    expected = Counter(
        (e.group.payload, e.group.replica, i, e.advantages[i], e.group.rollouts[i].facts.num_tokens)
        for e, i in _trained(experiences)
    )
    assert packed == expected


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60), share=st.booleans())
def test_pack_normaliser_is_the_trained_completion_tokens_of_the_whole_batch_on_every_rank(
    experiences: list[Experience], ranks: int, max_tokens: int, share: bool
) -> None:
    plans = _pack(experiences, ranks, max_tokens, share)
    tokens = sum(e.group.rollouts[i].facts.num_tokens for e, i in _trained(experiences))
    assert [plan.batch_tokens for plan, _ in plans] == [tokens] * ranks
    assert sum(item.num_tokens for plan, _ in plans for _, item in _items(plan)) == tokens


@given(experiences=_experiences(), ranks=st.integers(1, 4), max_tokens=st.integers(1, 60), share=st.booleans())
def test_pack_micro_batches_are_as_many_on_every_rank_and_within_the_budget(
    experiences: list[Experience], ranks: int, max_tokens: int, share: bool
) -> None:
    plans = _pack(experiences, ranks, max_tokens, share)
    assert len({len(plan.micro_batches) for plan, _ in plans}) == 1
    groups = {e.group.group_id: e.group for e in experiences}
    for plan, payloads in plans:
        for bundles in plan.micro_batches:
            tokens = [
                groups[bundle.group_id].prompt_tokens + sum(item.num_tokens for item in bundle.items)
                for bundle in bundles
            ]
            assert sum(tokens) <= max_tokens or (len(bundles) == 1 and len(bundles[0].items) == 1)
            for bundle in bundles:
                assert payloads[bundle.payload] == groups[bundle.group_id].payload
                assert share or len(bundle.items) == 1


def test_pack_shares_a_prompt_by_its_groups_completions() -> None:
    facts = [CompletionFacts(n, 0, 0, "stop") for n in (3, 5)]
    rollouts = tuple(Rollout(known, Verdict.from_reward(1.0)) for known in facts)
    experience = Experience(Group(7, "train/0", "payload", 10, 0, 2, rollouts), (1.0, -1.0))
    # 10 + 5 + 3 tokens in one micro-batch, where two copies of the prompt would need two.
    [(plan, _)] = _pack([experience], 1, 18, True)
    [[bundle]] = plan.micro_batches
    assert [item.num_tokens for item in bundle.items] == [5, 3]
    assert [item.sample for item in bundle.items] == [1, 0]
    assert (bundle.group_id, bundle.replica) == (7, 2)
    [(plan, _)] = _pack([experience], 1, 18, False)
    assert [len(bundles) for bundles in plan.micro_batches] == [1, 1]


@given(
    experiences=_experiences(with_reference=True),
    ranks=st.integers(1, 4),
    max_tokens=st.integers(1, 60),
    share=st.booleans(),
)
def test_pack_sends_a_rank_each_payload_once_and_none_that_it_does_not_use(
    experiences: list[Experience], ranks: int, max_tokens: int, share: bool
) -> None:
    for plan, payloads in _pack(experiences, ranks, max_tokens, share):
        used = {position for bundle, _ in _items(plan) for position in (bundle.payload, bundle.reference)}
        assert used == set(range(len(payloads)))
        assert len(set(payloads)) == len(payloads)


@given(experiences=_experiences(with_reference=True), ranks=st.integers(1, 4), share=st.booleans())
def test_pack_reference_is_the_groups_and_an_item_the_rollouts_place_in_it(
    experiences: list[Experience], ranks: int, share: bool
) -> None:
    for plan, payloads in _pack(experiences, ranks, 60, share):
        for bundle, item in _items(plan):
            assert bundle.reference is not None
            # The advantages above number the rollouts of a group: 100 · group + place.
            group, place = divmod(int(item.advantage), 100)
            assert (payloads[bundle.reference], item.sample) == (f"reference {group}", place)


@given(experiences=_experiences(), ranks=st.integers(1, 4))
def test_pack_without_kl_has_no_reference(experiences: list[Experience], ranks: int) -> None:
    plans = _pack(experiences, ranks, 60, True)
    assert all(bundle.reference is None for plan, _ in plans for bundle, _ in _items(plan))


def test_pack_updates_take_whole_groups_in_order_and_share_the_payloads() -> None:
    rollouts = (Rollout(CompletionFacts(2, 0, 0, "stop"), Verdict.from_reward(1.0)),)
    # Of four groups, the payloads of two: what an update has in common with one before it is sent once.
    experiences = [Experience(Group(g, f"train/{g}", f"payload {g % 2}", 3, 0, 0, rollouts), (1.0,)) for g in range(4)]
    [(plans, payloads)] = pack(experiences, 1, 100, True, updates=2)
    groups = [[b.group_id for bundles in plan.micro_batches for b in bundles] for plan in plans]
    assert groups == [[0, 1], [2, 3]]
    assert [plan.batch_tokens for plan in plans] == [4, 4]
    assert payloads == ("payload 0", "payload 1")
