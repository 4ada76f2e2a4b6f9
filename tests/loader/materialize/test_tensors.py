"""Bytes into memory: any source into any destination, each storage once, each sum compared."""

from __future__ import annotations

import math
import os
import random
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.errors import CorruptError, InternalError, LayoutError, NotFoundError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize import slices, storages
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.staging import STAGING_BYTES
from rankload.loader.materialize.tensors import TensorReader, is_plain, read_tensor
from rankload.loader.ranges.destinations import FirstWrite
from rankload.loader.saved.copies import Copy, Memory, copies_into
from rankload.loader.saved.regions import Laid, Run
from rankload.loader.saved.strided import Box, Layout
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread
from region_cases import SHAPES, Shape, laid, partitions, places, regions
from torch_files import as_bytes, read_whole


def save(tmp_path: Path, **tensors: object) -> dict[str, SavedTensor]:
    torch.save(tensors, tmp_path / "f.pt")
    return read_index(tmp_path / "f.pt").tree


def storage_of(tensor: SavedTensor) -> StorageRef:
    (found,) = tensor.storages
    return found


def memory_of(tensor: torch.Tensor, key: str) -> Memory:
    name = str(tensor.dtype).removeprefix("torch.")
    return Memory(key, name, tuple(tensor.shape), tensor.stride(), is_plain(tensor))


Wanted = tuple[SavedTensor, torch.Tensor, str]


def fill(reader: TensorReader, *wanted: Wanted) -> None:
    """Copies all of each saved tensor into the tensor beside it, all by one call."""
    copies: list[Copy] = []
    memories: dict[str, torch.Tensor] = {}
    for number, (saved, tensor, name) in enumerate(wanted):
        memory = memory_of(tensor, str(number))
        memories[memory.key] = tensor
        copies.extend(copies_into(saved, memory.whole, memory, name=name))
    reader.copy(copies, memories)


CASTS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32])


