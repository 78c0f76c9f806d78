"""Ready groups come out oldest first, exactly once."""

from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.experience import CompletionFacts, Experience, Group, Rollout, Verdict
from maspo_ray.groups.buffer import ReadyBuffer


def _experience(group_id: int, *min_versions: int) -> Experience:
    rollouts = tuple(
        Rollout(CompletionFacts(4, version, version + 1, "stop"), Verdict.from_reward(1.0)) for version in min_versions
    )
    group = Group(group_id, f"train/{group_id}", None, 3, min(min_versions), 0, rollouts)
    return Experience(group, advantages=(0.0,) * len(rollouts))


def _filled(*experiences: Experience) -> ReadyBuffer:
    buffer = ReadyBuffer()
    for experience in experiences:
        buffer.put(experience)
    return buffer


def _ids(experiences: list[Experience] | None) -> list[int]:
    assert experiences is not None
    return [experience.group.group_id for experience in experiences]


def test_buffer_take_returns_oldest_version_first_then_lowest_id() -> None:
    buffer = _filled(_experience(3, 1), _experience(9, 0), _experience(2, 1), _experience(1, 2))
    assert _ids(buffer.take(3)) == [9, 2, 3]
    assert len(buffer) == 1


def test_buffer_order_counts_the_oldest_token_of_a_group() -> None:
    # Group 2 was finished by version 4, but one of its completions was begun by version 1.
    buffer = _filled(_experience(1, 2, 2), _experience(2, 4, 1))
    assert _ids(buffer.take(2)) == [2, 1]


def test_buffer_take_with_too_few_returns_none_and_keeps_all() -> None:
    buffer = _filled(_experience(1, 0), _experience(2, 0))
    assert buffer.take(3) is None
    assert len(buffer) == 2
    assert _ids(buffer.take(2)) == [1, 2]


def test_buffer_pop_stale_takes_what_is_older_than_allowed_only() -> None:
    buffer = _filled(_experience(1, 3), _experience(2, 1), _experience(3, 2), _experience(4, 0, 5))
    assert _ids(buffer.pop_stale(oldest_allowed_version=2)) == [4, 2]
    assert _ids(buffer.take(2)) == [3, 1]


def test_buffer_pop_stale_of_fresh_groups_returns_nothing() -> None:
    buffer = _filled(_experience(1, 3))
    assert buffer.pop_stale(oldest_allowed_version=3) == []
    assert len(buffer) == 1


@given(versions=st.lists(st.integers(0, 5), max_size=12), allowed=st.integers(0, 6), count=st.integers(1, 4))
def test_buffer_any_contents_come_out_once(versions: list[int], allowed: int, count: int) -> None:
    buffer = _filled(*(_experience(group_id, version) for group_id, version in enumerate(versions)))
    stale = buffer.pop_stale(allowed)
    taken: list[Experience] = []
    while (batch := buffer.take(count)) is not None:
        taken += batch
    assert all(experience.group.min_version < allowed for experience in stale)
    assert all(experience.group.min_version >= allowed for experience in taken)
    out = _ids(stale + taken)
    assert out == sorted(out, key=lambda group_id: (versions[group_id], group_id))
    assert len(set(out)) == len(out) == len(versions) - len(buffer)
    assert len(buffer) < count
