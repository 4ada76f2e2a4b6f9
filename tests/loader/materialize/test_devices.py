"""Bytes to CUDA devices: nothing is filled again before it has been copied, and all has arrived at the end."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize import devices, staging
from rankload.loader.materialize.devices import PinnedStaging
from rankload.loader.materialize.staging import STAGING_BYTES, HostStaging
from rankload.loader.materialize.tensors import TensorReader, is_plain, read_tensor
from rankload.loader.saved.copies import Copy, Memory, copies_into
from rankload.loader.saved.tensor import SavedTensor

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Queue:
    """A stream whose copies are done only when somebody waits for them."""

    def __init__(self) -> None:
        self.queued: list[tuple[memoryview, bytes, list[bytes]]] = []

    def copy(self, view: memoryview, arrived: list[bytes]) -> None:
        self.queued.append((view, bytes(view), arrived))

    def run(self, count: int) -> None:
        for view, _, arrived in self.queued[:count]:
            arrived.append(bytes(view))
        del self.queued[:count]


class Mark:
    """An event: what was queued before it was recorded has run once it was waited for."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.left = 0

    def record(self, stream: Any) -> None:
        self.stream, self.left = stream, len(stream.queued)
        self.already = sum(1 for _ in stream.queued)

    def synchronize(self) -> None:
        self.stream.run(min(self.left, len(self.stream.queued)))


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 1)), max_size=40))
def test_staged_bytes_stay_until_they_were_copied(sizes: list[tuple[int, int]]) -> None:
    """Whatever is claimed and however late its copies run, on two streams; 100 bytes fit into a buffer of 128."""
    streams = [Queue(), Queue()]
    made: list[torch.Tensor] = []

    def new_buffer() -> torch.Tensor:
        made.append(torch.zeros(128, dtype=torch.uint8))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_ALIGNED_BYTES", 8)
        pinned = PinnedStaging(streams, new_buffer=new_buffer, new_event=Mark)  # type: ignore[arg-type]
        want: list[list[bytes]] = [[], []]
        arrived: list[list[bytes]] = [[], []]
        for at, (nbytes, stream) in enumerate(sizes):
            view = pinned.claim(nbytes)
            assert len(view) == nbytes
            assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % 8 == 0
            view[:] = bytes([at + 1]) * nbytes
            streams[stream].copy(view, arrived[stream])
            want[stream].append(bytes(view))
        for one in streams:
            one.run(len(one.queued))
    assert arrived == want
    assert len(made) == 2


def test_plain_memory_where_none_can_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(devices, "_locked", refuse)
    assert isinstance(devices.DeviceCopies().staging(), HostStaging)


def test_no_memory_is_locked_for_tensors_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor any buffer made, where bytes are read into their places."""
    made: list[str] = []
    monkeypatch.setattr(devices, "PinnedStaging", lambda *_: made.append("pinned"))
    monkeypatch.setattr(staging, "STAGING_BYTES", 1 << 62)  # no bytearray is so large
    torch.save({"t": torch.arange(100_000.0)}, tmp_path / "f.pt")
    saved = read_index(tmp_path / "f.pt").tree["t"]
    assert torch.equal(read_tensor(saved), torch.arange(100_000.0))
    assert made == []


DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e5m2,
)  # fmt: skip


def of_dtype(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits, but of a bool's those that it may have."""
    size = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(0)
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def fill(reader: TensorReader, tree: dict[str, SavedTensor], into: dict[str, torch.Tensor]) -> None:
    copies: list[Copy] = []
    for name, tensor in into.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        memory = Memory(name, dtype, tuple(tensor.shape), tensor.stride(), is_plain(tensor))
        copies.extend(copies_into(tree[name], memory.whole, memory, name=name))
    reader.copy(copies, into)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    left, right = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(left, right)


