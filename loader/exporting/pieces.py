"""Reads tensors a piece at a time, cast and in row-major order, and has each piece written while the next is read.

Most tensors are never in memory as a whole. One whose elements lie in another order in its storage (a transposed one)
is: each of its pieces would read all of the storage again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..byte_ranges import ByteRange, subtract
from ..errors import CorruptError
from ..materialize.tensors import TensorReader, read_tensor, torch_dtype
from ..saved.copies import Copy, Memory, copies_into
from ..saved.dtypes import ITEMSIZE
from ..saved.regions import Laid, Run, row_major_stride
from ..saved.strided import Box, Layout, row_major_boxes
from ..saved.tensor import SavedTensor, StorageRef
from .select import OutTensor

PIECE_BYTES = 8 << 20
"""Bytes of a tensor that are read or written at a time."""
_BUFFERS = 4
"""How many pieces are being read or written at most. With two, either thread would wait for the other at each piece,
which takes long where processors are busy."""
_AT_ONCE_BYTES = 64 << 10
"""Pieces up to this size are written at once where nothing else is being written: to hand them over takes longer."""

Write = Callable[[memoryview], object]


def copies_of(tensor: OutTensor) -> list[Copy]:
    """The copies that read all of `tensor`. Raises `LayoutError` where elements are in no file that was read."""
    source = tensor.source
    memory = Memory(tensor.name, source.dtype, source.shape, row_major_stride(source.shape), plain=False)
    return list(copies_into(source, memory.whole, memory, name=tensor.name))


class Pieces:
    """Reads tensors by `reader`, and hands their bytes to be written. For one thread.

    Context manager: at its end, nothing is being written any more.
    """

    def __init__(self, reader: TensorReader, on_bytes: Callable[[int], None]) -> None:
        """`on_bytes` is called with how many bytes were just read to be written."""
        self._reader = reader
        self._on_bytes = on_bytes
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(_BUFFERS)]
        self._uncast = torch.empty(0, dtype=torch.uint8)
        self._turn = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="rankload-export")
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._writer.shutdown(cancel_futures=True)

    def write(self, tensor: OutTensor, write: Write) -> None:
        """Has `write` called with the bytes of `tensor`, in order; `settle` waits for the last call.

        Raises as `TensorReader.copy`, and what an earlier call of `write` raised.
        """
        for piece in self._read(tensor):
            self._on_bytes(len(piece))
            if not self._pending and len(piece) <= _AT_ONCE_BYTES:
                write(piece)
                continue
            self._pending.append(self._writer.submit(write, piece))
            # Then the next piece is read into a buffer that nobody writes any more.
            self._settle(_BUFFERS - 1)

    def settle(self) -> None:
        """Returns once all that was to be written has been; raises what writing it raised."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _read(self, tensor: OutTensor) -> Iterator[memoryview]:
        source, size = tensor.source, max(tensor.source.itemsize, ITEMSIZE[tensor.dtype])
        dtype, saved_dtype = torch_dtype(tensor.dtype), torch_dtype(source.dtype)
        step = PIECE_BYTES // size
        whole = (
            read_tensor(source, reader=self._reader, name=tensor.name).detach()
            if _out_of_order(source)
            else None
        )
        for start in range(0, source.numel, step):
            run = Run(start, min(step, source.numel - start))
            out = self._next_buffer()[: run.length * dtype.itemsize]
            elements = out.view(dtype)
            into = elements if dtype == saved_dtype else self._uncast_elements(run.length, saved_dtype)
            if whole is not None:
                _take(whole, run, into)
            else:
                memory = Memory(tensor.name, source.dtype, (run.length,), (1,), plain=True)
                copies = copies_into(source, Laid(run, 0, (1,)), memory, name=tensor.name)
                self._reader.copy(list(copies), {tensor.name: into})
            if into is not elements:
                elements.copy_(into)
            yield memoryview(out.numpy())  # type: ignore[arg-type]

    def _next_buffer(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % _BUFFERS
        return self._buffers[self._turn]

    def _uncast_elements(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        if not len(self._uncast):
            self._uncast = torch.empty(PIECE_BYTES, dtype=torch.uint8)
        return self._uncast[: count * dtype.itemsize].view(dtype)


def _out_of_order(source: SavedTensor) -> bool:
    """Whether pieces of a large tensor would each read more of a storage than they have elements."""
    return source.nbytes > PIECE_BYTES and any(
        isinstance(piece.region, Box) and not Layout(piece.region.sizes, piece.stride, 0).is_contiguous
        for piece in source.pieces
    )


def _take(whole: torch.Tensor, run: Run, into: torch.Tensor) -> None:
    """Copies the elements of `run` of `whole`, in row-major order, to `into`."""
    done = 0
    for box in row_major_boxes(tuple(whole.shape), run.start, run.stop):
        part = whole
        for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        into[done : done + box.numel].view(box.sizes).copy_(part)
        done += box.numel


class StorageSums:
    """Compares storages with their checksums, however they are read: each is summed as its bytes come, in any order."""

    def __init__(self, reader: TensorReader, read: Mapping[StorageRef, Iterable[ByteRange]]) -> None:
        """`read` are the ranges that are going to be read. Storages without a checksum are passed over."""
        self._reader = reader
        self._read = {
            one: list(ranges) for one, ranges in read.items() if one.crc32 is not None and one.nbytes
        }
        self.begin(self._read)

    def begin(self, storages: Iterable[StorageRef]) -> None:
        """From now on, `storages` are summed, from the beginning."""
        self._reader.share({storage: [ByteRange(0, storage.nbytes)] for storage in storages})

    def gaps(self) -> dict[StorageRef, list[ByteRange]]:
        """What of them nobody reads, but `finish`."""
        gaps = {one: list(subtract([ByteRange(0, one.nbytes)], ranges)) for one, ranges in self._read.items()}
        return {storage: ranges for storage, ranges in gaps.items() if ranges}

    def finish(self) -> dict[StorageRef, CorruptError]:
        """Reads what was not read of them. Returns those that differ from their checksums, each with what says so."""
        return {
            storage: CorruptError(
                f"{storage.file}: storage {storage.key} has CRC-32 {crc:08x}; the file's directory says "
                f"{storage.crc32:08x}. The file is damaged; take another copy of it.",
                path=storage.file,
            )
            for storage, (crc,) in self._reader.finish_shares().items()
            if crc != storage.crc32
        }
