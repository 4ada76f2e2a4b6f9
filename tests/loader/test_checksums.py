"""CRC-32s of parts, and the deal of who sums what: held to zlib over the whole, byte by byte."""

from __future__ import annotations

import random
import re
import zlib
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader import CorruptError
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.checksums import RangeSums, crc32, crc32_combine, crc32_joined
from rankload.loader.verify import joint as joint_checks
from rankload.loader.verify.joint import JointCheck, StorageRead


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combined_sums_are_the_whole_ones(first: bytes, second: bytes) -> None:
    assert crc32(first) == zlib.crc32(first)
    assert crc32(second, crc32(first)) == zlib.crc32(first + second)
    assert crc32_combine(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)
    assert crc32_joined([(len(first), crc32(first)), (len(second), crc32(second))]) == zlib.crc32(
        first + second
    )


def disjoint(edges: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise(sorted(set(edges)))][::2]


@given(
    st.lists(st.integers(0, 200), max_size=12), st.lists(st.tuples(st.integers(0, 200), st.integers(1, 90)))
)
def test_sums_of_ranges_whatever_the_order(edges: list[int], reads: list[tuple[int, int]]) -> None:
    data = random.Random(1).randbytes(300)
    ranges = disjoint(edges)
    sums = RangeSums(reversed(ranges))
    for start, length in reads:
        sums.update(start, memoryview(data)[start : start + length])
    seen = {at for start, length in reads for at in range(start, min(start + length, len(data)))}
    missing = list(sums.missing())
    wanted = {at for a, b in ranges for at in range(a, b)}
    assert {at for a, b in missing for at in range(a, b)} == wanted - seen
    if missing:
        with pytest.raises(ValueError, match="have not all been summed"):
            sums.sums()
    for start, stop in missing:
        sums.update(start, memoryview(data)[start:stop])
    assert sums.sums() == [zlib.crc32(data[a:b]) for a, b in ranges]


@st.composite
def jobs(draw: Any) -> tuple[bytes, list[int], list[list[tuple[int, int]] | None]]:
    """A storage, the ranks' nodes, and what each reads of it; None where it reads nothing."""
    data = draw(st.binary(min_size=1, max_size=120))
    nodes = sorted(draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
    edges = st.lists(st.integers(0, len(data)), min_size=2, max_size=8)
    reads = [draw(st.none() | edges.map(disjoint)) for _ in nodes]
    if not any(reads):
        reads[0] = [(0, 1)]
    return data, nodes, [one or None for one in reads]


STORAGE = ("f.pt", "data/0")


def told(data: bytes, reads: list[list[tuple[int, int]] | None], crc: int) -> list[Any]:
    return [
        {}
        if one is None
        else {STORAGE: StorageRead(len(data), crc, tuple(ByteRange(*span) for span in one), ("model/a",))}
        for one in reads
    ]


def summed(shares: list[Any], data: list[bytes]) -> list[Any]:
    return [
        {name: [zlib.crc32(own[a:b]) for a, b in cells] for name, cells in share.items()}
        for share, own in zip(shares, data, strict=True)
    ]


@given(jobs(), st.integers(1, 50))
def test_every_byte_is_summed_where_it_is_read(job: Any, cell: int) -> None:
    data, nodes, reads = job
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_checks, "CELL_BYTES", cell)
        check = JointCheck(told(data, reads, zlib.crc32(data)), nodes)
    shares = check.shares()
    by_node: dict[int, list[int]] = {node: [] for node in nodes}
    for share, node, own in zip(shares, nodes, reads, strict=True):
        assert own is not None or not share
        by_node[node] += [at for a, b in share.get(STORAGE, []) for at in range(a, b)]
    for node, sums in by_node.items():
        assert len(sums) == len(set(sums)), "summed twice on one node"
        read = {
            at
            for each, own in zip(nodes, reads, strict=True)
            if each == node
            for a, b in own or ()
            for at in range(a, b)
        }
        assert read <= set(sums), "read on a node, and not summed there"
    assert {at for sums in by_node.values() for at in sums} == set(range(len(data)))
    assert check.compare(summed(shares, [data] * len(nodes))) == {}


@given(jobs(), st.data())
def test_one_changed_byte_is_found(job: Any, draw: Any) -> None:
    data, nodes, reads = job
    check = JointCheck(told(data, reads, zlib.crc32(data)), nodes)
    shares = check.shares()
    position = draw.draw(st.integers(0, len(data) - 1))
    wrong = bytearray(data)
    wrong[position] ^= 1
    (error,) = check.compare(summed(shares, [bytes(wrong)] * len(nodes))).values()
    assert re.match(r"f\.pt: storage data/0, used by model/a, has CRC-32", str(error))
    # On one node's copy only: found where that node reads the byte.
    for node in set(nodes):
        copies = [bytes(wrong) if each == node else data for each in nodes]
        sums_it = any(
            a <= position < b
            for share, each in zip(shares, nodes, strict=True)
            if each == node
            for a, b in share.get(STORAGE, [])
        )
        found = check.compare(summed(shares, copies))
        assert list(found) == [STORAGE] * sums_it
        assert all("CRC-32" in str(error) for error in found.values())


def test_ranks_that_read_the_same_share_the_work() -> None:
    data = bytes(1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_checks, "CELL_BYTES", 100)
        check = JointCheck(told(data, [[(0, 1000)]] * 4, zlib.crc32(data)), [0, 0, 0, 0])
    sizes = [sum(b - a for a, b in share[STORAGE]) for share in check.shares()]
    assert sum(sizes) == 1000
    assert max(sizes) <= 300


def test_different_files_of_one_name() -> None:
    readings = [{STORAGE: StorageRead(10, crc, (ByteRange(0, 10),))} for crc in (1, 2)]
    with pytest.raises(CorruptError, match="different files of this name"):
        JointCheck(readings, [0, 1])