@on_cuda
@pytest.mark.parametrize("pageable", [False, True])
@pytest.mark.parametrize("n_threads", [1, 4])
def test_tensors_on_a_device_have_the_saved_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int, pageable: bool
) -> None:
    """Of many dtypes and sizes, contiguous or not on either side, beside some on the CPU, by one reader twice."""
    if pageable:
        monkeypatch.setattr(devices, "_locked", lambda: (_ for _ in ()).throw(RuntimeError("none left")))
    saved: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in ((1,), (7, 13), (3, 3 * STAGING_BYTES // 8 + 5), (1000, 5000)):
            saved[f"{name} {shape}"] = of_dtype(dtype, *shape)
        saved[f"{name} turned"] = of_dtype(dtype, 900, 2100).t()
        saved[f"{name} none"] = of_dtype(dtype, 0)
    saved |= {f"small{at}": torch.full((50,), float(at)) for at in range(300)}
    torch.save(saved, tmp_path / "f.pt")
    tree = read_index(tmp_path / "f.pt").tree
    reader = TensorReader(n_threads=n_threads)
    for _ in range(2):
        into: dict[str, torch.Tensor] = {}
        for at, (name, tensor) in enumerate(saved.items()):
            device = "cpu" if at % 7 == 0 else "cuda"
            into[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            if tensor.ndim == 2 and at % 3 == 0:  # every other column of a larger one
                room = torch.zeros(tensor.shape[0], 2 * tensor.shape[1], dtype=tensor.dtype, device=device)
                into[name] = room[:, ::2]
            if tensor.ndim == 2 and at % 3 == 1:
                into[name] = torch.zeros(*reversed(tensor.shape), dtype=tensor.dtype, device=device).t()
        fill(reader, tree, into)
        assert not [name for name in saved if not same_bits(into[name], saved[name])]


@on_cuda
def test_casts_on_a_device_are_those_of_the_cpu(tmp_path: Path) -> None:
    saved = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100
        for name, shape in (("large", (3, 3_000_001)), ("small", (5, 7)))
    }
    saved["turned"] = saved["large"].t()
    torch.save(saved, tmp_path / "f.pt")
    tree = read_index(tmp_path / "f.pt").tree
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.int32):
        into = {name: torch.zeros(one.shape, dtype=dtype, device="cuda") for name, one in saved.items()}
        fill(TensorReader(n_threads=4), tree, into)
        for name, tensor in saved.items():
            assert same_bits(into[name], tensor.to(dtype)), (name, dtype)
    for view in (torch.zeros(5, 7, dtype=torch.complex64, device="cuda").conj(),):
        fill(TensorReader(), tree, {"small": view})
        assert torch.equal(view.resolve_conj().real.cpu(), saved["small"])
    with torch.inference_mode():
        made = torch.zeros(5, 7, device="cuda")
    fill(TensorReader(), tree, {"small": made})
    assert torch.equal(made.cpu(), saved["small"])


@on_cuda
def test_streams_of_the_job_see_whole_tensors(tmp_path: Path) -> None:
    """What the job queued before is not overwritten before it ran, and what it queues after sees what was restored."""
    values = torch.arange(20_000_000.0)
    torch.save({"t": values}, tmp_path / "f.pt")
    tree = read_index(tmp_path / "f.pt").tree
    into = torch.full((20_000_000,), -1.0, device="cuda")
    other = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), other):
        with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
            into.fill_(-1.0)
            torch.cuda._sleep(200_000_000)
            before = into.clone()
            fill(TensorReader(n_threads=4), tree, {"t": into})
        elsewhere = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(elsewhere):  # type: ignore[no-untyped-call]
            after = into.clone()
        torch.cuda.synchronize()
        assert bool((before == -1.0).all())
        assert torch.equal(after.cpu(), values)


@on_cuda
def test_no_more_memory_is_locked_than_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, made = devices._locked, []

    def counted() -> torch.Tensor:
        made.append(locked())
        return made[-1]

    monkeypatch.setattr(devices, "_locked", counted)
    torch.save({str(at): torch.zeros(20_000_000) for at in range(4)}, tmp_path / "f.pt")
    tree = read_index(tmp_path / "f.pt").tree
    reader = TensorReader(n_threads=3)
    for _ in range(2):
        fill(reader, tree, {name: torch.empty(20_000_000, device="cuda") for name in tree})
    assert all(one.is_pinned() for one in made)
    assert 0 < sum(one.nbytes for one in made) <= 3 * 2 * STAGING_BYTES