@given(SHAPES, CASTS, st.sampled_from(["plain", "conjugate", "negative"]), st.data())
@settings(max_examples=150)
def test_any_part_of_any_layout_into_any_layout(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, cast: torch.dtype, view: str, data: st.DataObject
) -> None:
    """A tensor in one piece or several, each laid in any way, into a part of a memory laid in any way."""
    found = [data.draw(laid(region)) for region in data.draw(partitions(shape))]
    size = 1 + max((offset for one in found for _, offset in places(shape, one)), default=0)
    saved = save(tmp_path_factory.mktemp("f"), t=torch.arange(float(size)))["t"]
    pieces = [Piece(one.region, one.offset, one.stride, storage_of(saved)) for one in found]
    tensor = SavedTensor.in_pieces("float32", shape, pieces)
    lies = {at: offset for one in found for at, offset in places(shape, one)}

    into = data.draw(regions(shape).flatmap(laid).filter(written_once))
    count = 1 + max((offset for _, offset in places(shape, into)), default=0)
    room = torch.full((3 + count,), -1.0, dtype=cast)
    if view != "plain":
        room = torch.full((3 + count,), -1.0 - 1.0j, dtype=torch.complex64).conj()
    if view == "negative":
        room = room.imag
        into = Laid(into.region, 2 * into.offset, tuple(2 * step for step in into.stride))
    destination = room[3:]
    before = room.clone()
    memory = memory_of(destination, "room")
    assert memory.plain == (view == "plain")
    TensorReader().copy(list(copies_into(tensor, into, memory, name="t")), {"room": destination})
    for at, offset in places(shape, into):
        before[3 + offset // (2 if view == "negative" else 1)] = lies[at]
    assert torch.equal(room, before)


@pytest.fixture
def tiny_segments(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Storages are cut for several threads wherever they can be; how many segments each reading had."""
    run_jobs, seen = storages.run_jobs, []

    def counted(jobs: Sequence[Any], *arguments: Any, **named: Any) -> None:
        seen.append(len(jobs))
        run_jobs(jobs, *arguments, **named)

    monkeypatch.setattr(storages, "run_jobs", counted)
    monkeypatch.setattr(slices, "SEGMENT_BYTES", 24)
    monkeypatch.setattr(storages, "_PARALLEL_BYTES", 1)
    monkeypatch.setattr(storages, "SMALL_BYTES", 8)
    return seen


@given(SHAPES, CASTS, st.sampled_from(["during", "off", "shared"]), st.data())
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_threads_read_what_one_does(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_segments: list[int],
    shape: Shape,
    cast: torch.dtype,
    verify: str,
    data: st.DataObject,
) -> None:
    """Some of the tensors read into their places and some cast; the storage summed whole, or by several ranks."""
    tiny_segments.clear()
    found = [data.draw(laid(region)) for region in data.draw(partitions(shape))]
    size = 10 + max((offset for one in found for _, offset in places(shape, one)), default=0)
    saved = save(tmp_path_factory.mktemp("f"), t=torch.arange(float(size)))["t"]
    storage = storage_of(saved)
    pieces = [Piece(one.region, one.offset, one.stride, storage) for one in found]
    tensor = SavedTensor.in_pieces("float32", shape, pieces)
    read: list[int] = []
    callers: set[int] = set()

    def on_bytes(n_bytes: int) -> None:
        callers.add(threading.get_ident())
        read.append(n_bytes)

    wanted = [
        (saved, torch.zeros(size), "straight"),
        (saved, torch.zeros(size, dtype=cast), "cast"),
        (tensor, torch.zeros(shape), "t"),
    ]
    reader = TensorReader(verify="off" if verify == "off" else "during", on_bytes=on_bytes, n_threads=3)
    if verify == "shared":
        reader.share({storage: [ByteRange(0, 24), ByteRange(24, storage.nbytes)]})
    fill(reader, *wanted)
    assert tiny_segments == [-(-storage.nbytes // 24)]
    again = [(source, torch.zeros_like(into), name) for source, into, name in wanted]
    fill(TensorReader(), *again)
    for (_, got, name), (_, want, _) in zip(wanted, again, strict=True):
        assert torch.equal(got, want), name
    assert torch.equal(wanted[0][1], torch.arange(float(size)))
    assert callers == {threading.get_ident()}
    assert sum(read) >= 2 * storage.nbytes
    if verify == "shared":
        whole = Path(storage.file).read_bytes()[storage.offset : storage.offset + storage.nbytes]
        assert reader.finish_shares() == {storage: [zlib.crc32(whole[:24]), zlib.crc32(whole[24:])]}


def test_several_threads_tell_damage_as_one_does(tmp_path: Path, tiny_segments: list[int]) -> None:
    """What is damaged in any segment, is short, or is gone; other storages are whole, and only they were restored."""
    tensors = {name: torch.arange(1000.0) + at for at, name in enumerate("abcd")}
    saved = save(tmp_path, **tensors)
    path = tmp_path / "f.pt"
    flip(path, storage_of(saved["c"]).offset + 3000)
    with pytest.raises(CorruptError, match=r"storage data/2 has CRC-32 .*; the file's directory says"):
        TensorReader(verify="before", n_threads=3).verify([storage_of(one) for one in saved.values()])
    with pytest.raises(CorruptError, match=r"storage data/2, used by model/c, has CRC-32"):
        fill(
            TensorReader(n_threads=3), *((saved[name], torch.zeros(1000), f"model/{name}") for name in "abcd")
        )
    flip(path, storage_of(saved["c"]).offset + 3000)
    os.truncate(path, storage_of(saved["d"]).offset + 100)
    into = {name: torch.zeros(1000) for name in "abcd"}
    with pytest.raises(CorruptError, match="model/d, ends after 100 of 4,000 bytes"):
        fill(TensorReader(n_threads=3), *((saved[name], into[name], f"model/{name}") for name in "abcd"))
    assert torch.equal(into["c"], tensors["c"])
    path.unlink()
    with pytest.raises(NotFoundError, match="gone"):
        fill(TensorReader(n_threads=3), *((saved[name], into[name], name) for name in "abcd"))


def test_what_fails_in_a_thread_ends_all(tmp_path: Path, tiny_segments: list[int]) -> None:
    """A first change that may not be made any more, and a failure of another rank, as `on_bytes` raises it."""
    saved = save(tmp_path, a=torch.arange(3000.0), b=torch.ones(3000))
    into = {"0": torch.zeros(3000), "1": torch.zeros(3000)}
    copies = [
        copy
        for key, name in (("0", "a"), ("1", "b"))
        for copy in copies_into(
            saved[name], memory_of(into[key], key).whole, memory_of(into[key], key), name=name
        )
    ]

    def refuse() -> None:
        raise NotFoundError("another rank has failed")

    noted = dict.fromkeys(into, FirstWrite(refuse))
    with pytest.raises(NotFoundError, match="another rank has failed"):
        TensorReader(n_threads=3).copy(copies, into, noted)
    assert not into["0"].any()
    assert not into["1"].any()

    def stalled(n_bytes: int) -> None:
        raise RuntimeError("another rank is gone")

    with pytest.raises(RuntimeError, match="another rank is gone"):
        TensorReader(on_bytes=stalled, n_threads=3).copy(copies, into)


def written_once(one: Laid) -> bool:
    sizes = one.region.sizes if isinstance(one.region, Box) else (one.region.length,)
    return not any(size > 1 and not step for size, step in zip(sizes, one.stride, strict=True))


def test_equal_dtypes_are_read_straight_into_place(tmp_path: Path) -> None:
    saved = save(tmp_path, t=torch.arange(10.0))["t"]
    parameter = torch.nn.Parameter(torch.zeros(2, 5))
    before = parameter.data_ptr()
    memory = Memory("p", "float32", (2, 5), (5, 1), plain=True)
    TensorReader().copy(
        list(copies_into(saved, Laid(Run(0, 10), 0, (1,)), memory, name="t")), {"p": parameter}
    )
    assert parameter.data_ptr() == before
    assert parameter.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert parameter.requires_grad


def test_larger_than_the_buffer(tmp_path: Path) -> None:
    count = STAGING_BYTES // 4 * 2 + 12345
    big = torch.randn(count)
    wide = torch.randn(1100, 2100).t()
    tree = save(tmp_path, big=big, wide=wide, half=big.half())
    straight, cast, moved, up = (
        torch.empty(count),
        torch.empty(count, dtype=torch.bfloat16),
        torch.empty(2100, 1100),
        torch.empty(count),
    )
    read = []
    fill(
        TensorReader(on_bytes=read.append),
        (tree["big"], straight, "big"),
        (tree["big"], cast, "cast"),
        (tree["wide"], moved, "wide"),
        (tree["half"], up, "half"),
    )
    assert torch.equal(straight, big)
    assert torch.equal(cast, big.to(torch.bfloat16))
    assert torch.equal(moved, wide)
    assert torch.equal(up, big.half().float())
    assert max(read) <= STAGING_BYTES
    # "big" was wanted twice, the rest once.
    assert sum(read) == 2 * big.nbytes + wide.nbytes + up.nbytes // 2


def test_bytes_between_are_read_only_to_be_summed(tmp_path: Path) -> None:
    base = torch.arange(1_000_000.0)
    tree = save(tmp_path, a=base[10:20], b=base[-5:], whole=base)
    for verify, expected in (("during", base.nbytes), ("off", 60)):
        read = []
        a, b = torch.empty(10), torch.empty(5)
        reader = TensorReader(verify=verify, on_bytes=read.append)
        fill(reader, (tree["b"], b, "b"), (tree["a"], a, "a"))
        assert sum(read) == expected
        assert torch.equal(a, base[10:20])
        assert torch.equal(b, base[-5:])
        fill(reader, (tree["b"], b, "b"))
        # Once found to be right, a storage is not summed again.
        assert sum(read) == expected + 20


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_byte_is_told_with_file_record_and_tensor(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    tree = save(tmp_path, a=base[:10], other=torch.ones(3))
    path = tmp_path / "f.pt"
    saved = tree["a"]
    flip(path, storage_of(saved).offset + 3000)
    destination = torch.empty(10)
    with pytest.raises(CorruptError) as caught:
        fill(TensorReader(), (saved, destination, "model/a"))
    message = str(caught.value)
    for part in (str(path), "data/0", "model/a", f"{storage_of(saved).crc32:08x}"):
        assert part in message
    with pytest.raises(CorruptError, match="data/0"):
        TensorReader(verify="before").verify([storage_of(saved)])
    fill(TensorReader(verify="off"), (saved, destination, "model/a"))
    assert torch.equal(destination, base[:10])
    fill(TensorReader(), (tree["other"], torch.empty(3), "other"))


def test_small_storages_beside_each_other_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are; a large one between them, and bytes far from all others, by themselves."""
    tensors = {f"small{n}": torch.full((50,), float(n)) for n in range(200)}
    tensors["large"] = torch.arange(60_000.0)
    tensors |= {f"strided{n}": torch.arange(60.0).reshape(6, 10).t() for n in range(200)}
    saved = save(tmp_path, **tensors)
    reads = {"pread": 0, "preadv": 0}

    def counted(name: str, read: Callable[..., object]) -> Callable[..., object]:
        def count(*arguments: object) -> object:
            reads[name] += 1
            return read(*arguments)

        return count

    for name in reads:
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    into["strided7"] = torch.zeros(10, 6, dtype=torch.float64)
    fill(TensorReader(), *((saved[name], into[name], name) for name in tensors))
    assert all(torch.equal(into[name].float(), tensor) for name, tensor in tensors.items())
    assert reads == {"pread": 2, "preadv": 1}


def test_damage_among_neighbours_is_told(tmp_path: Path) -> None:
    tensors = {f"small{n}": torch.full((50,), float(n)) for n in range(20)}
    saved = save(tmp_path, **tensors)
    flip(tmp_path / "f.pt", storage_of(saved["small11"]).offset + 5)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(
        CorruptError, match=r"storage data/11, used by small11, has CRC-32 .* the file's directory"
    ):
        fill(TensorReader(), *((saved[name], into[name], name) for name in tensors))
    assert torch.equal(into["small10"], tensors["small10"])
    os.truncate(tmp_path / "f.pt", storage_of(saved["small11"]).offset + 100)
    with pytest.raises(CorruptError, match="small11, ends after 100 of 200 bytes"):
        fill(TensorReader(verify="off"), *((saved[name], into[name], name) for name in tensors))


def test_verified_before_is_not_summed_again(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    saved = save(tmp_path, a=base[:10])["a"]
    read = []
    reader = TensorReader(verify="before", on_bytes=read.append)
    reader.verify([storage_of(saved)])
    assert sum(read) == 4000
    fill(reader, (saved, torch.empty(10), "a"))
    assert sum(read) == 4040
    fresh = TensorReader(verify="before")
    flip(tmp_path / "f.pt", storage_of(saved).offset + 3000)
    with pytest.raises(CorruptError):
        fill(fresh, (saved, torch.empty(10), "a"))


def test_a_file_that_shrinks_or_goes(tmp_path: Path) -> None:
    saved = save(tmp_path, a=torch.arange(1000.0))["a"]
    path = tmp_path / "f.pt"
    os.truncate(path, storage_of(saved).offset + 100)
    for verify in ("during", "off"):
        with pytest.raises(CorruptError, match="truncated since"):
            fill(TensorReader(verify=verify), (saved, torch.empty(1000), "a"))
    path.unlink()
    with pytest.raises(NotFoundError, match="gone"):
        fill(TensorReader(), (saved, torch.empty(1000), "a"))


def test_memory_that_is_not_as_planned(tmp_path: Path) -> None:
    saved = save(tmp_path, a=torch.arange(12.0))["a"]
    memory = Memory("model/a", "float32", (3, 4), (4, 1), plain=True)
    copies = list(copies_into(saved, Laid(Run(0, 12), 0, (1,)), memory, name="a"))
    for wrong in (
        {},
        {"model/b": torch.empty(3, 4)},
        {"model/a": torch.empty(4, 3)},
        {"model/a": torch.empty(12)},
        {"model/a": torch.empty(4, 3).t()},
        {"model/a": torch.empty(3, 4, dtype=torch.float64)},
        {"model/a": torch.empty(3, 4, device="meta")},
    ):
        with pytest.raises(
            InternalError, match=r"the memory for model/a is .*planned was float32, shape \(3, 4\)"
        ):
            TensorReader().copy(copies, wrong)
    # Where there is one element in a dimension, its step says nothing.
    memory = Memory("a", "float32", (1, 12), (77, 1), plain=True)
    room = torch.zeros(1, 12)
    TensorReader().copy(list(copies_into(saved, Laid(Run(0, 12), 0, (1,)), memory, name="a")), {"a": room})
    assert room.tolist() == [list(range(12))]
    TensorReader().copy([], {})


def test_one_memory_filled_by_many_copies_of_several_files(tmp_path: Path) -> None:
    files = []
    for number in range(3):
        torch.save(torch.arange(100.0) + 100 * number, tmp_path / f"{number}.pt")
        files.append(read_index(tmp_path / f"{number}.pt").storages[0])
    tensor = SavedTensor.in_pieces(
        "float32", (300,), [Piece(Run(100 * n, 100), 0, (1,), file) for n, file in enumerate(files)]
    )
    read: list[int] = []
    room = torch.zeros(50, dtype=torch.float64)
    memory = memory_of(room, "room")
    copies = list(
        copies_into(
            tensor, Laid(Run(80, 150), 10, (1,)), Memory("x", "float32", (160,), (1,), True), name="t"
        )
    )
    whole = torch.zeros(160)
    TensorReader(verify="off", on_bytes=read.append).copy(copies, {"x": whole})
    assert whole.tolist() == [0.0] * 10 + [float(n) for n in range(80, 230)]
    assert sum(read) == 600
    # The same into another dtype, every other element.
    copies = list(copies_into(tensor, Laid(Run(90, 25), 0, (2,)), memory, name="t"))
    TensorReader().copy(copies, {"room": room})
    assert room.reshape(25, 2).tolist() == [[float(n), 0.0] for n in range(90, 115)]


def test_copies_side_by_side_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file and in one memory, whatever their shapes; not over a gap, nor what is cast into what is not."""
    values = torch.arange(60_000.0)
    saved = save(tmp_path, t=values)["t"]
    storage = storage_of(saved)
    reads: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda *given: reads.append(given[2] - storage.offset) or preadv(*given)
    )
    flat, other, halves = torch.zeros(60_000), torch.zeros(60_000), torch.zeros(60_000, dtype=torch.float16)
    memories = {name: memory_of(into, name) for name, into in (("a", flat), ("b", other), ("c", halves))}

    def copy(key: str, first: int, shape: tuple[int, ...], at: int) -> Copy:
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return Copy(
            "t", storage, "float32", Layout(shape, stride, first), memories[key], Layout(shape, stride, at)
        )

    copies = [
        *(copy("a", 100 * n, (10, 10) if n % 2 else (100,), 100 * n) for n in range(200)),
        copy("a", 20_100, (100,), 20_100),  # after a gap
        copy("a", 20_200, (100,), 30_000),  # elsewhere
        copy("b", 20_300, (100,), 30_100),  # in another memory
        *(copy("c", 40_000 + 100 * n, (100,), 100 * n) for n in range(10)),
        Copy(
            "t", storage, "float32", Layout((50,), (2,), 50_000), memories["a"], Layout((50,), (1,), 50_000)
        ),
    ]
    TensorReader(verify="off").copy(copies, {"a": flat, "b": other, "c": halves})
    assert reads == [4 * first for first in (0, 20_100, 20_200, 20_300, 40_000, 50_000)]
    want = torch.zeros(60_000)
    want[:20_000], want[20_100:20_200], want[30_000:30_100] = (
        values[:20_000],
        values[20_100:20_200],
        values[20_200:20_300],
    )
    want[50_000:50_050] = values[50_000:50_100:2]
    assert torch.equal(flat, want)
    assert torch.equal(other[30_100:30_200], values[20_300:20_400])
    assert torch.equal(halves[:1000], values[40_000:41_000].half())
    assert not halves[1000:].any()


def test_parts_of_one_tensor_are_filled_by_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine's parameters are parts of its flat tensor; not where another part's change is noted, nor into
    another tensor, another dtype or past a gap."""
    values = torch.arange(60.0)
    saved = save(tmp_path, t=values)["t"]
    storage = storage_of(saved)
    reads: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda *given: reads.append((given[2] - storage.offset) // 4) or preadv(*given)
    )
    flat, apart = torch.full((44,), -1.0), torch.full((10,), -1.0)
    # The first copy fills the second half of a view that has as many elements as are read at once.
    parts = [flat[0:20], flat[20:26].view(2, 3), flat[26:30], flat[30:34], flat[36:40], apart[:4], apart[4:5]]
    parts.append(apart[5:9].view(torch.int32))
    memories = {str(at): part for at, part in enumerate(parts)}
    planned = {key: memory_of(part, key) for key, part in memories.items()}

    def copy(key: str, first: int, count: int, at: int = 0) -> Copy:
        source, target = Layout((count,), (1,), first), Layout((count,), (1,), at)
        return Copy("t", storage, "float32", source, planned[key], target)

    copies = [copy("0", 0, 10, 10), copy("1", 10, 6), copy("2", 16, 4), copy("3", 20, 4), copy("4", 24, 4)]
    copies += [copy("5", 28, 4), copy("6", 32, 1), copy("7", 33, 4)]
    notes: list[str] = []
    one, other = FirstWrite(lambda: notes.append("one")), FirstWrite(lambda: notes.append("other"))
    noted = {**dict.fromkeys("012", one), **dict.fromkeys("34567", other)}
    TensorReader(verify="off").copy(copies, memories, noted)
    assert reads == [0, 20, 24, 28, 33]
    assert notes == ["one", "other"]
    assert flat.tolist() == [
        *[-1.0] * 10, *range(24), -1.0, -1.0, *range(24, 28), *[-1.0] * 4
    ]  # fmt: skip
    assert apart.tolist()[:5] == list(range(28, 33))
    assert parts[7].tolist() == list(range(33, 37))


def test_read_tensor(tmp_path: Path) -> None:
    expanded = torch.arange(3.0).expand(1000, 3)
    saved = {
        "t": torch.randn(4, 5).t(),
        "e": expanded,
        "g": torch.ones(2, requires_grad=True),
        "z": torch.empty(0, 3),
        "s": torch.tensor(3),
    }
    tree = save(tmp_path, **saved)
    for name, want in saved.items():
        got = read_tensor(tree[name])
        assert torch.equal(got, want)
        assert got.requires_grad == want.requires_grad
    assert read_tensor(tree["e"]).untyped_storage().nbytes() == 12


@given(SHAPES, st.data())
@settings(max_examples=60)
def test_read_tensor_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, shape: Shape, data: st.DataObject
) -> None:
    found = [data.draw(laid(region)) for region in data.draw(partitions(shape))]
    lies = {at: offset for one in found for at, offset in places(shape, one)}
    flat = save(tmp_path_factory.mktemp("f"), t=torch.arange(1.0 + max(lies.values(), default=0)))["t"]
    pieces = [Piece(one.region, one.offset, one.stride, storage_of(flat)) for one in found]
    got = read_tensor(SavedTensor.in_pieces("float32", shape, pieces))
    want = torch.tensor([float(lies[at]) for at in range(math.prod(shape))]).reshape(shape)
    assert torch.equal(got, want)
    assert got.untyped_storage().nbytes() <= want.nbytes


def test_read_tensor_of_what_was_not_read() -> None:
    unread = Piece(Run(0, 2), 0, (1,), Unread("lies in the files of saved rank 1, which were not read"))
    with pytest.raises(LayoutError, match="x lies in the files of saved rank 1"):
        read_tensor(SavedTensor("float32", (2,), (unread,)), name="x")
    # An empty one takes no file.
    assert read_tensor(SavedTensor("int8", (0, 2), (unread,))).shape == (0, 2)


def test_an_expanded_tensor_takes_no_more_than_the_file(tmp_path: Path) -> None:
    tree = save(tmp_path, huge=torch.ones(1).expand(1 << 40))
    assert read_tensor(tree["huge"]).numel() == 1 << 40
    assert read_whole(tmp_path / "f.pt")["huge"].shape == (1 << 40,)


def test_storages_of_bytes_seen_as_any_dtype(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)
    (tmp_path / "f").write_bytes(bytes(37) + raw.tobytes())
    storage = StorageRef(str(tmp_path / "f"), "0", 37, 4096, None)
    tree = {}
    for dtype, stride, offset in (
        ("uint8", (1,), 4093),
        ("uint8", (3,), 1),
        ("bool", (1,), 7),
        ("int8", (1,), 33),
        ("bfloat16", (1,), 3),
        ("float32", (1,), 1),
        ("int64", (2,), 3),
        ("complex128", (1,), 253),
        ("float64", (), 511),
    ):
        shape = (3,) * len(stride)
        tree[f"{dtype}@{offset}"] = SavedTensor.in_storage(storage, dtype, shape, stride, offset)
    real = materialize(tree, reader=TensorReader())
    for name, saved in tree.items():
        dtype = getattr(torch, saved.dtype)
        piece = saved.whole
        assert piece is not None
        want = torch.from_numpy(raw.copy()).view(dtype).as_strided(saved.shape, piece.stride, piece.offset)
        for got in (read_tensor(saved), real[name]):
            assert got.dtype == dtype
            assert as_bytes(got) == as_bytes(want)
        into = torch.zeros(saved.shape, dtype=torch.float64 if not dtype.is_complex else torch.complex64)
        fill(TensorReader(), (saved, into, name))
        np.testing.assert_array_equal(into.numpy(), want.to(into.dtype).numpy())


def test_tensors_without_elements_and_without_dimensions(tmp_path: Path) -> None:
    want = {
        "none": torch.empty(0),
        "flat": torch.empty(3, 0, 2),
        "number": torch.tensor(3.5),
        "one": torch.ones(1, 1),
    }
    tree = save(tmp_path, **want)
    assert storage_of(tree["none"]).nbytes == 0
    for name, tensor in want.items():
        into = torch.full(tensor.shape, 7, dtype=torch.int64)
        fill(TensorReader(), (tree[name], into, name))
        assert torch.equal(into, tensor.to(torch.int64))
        assert torch.equal(read_tensor(tree[name]), tensor)


def test_other_devices_are_copied_to(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator here")
    base = torch.randn(700, 3000)
    tree = save(tmp_path, t=base, v=base.t())
    for saved, want in ((tree["t"], base), (tree["v"], base.t())):
        for dtype in (torch.float32, torch.float16):
            there = torch.empty(want.shape, device="cuda", dtype=dtype)
            fill(TensorReader(), (saved, there, "t"))
            assert torch.equal(there.cpu(), want.to(dtype))
    assert torch.equal(read_tensor(tree["v"], device="cuda").cpu(), base.t())
    got = materialize(tree, reader=TensorReader(), device="cuda")
    assert torch.equal(got["v"].cpu(), base.t())


def test_all_of_a_saved_tensors_bytes(tmp_path: Path) -> None:
    random.seed(0)
    for dtype in (torch.bool, torch.uint16, torch.complex128, torch.float8_e5m2):
        want = torch.randint(0, 2, (32,), dtype=torch.uint8).view(
            torch.bool if dtype is torch.bool else dtype
        )
        saved = save(tmp_path, t=want)["t"]
        assert isinstance(saved, SavedTensor)
        assert as_bytes(read_tensor(saved)) == as_bytes(want)
