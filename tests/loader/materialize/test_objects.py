"""Bytes into memory: any source into any destination, each storage once, each sum compared."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, NotFoundError, OptionError, UnsafeError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.objects import materialize
from rankload.loader.materialize.safe_types import require_safe
from rankload.loader.materialize.storages import STAGING_BYTES
from rankload.loader.materialize.tensors import CopyRequest, TensorReader, read_tensor
from rankload.loader.saved.strided import Layout, bounded_boxes, row_major_boxes
from rankload.loader.saved.tree import find_unknown
from rankload.loader.saved.values import LazyTensor
from torch_files import as_bytes, read_whole


def save(tmp_path: Path, **tensors: object) -> dict:
    torch.save(tensors, tmp_path / "f.pt")
    return read_index(tmp_path / "f.pt").tree


@given(
    shape=st.lists(st.integers(1, 6), max_size=4),
    order=st.randoms(use_true_random=False),
    cast=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int32]),
    to_order=st.randoms(use_true_random=False),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    flat=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_part_of_any_layout_into_any_layout(
    tmp_path_factory, shape, order, cast, to_order, cut, flat
) -> None:
    folder = tmp_path_factory.mktemp("f")
    dims = list(range(len(shape)))
    order.shuffle(dims)
    source = torch.arange(float(torch.Size(shape).numel()) + 9)[5 : 5 + torch.Size(shape).numel()]
    source = source.reshape(shape).permute(dims)
    lazy = save(folder, t=source)["t"]
    assert lazy.stride == source.stride()
    count = source.numel()
    start = int(cut[0] * count) if flat else 0
    length = int(cut[1] * (count - start)) if flat else count
    if flat:
        destination = torch.full((2 * length + 1,), -1.0, dtype=cast)[: 2 * length : 2]
    else:
        to_dims = list(range(len(shape)))
        to_order.shuffle(to_dims)
        back = [to_dims.index(d) for d in range(len(shape))]
        sizes = [source.shape[d] for d in to_dims]
        destination = torch.full(sizes, -1.0, dtype=cast).permute(back)
        assert destination.shape == source.shape
    TensorReader().copy([CopyRequest(lazy, destination, "t", start, length)])
    want = source.reshape(-1)[start : start + length].to(cast).view(destination.shape)
    assert torch.equal(destination, want)


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_cover_each_element_once_and_in_order(shape, data) -> None:
    total = torch.Size(shape).numel()
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = torch.arange(total).reshape(shape)
    got = []
    for box in row_major_boxes(tuple(shape), start, stop):
        part = numbers
        for dim, (first, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
            part = part.narrow(dim, first, size)
        got += part.reshape(-1).tolist()
    assert got == list(range(start, stop))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=4), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_bounded_boxes_cover_a_layout(dims, limit) -> None:
    layout = Layout(tuple(size for size, _ in dims), tuple(step for _, step in dims), 3)
    seen = torch.zeros(layout.shape, dtype=torch.int64)
    for box in bounded_boxes(layout, limit):
        assert layout.part(box).span <= limit
        part = seen
        for dim, (first, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
            part = part.narrow(dim, first, size)
        part += 1
    assert seen.eq(1).all()


def test_equal_dtypes_are_read_straight_into_place(tmp_path: Path) -> None:
    lazy = save(tmp_path, t=torch.arange(10.0))["t"]
    parameter = torch.nn.Parameter(torch.zeros(2, 5))
    before = parameter.data_ptr()
    TensorReader().copy([CopyRequest(lazy, parameter, "t")])
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
    TensorReader(on_bytes=read.append).copy(
        [
            CopyRequest(tree["big"], straight, "big"),
            CopyRequest(tree["big"], cast, "cast"),
            CopyRequest(tree["wide"], moved, "wide"),
            CopyRequest(tree["half"], up, "half"),
        ]
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
        reader.copy([CopyRequest(tree["b"], b, "b"), CopyRequest(tree["a"], a, "a")])
        assert sum(read) == expected
        assert torch.equal(a, base[10:20])
        assert torch.equal(b, base[-5:])
        reader.copy([CopyRequest(tree["b"], b, "b")])
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
    lazy = tree["a"]
    flip(path, lazy.storage.offset + 3000)
    destination = torch.empty(10)
    with pytest.raises(CorruptError) as caught:
        TensorReader().copy([CopyRequest(lazy, destination, "model/a")])
    message = str(caught.value)
    for part in (str(path), "data/0", "model/a", f"{lazy.storage.crc32:08x}"):
        assert part in message
    with pytest.raises(CorruptError, match="data/0"):
        TensorReader(verify="before").verify([lazy.storage])
    TensorReader(verify="off").copy([CopyRequest(lazy, destination, "model/a")])
    assert torch.equal(destination, base[:10])
    TensorReader().copy([CopyRequest(tree["other"], torch.empty(3), "other")])


def test_verified_before_is_not_summed_again(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    lazy = save(tmp_path, a=base[:10])["a"]
    read = []
    reader = TensorReader(verify="before", on_bytes=read.append)
    reader.verify([lazy.storage])
    assert sum(read) == 4000
    reader.copy([CopyRequest(lazy, torch.empty(10), "a")])
    assert sum(read) == 4040
    fresh = TensorReader(verify="before")
    flip(tmp_path / "f.pt", lazy.storage.offset + 3000)
    with pytest.raises(CorruptError):
        fresh.copy([CopyRequest(lazy, torch.empty(10), "a")])


def test_a_file_that_shrinks_or_goes(tmp_path: Path) -> None:
    lazy = save(tmp_path, a=torch.arange(1000.0))["a"]
    path = tmp_path / "f.pt"
    os.truncate(path, lazy.storage.offset + 100)
    for verify in ("during", "off"):
        with pytest.raises(CorruptError, match="truncated since"):
            TensorReader(verify=verify).copy([CopyRequest(lazy, torch.empty(1000), "a")])
    path.unlink()
    with pytest.raises(NotFoundError, match="gone"):
        TensorReader().copy([CopyRequest(lazy, torch.empty(1000), "a")])


def test_requests_that_do_not_fit(tmp_path: Path) -> None:
    lazy = save(tmp_path, a=torch.arange(10.0))["a"]
    for arguments in (
        (torch.empty(9), "a"),
        (torch.empty(3), "a", 8, 3),
        (torch.empty(10, device="meta"), "a"),
    ):
        with pytest.raises(ValueError, match=r"^a:"):
            CopyRequest(lazy, *arguments)


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


def test_an_expanded_tensor_takes_no_more_than_the_file(tmp_path: Path) -> None:
    tree = save(tmp_path, huge=torch.ones(1).expand(1 << 40))
    assert read_tensor(tree["huge"]).numel() == 1 << 40
    assert read_whole(tmp_path / "f.pt")["huge"].shape == (1 << 40,)


class Point:
    """Stands for a class of the user's."""

    def __init__(self, x: int) -> None:
        self.x = x


