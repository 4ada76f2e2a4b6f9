"""Pages of new memory are made before bytes are read into it, and what memory holds stays."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from rankload.loader.materialize import storages
from rankload.loader.materialize.new_pages import LEAST_BYTES, make_pages
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.ranges.destinations import FirstWrite
from rankload.loader.saved.copies import Copy, Memory
from rankload.loader.saved.strided import Layout
from rankload.loader.saved.tensor import StorageRef

NBYTES = 4 * LEAST_BYTES


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in /proc")
def test_pages_are_made() -> None:
    with mmap.mmap(-1, 64 << 20) as memory:
        before = resident_bytes()
        view = memoryview(memory)[1:-1]
        make_pages(view)
        made = resident_bytes() - before
        view.release()
    if not made:
        pytest.skip("this system makes pages only as they are written to")
    assert made > 60 << 20


@pytest.mark.parametrize("nbytes", [0, 1, LEAST_BYTES - 1, LEAST_BYTES, 3 * LEAST_BYTES + 5])
def test_what_memory_holds_stays(nbytes: int) -> None:
    memory = bytearray(b"x" * nbytes)
    make_pages(memoryview(memory))
    assert memory == b"x" * nbytes


@pytest.mark.parametrize("owned", [False, True])
def test_of_memory_that_nobody_has_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owned: bool) -> None:
    """A tensor that the caller of a load owns has its pages."""
    made: list[int] = []
    monkeypatch.setattr(storages, "make_pages", lambda memory: made.append(memory.nbytes))
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (NBYTES // 256))
    whole = Layout((NBYTES,), (1,), 0)
    memory = Memory("tensor", "uint8", (NBYTES,), (1,), plain=True)
    copy = Copy("tensor", StorageRef(str(path), "data", 0, NBYTES, None), "uint8", whole, memory, whole)
    tensor = torch.zeros(NBYTES, dtype=torch.uint8)
    first_writes = {"tensor": FirstWrite(lambda: None)} if owned else {}
    TensorReader(verify="off").copy([copy], {"tensor": tensor}, first_writes)
    assert bytes(tensor.numpy()) == path.read_bytes()
    assert sum(made) == (0 if owned else NBYTES)
