"""Copies saved tensors' bytes into the memory of live tensors: parameters, buffers, optimizer states.

`TensorReader.copy` is where the bytes of a saved tensor get into a parameter. `_slices` decides how, for each request:

- a contiguous source, and a destination that `is_plain` and has its dtype: bytes are read into the destination itself
- a contiguous source, and any other destination: they are read into a buffer, and from there copied (`_staged`)
- a strided source: boxes of it, gaps included, are read into the buffer, and from there copied (`_gathered`)

``Tensor.copy_`` copies from the buffer, and casts and moves to the device on the way. `storages` reads the slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..byte_ranges import ByteRange, union
from ..errors import FormatError
from ..options import Verify
from ..ranges.direct import DirectReads
from ..saved.strided import Layout, bounded_boxes, row_major_boxes
from ..saved.values import LazyTensor, StorageRef
from .storages import STAGING_BYTES, StorageReader, StorageSlice


@dataclass(frozen=True, slots=True, eq=False)
class CopyRequest:
    """Elements of a saved tensor, and the live tensor that they are to be copied into.

    ``source_start`` and ``length`` count elements of the flattened source; by default, ``length`` is the rest of it.
    ``destination`` has as many elements, in any shape, dtype and layout, on any device but meta. Raises `ValueError`
    where it does not.
    """

    source: LazyTensor
    destination: torch.Tensor
    name: str
    """What messages call the destination."""
    source_start: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        count = self.stop - self.source_start
        if not 0 <= self.source_start <= self.stop <= self.source.numel:
            raise ValueError(
                f"{self.name}: elements {self.source_start} to {self.stop} are wanted of a tensor that has "
                f"{self.source.numel}"
            )
        if self.destination.numel() != count or self.destination.is_meta:
            raise ValueError(
                f"{self.name}: {count} elements are wanted in a {self.destination.device.type} tensor that "
                f"has {self.destination.numel()}"
            )

    @property
    def stop(self) -> int:
        """The element of the flattened source after the last one that is copied."""
        return self.source.numel if self.length is None else self.source_start + self.length


class TensorReader:
    """Copies storages' bytes into tensors, and compares storages with their checksums. For one thread.

    `verify` says when: ``before`` (the caller runs `verify` before the first change), ``during`` (each storage is
    summed whole as it is read, gaps included) or ``off``. `on_bytes` is called with how many bytes were just read.
    `comes_in_parts` says of a path whether bytes of that file may not have landed yet. Holds a buffer of
    `STAGING_BYTES`.
    """

    def __init__(
        self,
        *,
        verify: Verify = "during",
        on_bytes: Callable[[int], None] | None = None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._storages = StorageReader(verify, on_bytes, comes_in_parts)

    def copy(self, requests: Sequence[CopyRequest]) -> None:
        """Fills the destinations of `requests`, storage by storage in the order of the files.

        Ranges of `reading_direct` are read first, for all requests at once. A part of a strided source that goes to a
        destination which is not contiguous takes a temporary of that size.

        Raises `CorruptError` where a file is too short or a checksum differs; destinations may have been written by
        then. Raises `FormatError` where torch lacks a dtype.
        """
        by_storage: dict[StorageRef, list[CopyRequest]] = {}
        for request in requests:
            if request.destination.numel():
                by_storage.setdefault(request.source.storage, []).append(request)
        staging = self._buffer(requests)
        with torch.no_grad():
            planned: list[tuple[StorageRef, list[StorageSlice]]] = []
            finishers: dict[StorageRef, list[Callable[[], None]]] = {}
            for storage in _in_file_order(by_storage):
                last = finishers.setdefault(storage, [])
                planned.append(
                    (storage, [each for one in by_storage[storage] for each in _slices(one, staging, last)])
                )
            for storage, slices in self._storages.place(planned):
                self._storages.read(storage, slices, [request.name for request in by_storage[storage]])
                for finish in finishers[storage]:
                    finish()

    def verify(self, storages: Iterable[StorageRef]) -> None:
        """Compares all of `storages` with their checksums now; `copy` will not do so again.

        Storages without a checksum are passed over. Raises `CorruptError` for the first that differs.
        """
        for storage in _in_file_order(set(storages)):
            self._storages.check(storage)

    def waiting(self, on_wait: Callable[[], None] | None, coming: Mapping[str, Sequence[ByteRange]]) -> None:
        """From now on, reads wait for bytes of `coming` (by path) that have not landed, and call `on_wait` meanwhile.

        With None they no longer wait: such bytes are an error then.
        """
        self._storages.on_wait = on_wait
        self._storages.coming = {path: union(ranges) for path, ranges in coming.items()}

    def wait_for(self, path: str, start: int, stop: int) -> None:
        """Returns once bytes ``[start, stop)`` of the file at `path` have landed."""
        self._storages.wait_for(path, start, stop)

    def unsummed(self) -> TensorReader:
        """A reader that compares no checksums, and otherwise waits and reads as this one does."""
        storages = self._storages
        other = TensorReader(verify="off", on_bytes=storages.on_bytes, comes_in_parts=storages.comes_in_parts)
        other.waiting(self._storages.on_wait, self._storages.coming)
        other.reading_direct(self._storages.direct)
        return other

    def reading_direct(self, direct: DirectReads | None) -> None:
        """From now on, the ranges of `direct` are read from the store instead of the node's files; None ends that."""
        self._storages.direct = direct

    def share(self, shares: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        """From now on, only these ranges of these storages are summed while they are read; other ranks sum the rest."""
        self._storages.share(shares)

    def finish_shares(self) -> dict[StorageRef, list[int]]:
        """The CRC-32s of the ranges given to `share`, in order. Bytes of them that were not read yet are read now.

        From then on their storages are read without being summed.
        """
        return self._storages.finish()

    def _buffer(self, requests: Sequence[CopyRequest]) -> torch.Tensor:
        """The buffer; page-locked from the first CUDA destination on, which saves a copy by the driver."""
        locked = isinstance(self._storages.staging, memoryview)
        if not locked and any(request.destination.is_cuda for request in requests):
            with contextlib.suppress(RuntimeError):  # no memory may be left to lock
                pinned = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
                self._storages.staging = pinned.numpy().data
        return torch.frombuffer(self._storages.staging, dtype=torch.uint8)


def read_tensor(
    source: LazyTensor,
    *,
    reader: TensorReader | None = None,
    device: str | torch.device = "cpu",
    name: str = "tensor",
) -> torch.Tensor:
    """A new tensor with the elements, shape, dtype and ``requires_grad`` of `source`, on ``device``.

    It is contiguous; but where `source` repeats elements of its storage (expanded), it repeats them too. Without
    ``reader``, checksums are compared as the bytes are read. Raises as `TensorReader.copy` does.
    """
    reader = TensorReader() if reader is None else reader
    layout = Layout(source.shape, source.stride, source.storage_offset)
    dtype = torch_dtype(source.dtype)
    if layout.span < source.numel:
        # Expanded. A full copy would take as much memory as the file claims, whatever its size.
        flat = LazyTensor(source.storage, source.dtype, (layout.span,), (1,), source.storage_offset)
        memory = torch.empty(layout.span, dtype=dtype, device=device)
        reader.copy([CopyRequest(flat, memory, name)])
        result = memory.as_strided(source.shape, source.stride)
    else:
        result = torch.empty(source.shape, dtype=dtype, device=device)
        reader.copy([CopyRequest(source, result, name)])
    return result.requires_grad_(source.requires_grad)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name: ``float32`` gives ``torch.float32``. Raises `FormatError` where torch lacks it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise FormatError(
            f"the checkpoint holds {name} tensors, which torch {torch.__version__} does not know"
        )
    return found


def is_plain(destination: torch.Tensor) -> bool:
    """Whether bytes can be read into its memory as they are: it is on the CPU, contiguous, and no conjugate view."""
    return (
        destination.device.type == "cpu"
        and destination.is_contiguous()
        and not destination.is_conj()
        and not destination.is_neg()
    )


def _slices(
    request: CopyRequest, staging: torch.Tensor, finishers: list[Callable[[], None]]
) -> Iterator[StorageSlice]:
    """The slices to read for `request`; to ``finishers`` is added what to call once all of them were read."""
    source, destination = request.source, request.destination.detach()
    dtype = torch_dtype(source.dtype)
    if source.is_contiguous:
        start = (source.storage_offset + request.source_start) * source.itemsize
        if is_plain(destination) and destination.dtype == dtype:
            # Not view(-1): that keeps the stride of a single element, which the view as bytes refuses.
            flat = destination.as_strided((destination.numel(),), (1,))
            memory = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
            yield StorageSlice(start, len(memory), memory)
        else:
            yield from _staged(destination, start, dtype, staging)
        return
    whole = destination.numel() == source.numel
    if destination.is_contiguous() or (whole and tuple(destination.shape) == source.shape):
        yield from _gathered(request, destination, dtype, staging)
        return
    temporary = torch.empty(destination.shape, dtype=dtype)
    yield from _gathered(request, temporary, dtype, staging)
    finishers.append(lambda: _copy(destination, temporary))


def _staged(
    destination: torch.Tensor, start: int, dtype: torch.dtype, staging: torch.Tensor
) -> Iterator[StorageSlice]:
    """Reads a contiguous source, from byte `start` of its storage on, through the buffer into any destination."""
    step = STAGING_BYTES // dtype.itemsize
    shape = tuple(destination.shape)
    for first in range(0, destination.numel(), step):
        stop = min(first + step, destination.numel())
        nbytes = (stop - first) * dtype.itemsize

        def use(first: int = first, stop: int = stop, nbytes: int = nbytes) -> None:
            elements = staging[:nbytes].view(dtype)
            done = 0
            for box in row_major_boxes(shape, first, stop):
                target = destination
                for dim, (begin, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
                    target = target.narrow(dim, begin, size)
                target.copy_(elements[done : done + box.numel].view(box.sizes))
                done += box.numel

        yield StorageSlice(start + first * dtype.itemsize, nbytes, use=use)


def _gathered(
    request: CopyRequest, destination: torch.Tensor, dtype: torch.dtype, staging: torch.Tensor
) -> Iterator[StorageSlice]:
    """Reads a strided source through the buffer into a destination that is contiguous or has the source's shape."""
    source = request.source
    layout = Layout(source.shape, source.stride, source.storage_offset)
    flat = destination.view(-1) if destination.is_contiguous() else None
    position = 0
    for outer in row_major_boxes(source.shape, request.source_start, request.stop):
        part = layout.part(outer)
        stop = position + outer.numel
        target = destination if flat is None else flat[position:stop].view(outer.sizes)
        position = stop
        for box in bounded_boxes(part, STAGING_BYTES // dtype.itemsize):
            inner = part.part(box)
            view = target
            for dim, (begin, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
                view = view.narrow(dim, begin, size)

            def use(view: torch.Tensor = view, inner: Layout = inner) -> None:
                elements = staging[: inner.span * dtype.itemsize].view(dtype)
                view.copy_(elements.as_strided(inner.shape, inner.stride))

            yield StorageSlice(inner.offset * dtype.itemsize, inner.span * dtype.itemsize, use=use)


def _copy(destination: torch.Tensor, source: torch.Tensor) -> None:
    destination.copy_(source)


def _in_file_order(storages: Iterable[StorageRef]) -> list[StorageRef]:
    return sorted(storages, key=lambda storage: (storage.file, storage.offset))
