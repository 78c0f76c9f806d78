"""Parameters → fixed buckets of bytes, the same on both sides of a transfer.

Promise: sender and receiver, given the same metadata, cut the same buckets; a parameter lies whole in one bucket, its offset a
multiple of 16 bytes so that any dtype can be viewed in place. Imports torch only.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one parameter lies in its bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    entries: tuple[Entry, ...]
    num_bytes: int

    def views(self, buffer: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Returns the parameters as views of `buffer`, [num_bytes] uint8."""
        return [(e.name, buffer[e.start : e.start + e.num_bytes].view(e.dtype).view(e.shape)) for e in self.entries]


def cut_buckets(parameters: Iterable[tuple[str, torch.dtype, Sequence[int]]], bucket_bytes: int) -> list[Bucket]:
    """Returns buckets of at most `bucket_bytes`, in the order given; a larger parameter has one to itself, of just its bytes."""
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    end = 0
    for name, dtype, shape in parameters:
        start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        entry = Entry(name, dtype, tuple(shape), start)
        if entries and start + entry.num_bytes > bucket_bytes:
            buckets.append(Bucket(tuple(entries), end))
            entries, entry = [], Entry(name, dtype, tuple(shape), 0)
        entries.append(entry)
        end = entry.start + entry.num_bytes
    if entries:
        buckets.append(Bucket(tuple(entries), end))
    return buckets