class Callback:
    def __init__(self) -> None:
        self.owner = self
        self.values = [torch.ones(2), Point(3)]


def test_unknown_types_need_to_be_allowed(tmp_path: Path) -> None:
    tree = {"state": {"callbacks": {"mine": Callback()}, "point": Point(4), "kind": Point}}
    torch.save(tree, tmp_path / "f.pt")
    index = read_index(tmp_path / "f.pt", name="s3://b/f.pt")
    found = find_unknown(index.tree)
    assert ("state/callbacks/mine", f"{__name__}.Callback") in found
    assert ("state/kind", f"{__name__}.Point") in found
    with pytest.raises(UnsafeError) as caught:
        materialize(index.tree, reader=TensorReader(), file="s3://b/f.pt")
    message = str(caught.value)
    for part in ("s3://b/f.pt", "state/callbacks/mine", f"{__name__}.Callback", "safe_types", "ignore_keys"):
        assert part in message
    with pytest.raises(UnsafeError, match="state/callbacks/mine/values/1"):
        require_safe(index.tree, safe_types=[Callback], file="f")
    for allowed in ([Callback, Point], [f"{__name__}.Callback", f"{__name__}.Point"]):
        got = materialize(index.tree, reader=TensorReader(), safe_types=allowed)
        mine = got["state"]["callbacks"]["mine"]
        assert type(mine) is Callback
        assert mine.owner is mine
        assert mine.values[0].tolist() == [1.0, 1.0]
        assert mine.values[1].x == 3
        assert got["state"]["kind"] is Point
    ignored = {"state": {"x": index.tree["state"]["callbacks"]["mine"].state["values"][0]}}
    require_safe(ignored)
    torch.save({"a": Point(1)}, tmp_path / "g.pt")
    hostile = read_index(tmp_path / "g.pt").tree
    hostile["a"].global_name = "no_such_package.Type"
    with pytest.raises(OptionError, match="no_such_package"):
        materialize(hostile, reader=TensorReader(), safe_types=["no_such_package.Type"])


def test_objects_that_refer_to_each_other(tmp_path: Path) -> None:
    shared = [1, 2]
    torch.save({"a": shared, "b": (shared, shared)}, tmp_path / "f.pt")
    got = read_whole(tmp_path / "f.pt")
    assert got["b"][0] is got["a"]
    a: list = []
    a.append(a)
    torch.save(a, tmp_path / "g.pt")
    with pytest.raises(CorruptError, match="contains itself"):
        read_index(tmp_path / "g.pt")


def test_other_devices_are_copied_to(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no accelerator here")
    base = torch.randn(700, 3000)
    tree = save(tmp_path, t=base, v=base.t())
    for lazy, want in ((tree["t"], base), (tree["v"], base.t())):
        for dtype in (torch.float32, torch.float16):
            there = torch.empty(want.shape, device="cuda", dtype=dtype)
            TensorReader().copy([CopyRequest(lazy, there, "t")])
            assert torch.equal(there.cpu(), want.to(dtype))
    assert torch.equal(read_tensor(tree["v"], device="cuda").cpu(), base.t())
    got = materialize(tree, reader=TensorReader(), device="cuda")
    assert torch.equal(got["v"].cpu(), base.t())


def test_all_of_a_lazy_tensors_bytes(tmp_path: Path) -> None:
    random.seed(0)
    for dtype in (torch.bool, torch.uint16, torch.complex128, torch.float8_e5m2):
        want = torch.randint(0, 2, (32,), dtype=torch.uint8).view(
            torch.bool if dtype is torch.bool else dtype
        )
        tree = save(tmp_path, t=want)
        lazy = tree["t"]
        assert isinstance(lazy, LazyTensor)
        assert as_bytes(read_tensor(lazy)) == as_bytes(want)
