"""Direct reads: small ranges that come along into the node's file, by the same requests or when they are needed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from file_source import FileSource
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.byte_ranges import ByteRange, union
from rankload.loader.cache.holes import Landed, PartialFile
from rankload.loader.fetch.remote_file import SharedFile
from rankload.loader.ranges.destinations import MemoryDestination, ScatteredDestination
from rankload.loader.ranges.direct import DirectReads, Placement
from rankload.loader.stores.base import ObjectInfo

MIB = 1 << 20
BODY = random.Random(5).randbytes(6 * MIB)
DIRECT = [ByteRange(0, 2 * MIB), ByteRange(2 * MIB + 100, 4 * MIB), ByteRange(4 * MIB + 100, 6 * MIB)]
ALONG = [ByteRange(2 * MIB, 2 * MIB + 100), ByteRange(4 * MIB + 10, 4 * MIB + 90)]


@dataclass
class Node:
    """A node's file with holes, held by its leader, and another rank that reads directly."""

    path: str
    held: PartialFile
    direct: DirectReads
    requests: list[tuple[int, int]] = field(default_factory=list)

    @property
    def landed(self) -> tuple[ByteRange, ...]:
        return Landed(self.path).landed([ByteRange(0, len(BODY))])


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "served").write_bytes(BODY)
    path = str(tmp_path / "node")
    requests: list[tuple[int, int]] = []

    class Counted(FileSource):
        def read_into(self, start, stop, views, arrived=lambda n_bytes: None):  # type: ignore[no-untyped-def]
            requests.append((start, stop))
            super().read_into(start, stop, views, arrived)

    source = Counted(str(tmp_path / "served"), ObjectInfo("served", None))
    direct = DirectReads(
        {path: DIRECT}, lambda _: source, lambda n_bytes: None, along={path: ALONG}, open_file=SharedFile
    )
    return Node(path, PartialFile(path, len(BODY)), direct, requests)


def test_what_lies_between_comes_along_and_lands(node: Node) -> None:
    pieces = [(one.start, memoryview(bytearray(one.length))) for one in DIRECT]
    heard: list[ByteRange] = []
    placement = Placement(pieces, landed=lambda start, stop: heard.append(ByteRange(start, stop)))
    assert node.direct.own(node.path, 0, len(BODY)) == union(DIRECT, ALONG)
    node.direct.place({node.path: placement})
    assert all(view == BODY[start : start + len(view)] for start, view in pieces)
    assert union(heard) == union(DIRECT), "what came along is read, and counted, from the file"
    assert node.landed == tuple(ALONG)
    assert all(
        Path(node.path).read_bytes()[one.start : one.stop] == BODY[one.start : one.stop] for one in ALONG
    )
    assert node.held.missing(ALONG) == ()
    # Cut at the chunks' edges alone, not at what goes elsewhere.
    assert len(node.requests) <= 2, node.requests
    assert node.direct.fetched_bytes[node.path] >= sum(one.length for one in (*DIRECT, *ALONG))
    n_requests = len(node.requests)
    node.direct.bring(node.path, 0, len(BODY))
    assert len(node.requests) == n_requests, "it was there"
    assert node.direct.own(node.path, 0, len(BODY)) == union(DIRECT)
    node.direct.close()
    # The sums on record are right: the next load keeps what landed.
    node.held.close()
    again = PartialFile(node.path, len(BODY))
    assert (again.damaged_bytes, again.missing(ALONG)) == (0, ())
    again.close()


def test_what_is_needed_before_is_brought_alone(node: Node) -> None:
    """No rank waits for what only its own later reads would bring."""
    node.direct.bring(node.path, ALONG[0].start, ALONG[0].start + 1)
    assert node.landed == (ALONG[0],)
    assert sum(stop - start for start, stop in node.requests) == 100
    # A placement of some ranges brings what is beside these.
    for one, there in ((DIRECT[0], ALONG[:1]), (DIRECT[2], ALONG)):
        node.direct.place({node.path: Placement([(one.start, memoryview(bytearray(one.length)))])})
        assert node.landed == tuple(there)
    node.direct.close()


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda two: (min(two), max(two)))))
def test_each_byte_goes_where_it_belongs(spans: list[tuple[int, int]]) -> None:
    data, memory, file = bytes(range(1, 51)), bytearray(50), bytearray(50)
    targets = [MemoryDestination([(0, memoryview(one))]) for one in (memory, file)]
    into = ScatteredDestination(*targets, [ByteRange(*span) for span in spans])
    position = 0
    for view in into.views(0, 50):
        view[:] = data[position : position + len(view)]
        into.take(position, view)
        position += len(view)
    assert position == 50
    held = {at for start, stop in spans for at in range(start, stop)}
    assert list(file) == [at + 1 if at in held else 0 for at in range(50)]
    assert list(memory) == [0 if at in held else at + 1 for at in range(50)]
