"""Samplers: what is drawn how often, that a restored one goes on exactly, and that a draw is cheap."""

import json
from collections import Counter
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.data.samplers import PassRateSampler, UniformSampler, _WeightTree
from maspo_ray.errors import ConfigError


def _draws(sampler: UniformSampler | PassRateSampler, count: int) -> list[int]:
    return [sampler.next() for _ in range(count)]


def test_uniform_order_is_the_same_in_every_process() -> None:
    # Computed once; a saved run depends on it.
    assert _draws(UniformSampler(6, shuffle=True, seed=3), 12) == [1, 2, 5, 0, 3, 4, 5, 2, 0, 1, 3, 4]


# By pass rate.


def _observed(pass_rates: list[float | None], floor: float = 0.05, seed: int = 0) -> PassRateSampler:
    """Returns a sampler past its first pass, told of each prompt's pass rate that is not None."""
    sampler = PassRateSampler(len(pass_rates), shuffle=True, seed=seed, floor=floor)
    _draws(sampler, len(pass_rates))
    for index, rate in enumerate(pass_rates):
        if rate is not None:
            sampler.observe(index, rate)
    return sampler


def test_pass_rate_first_gives_each_prompt_once_in_the_uniform_order_whatever_is_observed() -> None:
    sampler, uniform = PassRateSampler(20, shuffle=True, seed=5), UniformSampler(20, shuffle=True, seed=5)
    drawn = []
    for _ in range(20):
        drawn.append(sampler.next())
        sampler.observe(drawn[-1], 0.5)
    assert drawn == _draws(uniform, 20)


def test_pass_rate_draws_are_in_proportion_to_the_variance_and_the_floor() -> None:
    # p(1 − p) + 0.05: 0.05 for 0 and 1; 0.30 for ½; 0.09 + 0.05 = 0.14 for 0.1; 0.30 for the one of which nothing is known.
    expected = [0.05, 0.05, 0.30, 0.14, 0.30]
    counts = Counter(_draws(_observed([0.0, 1.0, 0.5, 0.1, None]), 20_000))
    for index, weight in enumerate(expected):
        # The standard deviation of a share of 20,000 draws is below 0.0036.
        assert counts[index] / 20_000 == pytest.approx(weight / sum(expected), abs=0.015)


def test_pass_rate_mean_is_exponential() -> None:
    sampler = PassRateSampler(1, shuffle=False, seed=0, decay=0.75)
    # The first is taken as it is; then ¾ · 1 + ¼ · 0 = 0.75, and ¾ · 0.75 + ¼ · 1 = 0.8125.
    for rate, mean in ((1.0, 1.0), (0.0, 0.75), (1.0, 0.8125)):
        sampler.observe(0, rate)
        assert sampler.state()["pass_rates"] == [[0, mean]]


def test_pass_rate_without_decay_keeps_the_latest() -> None:
    sampler = PassRateSampler(1, shuffle=False, seed=0, decay=0.0)
    for rate in (1.0, 0.25):
        sampler.observe(0, rate)
    assert sampler.state()["pass_rates"] == [[0, 0.25]]


_EVENTS = st.lists(st.one_of(st.just(None), st.tuples(st.integers(0, 6), st.floats(0, 1))), max_size=40)


def _play(sampler: PassRateSampler, events: list[Any]) -> list[int]:
    """Draws at each None and observes what else there is; returns the draws."""
    drawn = []
    for event in events:
        if event is None:
            drawn.append(sampler.next())
        else:
            sampler.observe(*event)
    return drawn


@given(before=_EVENTS, other=_EVENTS, after=_EVENTS, seed=st.integers(0, 3), shuffle=st.booleans())
def test_pass_rate_restored_gives_the_same_continuation(
    before: list[Any], other: list[Any], after: list[Any], seed: int, shuffle: bool
) -> None:
    saved, resumed = (PassRateSampler(7, shuffle, seed) for _ in range(2))
    _play(saved, before)
    state = json.loads(json.dumps(saved.state()))
    _play(resumed, other)
    resumed.restore(state)
    assert resumed.state() == saved.state() == state
    after = [*after, *[None] * 10]
    assert _play(resumed, after) == _play(saved, after)


def test_pass_rate_draws_depend_on_the_seed() -> None:
    rates: list[float | None] = [0.5] * 20
    assert _draws(_observed(rates, seed=1), 50) == _draws(_observed(rates, seed=1), 50)
    assert _draws(_observed(rates, seed=1), 50) != _draws(_observed(rates, seed=2), 50)


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        ({"decay": 1.0}, "decay is 1.0; it must be at least 0 and below 1. Set it to 0.5."),
        ({"decay": -0.1}, "decay is -0.1; it must be at least 0 and below 1. Set it to 0.5."),
        ({"decay": float("nan")}, "decay is nan; it must be at least 0 and below 1. Set it to 0.5."),
        ({"floor": 0.0}, "floor is 0.0; it must be above 0. Set it to 0.05."),
        ({"floor": float("inf")}, "floor is inf; it must be above 0. Set it to 0.05."),
    ],
)
def test_pass_rate_argument_out_of_range_is_one_line(args: dict[str, float], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PassRateSampler(3, shuffle=True, seed=0, **args)
    assert str(caught.value) == f"data.sampler.args.{fault}"


def test_pass_rate_draw_and_observation_of_a_million_prompts_take_microseconds() -> None:
    sampler = PassRateSampler(1_000_000, shuffle=False, seed=0)
    sampler.restore({"drawn": 1_000_000, "pass_rates": []})
    started = perf_counter()
    for _ in range(1000):
        sampler.observe(sampler.next(), 0.5)
    # Some 30 µs each, on any machine far from what a pass over a million weights takes.
    assert perf_counter() - started < 1.0


# The tree.


@given(
    weights=st.lists(st.sampled_from([0.0, 0.05, 0.25, 0.3, 1e-9, 7.0]), min_size=1, max_size=20), share=st.floats(0, 1)
)
def test_tree_finds_where_the_weights_before_come_to_the_share_and_never_a_weight_of_0(
    weights: list[float], share: float
) -> None:
    if not any(weights):
        weights[-1] = 0.1
    tree = _WeightTree(weights)
    found = tree.find(share)
    assert 0 <= found < len(weights) and weights[found] > 0
    total = sum(weights)
    assert sum(weights[:found]) <= share * total + 1e-9
    assert sum(weights[: found + 1]) >= share * total - 1e-9


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.01, 3)), min_size=1, max_size=60))
def test_tree_depends_on_the_latest_weights_alone(changes: list[tuple[int, float]]) -> None:
    tree = _WeightTree([0.0] * 5)
    for index, weight in changes:
        tree.set(index, weight)
    latest = dict(changes)
    assert tree._sums == _WeightTree([latest.get(index, 0.0) for index in range(5)])._sums
