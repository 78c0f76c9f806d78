"""The prompt stream: what it draws, that it resumes exactly, and that sources of a mix come by their weights."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.config import DataConfig
from maspo_ray.data.samplers import PassRateSampler, UniformSampler
from maspo_ray.data.stream import PromptStream, train_stream
from maspo_ray.errors import ConfigError, RunError
from maspo_ray.experience import Prompt


def _prompts(count: int, source: str = "") -> list[Prompt]:
    prefix = f"train/{source}/" if source else "train/"
    return [Prompt(f"{prefix}{i}", "a", np.array([i], dtype=np.int32), None, source=source) for i in range(count)]


def _stream(num_prompts: int, shuffle: bool = True, seed: int = 0) -> PromptStream:
    sampler = UniformSampler(num_prompts, shuffle, seed)
    return PromptStream(_prompts(num_prompts), sampler, shuffle=shuffle, seed=seed)


def _drawn(stream: PromptStream, count: int) -> list[str]:
    return [stream.next().prompt.prompt_id for _ in range(count)]


def _as_a_file_has_it(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@given(
    num_prompts=st.integers(1, 12), before=st.integers(0, 40), other=st.integers(0, 40), seed=st.integers(0, 5), shuffle=st.booleans()
)  # fmt: skip
def test_stream_restored_gives_the_same_continuation(
    num_prompts: int, before: int, other: int, seed: int, shuffle: bool
) -> None:
    stream, resumed = _stream(num_prompts, shuffle, seed), _stream(num_prompts, shuffle, seed)
    _drawn(stream, before)
    state = _as_a_file_has_it(stream.state())
    _drawn(resumed, other)
    resumed.restore(state)
    assert resumed.state() == stream.state() == state
    count = 3 * num_prompts
    continued, expected = ([s.next() for _ in range(count)] for s in (resumed, stream))
    # A prompt's ids are an array, which is compared with nothing but itself.
    assert [(draw.index, draw.times_drawn) for draw in continued] == [
        (draw.index, draw.times_drawn) for draw in expected
    ]


@given(num_prompts=st.integers(1, 12), seed=st.integers(0, 5))
def test_stream_every_epoch_gives_each_prompt_once_and_counts_the_times(num_prompts: int, seed: int) -> None:
    stream = _stream(num_prompts, seed=seed)
    for epoch in range(3):
        draws = [stream.next() for _ in range(num_prompts)]
        assert sorted(draw.index for draw in draws) == list(range(num_prompts))
        assert all(draw.prompt.prompt_id == f"train/{draw.index}" for draw in draws)
        assert {draw.times_drawn for draw in draws} == {epoch}


def test_stream_without_shuffle_keeps_the_datas_order() -> None:
    assert _drawn(_stream(3, shuffle=False), 5) == ["train/0", "train/1", "train/2", "train/0", "train/1"]


def test_stream_order_depends_on_seed_and_epoch() -> None:
    def epochs(seed: int) -> Sequence[list[str]]:
        stream = _stream(50, seed=seed)
        return [_drawn(stream, 50), _drawn(stream, 50)]

    assert epochs(1) == epochs(1)
    assert epochs(1)[0] != epochs(1)[1]
    assert epochs(1)[0] != epochs(2)[0]
    # Epochs of one seed are not those of its neighbour, shifted by one.
    assert epochs(1)[1] != epochs(2)[0]


class _Scripted:
    """A sampler that gives what it is told to, and remembers what it was told."""

    def __init__(self, *indices: int) -> None:
        self._indices = list(indices)
        self.observed: list[tuple[int, float]] = []

    def next(self) -> int:
        return self._indices.pop(0)

    def observe(self, index: int, pass_rate: float) -> None:
        self.observed.append((index, pass_rate))

    def state(self) -> dict[str, Any]:
        return {"left": self._indices}

    def restore(self, state: dict[str, Any]) -> None:
        self._indices = list(state["left"])


def test_stream_of_a_sampler_of_ones_own_counts_each_prompts_draws_and_restores_them() -> None:
    sampler = _Scripted(1, 1, 0, 1)
    stream = PromptStream(_prompts(2), sampler, shuffle=False, seed=0)
    assert [(draw.index, draw.times_drawn) for draw in (stream.next(), stream.next())] == [(1, 0), (1, 1)]
    stream.observe(1, 0.25)
    assert sampler.observed == [(1, 0.25)]
    resumed = PromptStream(_prompts(2), _Scripted(), shuffle=False, seed=0)
    resumed.restore(_as_a_file_has_it(stream.state()))
    assert [(draw.index, draw.times_drawn) for draw in (resumed.next(), resumed.next())] == [(0, 0), (1, 2)]


@pytest.mark.parametrize("index", [-1, 2])
def test_stream_index_that_no_prompt_has_is_an_error_that_names_the_sampler(index: int) -> None:
    stream = PromptStream(_prompts(2), _Scripted(index), shuffle=False, seed=0)
    with pytest.raises(RunError) as caught:
        stream.next()
    assert str(caught.value) == (
        f"{__name__}:_Scripted.next gave {index}; there are 2 prompts, counted from 0. Mend the sampler."
    )


def test_stream_restore_of_another_data_set_or_order_is_refused() -> None:
    state = _stream(3, seed=4).state()
    with pytest.raises(ConfigError) as caught:
        _stream(2, seed=4).restore(state)
    assert (
        str(caught.value) == "data.train is 2 prompts; the saved run had 3. Resume with the config it was saved with."
    )
    with pytest.raises(ConfigError, match="^seed is 5; the saved run had 4"):
        _stream(3, seed=5).restore(state)
    with pytest.raises(ConfigError, match="^data.shuffle is False; the saved run had True"):
        _stream(3, shuffle=False, seed=4).restore(state)
    other = PromptStream(_prompts(3), PassRateSampler(3, True, 4), shuffle=True, seed=4)
    with pytest.raises(
        ConfigError,
        match="^data.sampler.path is maspo_ray.data.samplers:PassRateSampler; the saved run had maspo_ray.data.samplers:UniformSampler",
    ):
        other.restore(state)


# A mix of sources.


def _mix(sizes: dict[str, int], weights: dict[str, float], sampler: type = UniformSampler) -> PromptStream:
    sources = {name: {"kind": "reasoning_gym", "task": "gcd"} for name in sizes}
    data = DataConfig.model_validate({"train": {"kind": "mix", "sources": sources, "weights": weights}})
    prompts = {name: _prompts(size, name) for name, size in sizes.items()}
    return train_stream(prompts, data, lambda count: sampler(count, True, 0), 0)


def test_mix_draws_each_source_by_its_weight_however_many_rows_it_has() -> None:
    stream = _mix({"small": 2, "large": 50}, {"small": 3})
    drawn = [stream.next().prompt for _ in range(40)]
    assert Counter(prompt.source for prompt in drawn) == {"small": 30, "large": 10}
    # Within a source its sampler decides: each of the two as often, none of the 50 twice.
    assert Counter(prompt.prompt_id for prompt in drawn if prompt.source == "small") == {
        "train/small/0": 15,
        "train/small/1": 15,
    }
    assert len({prompt.prompt_id for prompt in drawn if prompt.source == "large"}) == 10


@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=6), count=st.integers(1, 60))
def test_mix_no_source_is_ever_a_whole_draw_ahead_of_its_share(weights: list[float], count: int) -> None:
    names = [f"s{i}" for i in range(len(weights))]
    stream = _mix(dict.fromkeys(names, 3), dict(zip(names, weights, strict=True)))
    drawn: Counter[str] = Counter()
    for total in range(1, count + 1):
        drawn[stream.next().prompt.source] += 1
        for name, weight in zip(names, weights, strict=True):
            assert drawn[name] - total * weight / sum(weights) < 1


def test_mix_tells_a_pass_rate_to_the_sampler_of_its_source() -> None:
    made: list[_Scripted] = []
    data = DataConfig.model_validate(
        {"train": {"kind": "mix", "sources": {n: {"kind": "reasoning_gym", "task": "gcd"} for n in ("a", "b")}}}
    )

    def make(count: int) -> _Scripted:
        made.append(_Scripted(count - 1, count))
        return made[-1]

    stream = train_stream({"a": _prompts(2, "a"), "b": _prompts(3, "b")}, data, make, 0)
    assert [stream.next().prompt.prompt_id for _ in range(2)] == ["train/a/1", "train/b/2"]
    for index in range(5):
        stream.observe(index, index / 10)
    assert made[0].observed == [(0, 0.0), (1, 0.1)]
    assert made[1].observed == [(0, 0.2), (1, 0.3), (2, 0.4)]
    with pytest.raises(RunError, match="^_Scripted.next gave 2; its source has 2 prompts, counted from 0. Mend"):
        stream.next()


@given(before=st.integers(0, 60))
def test_mix_restored_gives_the_same_continuation(before: int) -> None:
    sizes = {"a": 3, "b": 5}
    stream, resumed = (_mix(sizes, {"a": 0.4}, PassRateSampler) for _ in range(2))
    for _ in range(before):
        stream.observe(stream.next().index, 0.5)
    resumed.restore(_as_a_file_has_it(stream.state()))
    assert _drawn(resumed, 20) == _drawn(stream, 20)


def test_mix_restore_with_other_weights_is_refused() -> None:
    state = _mix({"a": 3, "b": 5}, {"a": 2}).state()
    with pytest.raises(ConfigError, match="^data.train.sources have .* Resume with the config it was saved with"):
        _mix({"a": 3, "b": 5}, {}).restore(state)
