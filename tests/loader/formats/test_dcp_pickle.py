"""The quick way to read a ``.metadata`` gives what the usual way gives, or leaves the file to that."""

from __future__ import annotations

import pickle
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many_files import write_dcp
from places import DATA
from rankload.loader.errors import RankloadError
from rankload.loader.formats import dcp_metadata
from rankload.loader.formats.dcp_metadata import Metadata, read_metadata
from rankload.loader.formats.dcp_pickle import read_usual
from torch import Size, bfloat16
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import Metadata as TorchMetadata

FOLDERS = ("dcp-fsdp2-w2", "dcp-tp-fsdp-w4", "lightning-mp-w2")
LIMIT = 1 << 30


def taken(data: bytes) -> int:
    """How many entries the quick way takes without an object for each; -1 where it gives up."""
    found = read_usual(bytearray(data), memory_limit=LIMIT)
    return -1 if found is None else sum(len(one.files) for one in found[1].values())


def both_ways(data: bytes, folder: Path) -> tuple[Metadata | str, Metadata | str]:
    """What is read of `data`, or the error: as a load does, and without the quick way."""
    path = folder / ".metadata"
    path.write_bytes(data)
    found: list[Metadata | str] = []
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            try:
                found.append(read_metadata(str(path), name="it"))
            except RankloadError as error:
                found.append(f"{type(error).__name__}: {error.message}")
            patch.setattr(dcp_metadata, "read_usual", lambda *_, **__: None)
    return found[0], found[1]


@pytest.mark.parametrize("name", FOLDERS)
def test_it_reads_what_torch_writes(name: str, tmp_path: Path) -> None:
    data = (DATA / name / "ckpt/.metadata").read_bytes()
    quick, usual = both_ways(data, tmp_path)
    assert quick == usual
    assert isinstance(usual, Metadata)
    # The first entry has the classes' names, so that it is read opcode by opcode.
    assert taken(data) >= len(list(usual.items())) - 2


def test_it_reads_many_chunks_in_all_frames_and_lots(tmp_path: Path) -> None:
    write_dcp(tmp_path / "made", files=8, parameters=300, shards=8, adam=True)
    data = (tmp_path / "made/.metadata").read_bytes()
    assert data.count(b"\x95") > 10
    quick, usual = both_ways(data, tmp_path)
    assert quick == usual
    assert isinstance(quick, Metadata)
    assert taken(data) > 900 * 8 - 10
    # Also of the first tensor, whose first chunk is read opcode by opcode.
    assert len({id(one.division) for one in quick.tensors.values()}) == 1


def numbers(largest: int) -> st.SearchStrategy[int]:
    """Those of each form that a pickle has for them."""
    bounds = [bound for bound in (300, 1 << 17, 1 << 33, 1 << 45) if bound < largest]
    return st.one_of(*(st.integers(0, bound) for bound in (*bounds, largest)))


@st.composite
def metadata(draw: st.DrawFn) -> TorchMetadata:
    """Some tensors of some chunks, whose sizes and names are shared or not, as a save of several ranks has them."""
    entries, storage = {}, {}
    for number in range(draw(st.integers(0, 3))):
        key = draw(st.text(max_size=5)) + str(number)
        dims = draw(st.integers(0, 5))
        largest = 1 << (48 // max(dims, 1))
        chunks = []
        for at in range(draw(st.integers(0, 4))):
            starts = Size([at, *(draw(st.lists(numbers(largest), min_size=dims, max_size=dims)))])
            sizes = Size([1] * (dims + 1))
            chunks.append(ChunkStorageMetadata(starts, starts if draw(st.booleans()) else sizes))
            same = draw(st.booleans())
            index = MetadataIndex(key if same else key + "", starts if same else Size(list(starts)), at)
            storage[index] = _StorageInfo(f"__{at}.distcp", draw(numbers(1 << 60)), draw(numbers(1 << 60)))
        entries[key] = TensorStorageMetadata(
            TensorProperties(dtype=bfloat16), Size([8, *([2 * largest] * dims)]), chunks
        )
    return TorchMetadata(entries, {key: ("model", key) for key in entries}, storage)


@given(made=metadata(), protocol=st.sampled_from([2, 4, 5]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_it_reads_the_same_whatever_the_numbers_and_names(
    made: TorchMetadata, protocol: int, tmp_path: Path
) -> None:
    data = pickle.dumps(made, protocol)
    quick, usual = both_ways(data, tmp_path)
    assert quick == usual
    assert isinstance(usual, Metadata)
    assert protocol == 2 or taken(data) >= 0


def changed(data: bytes, chance: Random) -> bytes:
    """`data` with a byte or two of it another, gone, or doubled."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 2))):
        at = chance.randrange(2, len(made))
        way = chance.randrange(4)
        if way == 0:
            made[at] = chance.randrange(256)
        elif way == 1:
            made[at] = chance.choice(b"\x94hj\x8cKMJ\x8a()}]N\x85\x86t\x81RbuseA\x93.")
        elif way == 2:
            del made[at : at + chance.choice((1, 2, 8))]
        else:
            made[at:at] = made[at : at + chance.choice((1, 5, 40))]
    return bytes(made)


def test_what_was_changed_is_read_alike_or_refused_alike(tmp_path: Path) -> None:
    write_dcp(tmp_path / "made", files=4, parameters=2, shards=2)
    whole = (tmp_path / "made/.metadata").read_bytes()
    start = 2 + (whole[2:3] == b"\x95") * 9
    unframed = whole[:2] + whole[start:]
    chance, known = Random(0), 0
    for _ in range(400):
        data = changed(unframed, chance)
        known += taken(data) >= 0
        quick, usual = both_ways(data, tmp_path)
        assert quick == usual
    assert known > 20


def test_it_makes_no_more_than_the_memory_that_it_may_take() -> None:
    bomb = b"\x80\x04" + b"(" + b"]" * 10_000 + b"1N."
    assert read_usual(bytearray(bomb), memory_limit=1 << 10) is None
    whole = (DATA / "dcp-fsdp2-w2/ckpt/.metadata").read_bytes()
    assert read_usual(bytearray(whole), memory_limit=1 << 10) is None
