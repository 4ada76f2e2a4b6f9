"""Range arithmetic against sets of bytes, and CRC-32 against zlib."""

from __future__ import annotations

import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader import checksums
from rankload.loader.byte_ranges import (
    ByteRange,
    coalesce,
    include,
    overlap,
    split,
    subtract,
    total_bytes,
    union,
    with_gaps,
)

RANGES = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 40)).map(lambda one: ByteRange(one[0], one[0] + one[1])),
    max_size=8,
)


def as_set(ranges: list[ByteRange] | tuple[ByteRange, ...]) -> set[int]:
    return {byte for one in ranges for byte in range(one.start, one.stop)}


def is_tidy(ranges: tuple[ByteRange, ...]) -> bool:
    return all(one.length > 0 for one in ranges) and all(a.stop < b.start for a, b in pairwise(ranges))


@given(RANGES, RANGES)
def test_sets_of_bytes(one: list[ByteRange], other: list[ByteRange]) -> None:
    results = (
        (union(one, other), as_set(one) | as_set(other)),
        (subtract(one, other), as_set(one) - as_set(other)),
        (overlap(one, other), as_set(one) & as_set(other)),
    )
    for ranges, expected in results:
        assert as_set(ranges) == expected
        assert is_tidy(ranges)
        assert total_bytes(ranges) == len(expected)


@given(RANGES, st.integers(0, 30), st.floats(0, 1), st.integers(0, 3))
def test_coalesce_reads_what_is_wanted_and_little_else(
    ranges: list[ByteRange], max_gap: int, max_waste: float, free_gap: int
) -> None:
    joined = coalesce(ranges, max_gap=max_gap, max_waste=max_waste, free_gap=free_gap)
    wanted = as_set(ranges)
    extra = as_set(joined) - wanted
    assert wanted <= as_set(joined)
    assert is_tidy(joined)
    gaps = subtract(joined, ranges)
    free = sum(gap.length for gap in gaps if gap.length <= free_gap)
    assert len(extra) <= max(max_waste * len(wanted), free)
    assert all(gap.length <= max_gap for gap in gaps)
    # Those left open are over a bound themselves.
    open_gaps = [b.start - a.stop for a, b in pairwise(joined)]
    assert all(
        gap > max_gap or (gap > free_gap and len(extra) + gap > int(max_waste * len(wanted)))
        for gap in open_gaps
    )


@given(RANGES, st.integers(0, 30))
def test_gaps_of_a_size_are_added(ranges: list[ByteRange], max_gap: int) -> None:
    joined = with_gaps(ranges, max_gap)
    assert as_set(ranges) <= as_set(joined)
    assert is_tidy(joined)
    assert all(gap.length <= max_gap for gap in subtract(joined, ranges))
    assert all(b.start - a.stop > max_gap for a, b in pairwise(joined))


@given(RANGES)
def test_ranges_included_one_by_one_are_their_union(ranges: list[ByteRange]) -> None:
    held: list[ByteRange] = []
    for start, stop in ranges:
        include(held, start, stop)
        assert is_tidy(held)
    assert tuple(held) == union(ranges)


@given(RANGES, st.integers(2, 24))
def test_chunks_cover_and_keep_to_their_grid(ranges: list[ByteRange], chunk_bytes: int) -> None:
    chunks = split(ranges, chunk_bytes=chunk_bytes)
    whole = union(ranges)
    assert as_set(chunks) == as_set(whole)
    assert sum(one.length for one in chunks) == total_bytes(whole)
    edges = {edge for one in whole for edge in one}
    for chunk in chunks:
        assert chunk.length <= 2 * chunk_bytes
        assert all(edge in edges or edge % chunk_bytes == 0 for edge in chunk)
        assert chunk in whole or chunk.length >= chunk_bytes / 2


def test_no_ranges_of_bytes() -> None:
    for start, stop in ((-1, 3), (5, 4)):
        with pytest.raises(ValueError, match="not a range"):
            union([ByteRange(start, stop)])


@given(st.binary(max_size=200), st.binary(max_size=200), st.integers(0, 3))
def test_crc32_of_parts(first: bytes, second: bytes, blank: int) -> None:
    second += bytes(blank * 1000)
    whole = zlib.crc32(first + second)
    parts = zlib.crc32(first), zlib.crc32(second), len(second)
    assert checksums.crc32(first + second) == whole
    assert checksums.crc32(memoryview(second), checksums.crc32(bytearray(first))) == whole
    assert checksums.crc32_combine(*parts) == whole
    assert checksums._combine(*parts) == whole


def test_crc32_of_huge_parts() -> None:
    assert checksums._combine(1, 2, 3 << 40) == checksums.crc32_combine(1, 2, 3 << 40)
