"""Buckets: whole parameters in their order, aligned, within the limit, and what is written as views is read as views."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from maspo_ray.weight_sync.buckets import cut_buckets

Parameters = list[tuple[str, torch.dtype, tuple[int, ...]]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def _parameters(draw: st.DrawFn) -> Parameters:
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    drawn = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), max_size=12))
    return [(f"p{i}", dtype, shape) for i, (dtype, shape) in enumerate(drawn)]


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch.empty((), dtype=dtype).element_size()


@given(_parameters(), st.integers(1, 600))
def test_cut_keeps_every_parameter_whole_and_in_order(parameters: Parameters, bucket_bytes: int) -> None:
    entries = [entry for bucket in cut_buckets(parameters, bucket_bytes) for entry in bucket.entries]
    assert [(e.name, e.dtype, e.shape) for e in entries] == parameters
    assert [e.num_bytes for e in entries] == [_num_bytes(dtype, shape) for _, dtype, shape in parameters]


@given(_parameters(), st.integers(1, 600))
def test_cut_entries_are_aligned_and_do_not_overlap(parameters: Parameters, bucket_bytes: int) -> None:
    for bucket in cut_buckets(parameters, bucket_bytes):
        end = 0
        for entry in bucket.entries:
            assert entry.start % 16 == 0 and end <= entry.start < end + 16
            end = entry.start + entry.num_bytes
        assert end == bucket.num_bytes


@given(_parameters(), st.integers(1, 600))
def test_cut_bucket_is_over_the_limit_only_with_one_parameter_alone(parameters: Parameters, bucket_bytes: int) -> None:
    for bucket in cut_buckets(parameters, bucket_bytes):
        assert bucket.entries
        assert bucket.num_bytes <= bucket_bytes or len([e for e in bucket.entries if e.num_bytes]) == 1


@given(_parameters(), st.integers(1, 600))
def test_cut_next_parameter_would_not_have_fitted(parameters: Parameters, bucket_bytes: int) -> None:
    buckets = cut_buckets(parameters, bucket_bytes)
    for bucket, following in zip(buckets, buckets[1:], strict=False):
        start = -(-bucket.num_bytes // 16) * 16
        assert start + following.entries[0].num_bytes > bucket_bytes


def test_cut_hand_worked() -> None:
    # 6 bytes; the next 16 begin at 16 and fill the 32; 40 are over the limit and alone; 1 byte begins anew.
    parameters = [
        ("a", torch.bfloat16, (3,)),
        ("b", torch.float32, (2, 2)),
        ("c", torch.float64, (5,)),
        ("d", torch.bool, ()),
    ]
    found = [[(e.name, e.start) for e in bucket.entries] for bucket in cut_buckets(parameters, 32)]
    assert found == [[("a", 0), ("b", 16)], [("c", 0)], [("d", 0)]]
    assert [bucket.num_bytes for bucket in cut_buckets(parameters, 32)] == [32, 40, 1]


def test_cut_nothing_gives_no_bucket() -> None:
    assert cut_buckets([], 32) == []


@given(_parameters(), st.integers(1, 600), st.integers(0, 99))
def test_views_of_mixed_dtypes_carry_the_values_across(parameters: Parameters, bucket_bytes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randint(-90, 90, shape, generator=generator).to(dtype) for name, dtype, shape in parameters}
    received = {}
    # Each side cuts for itself, from the same metadata.
    for sent, bucket in zip(
        cut_buckets(parameters, bucket_bytes), cut_buckets(parameters, bucket_bytes), strict=True
    ):  # fmt: skip
        buffer = torch.full((sent.num_bytes,), 255, dtype=torch.uint8)
        for name, view in sent.views(buffer):
            view.copy_(values[name])
        received |= dict(bucket.views(buffer.clone()))
    assert received.keys() == values.keys()
    for name, value in values.items():
        assert received[name].dtype == value.dtype and received[name].shape == value.shape
        assert torch.equal(received[name], value)


def test_views_share_the_buffers_memory() -> None:
    (bucket,) = cut_buckets([("a", torch.float32, (2,)), ("b", torch.float32, (2,))], 64)
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    dict(bucket.views(buffer))["b"].fill_(1.0)
    # 1.0 in float32 is 0x3f800000, little-endian; "b" begins at byte 16.
    assert buffer[16:24].tolist() == [0, 0, 128, 63] * 2
    assert not buffer[:16].any()
