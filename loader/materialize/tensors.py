"""Reads tensors' bytes from local files straight into the memory that they are meant for."""

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
    """Elements of a lazy tensor that are wanted in a real one.

    ``source_start`` and ``length`` count elements of the flattened source; ``length`` is the rest of it by
    default. ``destination`` has that many elements, in any shape, dtype, layout and on any device (but meta).
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
        """Element of the flattened source after the last one that is wanted."""
        return self.source.numel if self.length is None else self.source_start + self.length


class TensorReader:
    """Reads storages into tensors, and compares them with their checksums.

    ``verify`` says when: ``before`` (the caller runs `verify` before the first change), ``during`` (each
    storage as it is read, bytes between the wanted ones included) or ``off``. ``on_bytes`` is told how many
    bytes were just read, `comes_in_parts` tells whether not all of the file at a path may have landed. Holds one
    buffer of 8 MiB.
    """

    def __init__(
        self,
        *,
        verify: Verify = "during",
        on_bytes: Callable[[int], None] | None = None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._storages = StorageReader(verify, on_bytes, comes_in_parts)

    def verify(self, storages: Iterable[StorageRef]) -> None:
        """Compares all of `storages` with their checksums now; `copy` will not do so again.

        Storages without a checksum are passed over. Raises `CorruptError` for the first that differs.
        """
        for storage in _in_file_order(set(storages)):
            self._storages.check(storage)

    def waiting(self, on_wait: Callable[[], None] | None, coming: Mapping[str, Sequence[ByteRange]]) -> None:
        """From now on bytes of `coming` (by path) that have not landed are waited for, and `on_wait` called meanwhile;
        None: no more."""
        self._storages.on_wait = on_wait
        self._storages.coming = {path: union(ranges) for path, ranges in coming.items()}

    def wait_for(self, path: str, start: int, stop: int) -> None:
        """Returns once bytes ``[start, stop)`` of the file at `path` are there."""
        self._storages.wait_for(path, start, stop)

    def unsummed(self) -> TensorReader:
        """One that compares no checksums, and waits as this one does."""
        storages = self._storages
        other = TensorReader(verify="off", on_bytes=storages.on_bytes, comes_in_parts=storages.comes_in_parts)
        other.waiting(self._storages.on_wait, self._storages.coming)
        other.reading_direct(self._storages.direct)
        return other

    def reading_direct(self, direct: DirectReads | None) -> None:
        """From now on what `direct` has is read from the store, not from the node's files; None: no more."""
        self._storages.direct = direct

    def share(self, shares: Mapping[StorageRef, Sequence[ByteRange]]) -> None:
        """Of these storages only these ranges are to be summed here, while they are read: others sum the rest."""
        self._storages.share(shares)

    def finish_shares(self) -> dict[StorageRef, list[int]]:
        """The CRC-32s of the ranges of `share`, in order; what `copy` did not come by is read now.

        From here on their storages are read without being summed.
        """
        return self._storages.finish()

    def _buffer(self, requests: Sequence[CopyRequest]) -> torch.Tensor:
        """The buffer; page-locked from the first CUDA tensor on, which then takes bytes from it without a further copy
        of the driver's."""
        locked = isinstance(self._storages.staging, memoryview)
        if not locked and any(request.destination.is_cuda for request in requests):
            with contextlib.suppress(RuntimeError):  # no memory may be left to lock
                pinned = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
                self._storages.staging = pinned.numpy().data
        return torch.frombuffer(self._storages.staging, dtype=torch.uint8)

    def copy(self, requests: Sequence[CopyRequest]) -> None:
        """Carries out `requests`, storage by storage in the order of the files.

        Where dtypes agree and the memory is the CPU's and contiguous, bytes are read straight into it; the
        rest goes through the buffer and is cast and moved by ``Tensor.copy_``. What comes straight from a store is
        read first, over all requests at once. A strided tensor copied in
        part into a non-contiguous destination takes a temporary of its size.

        Raises `CorruptError` where a file is too short or a checksum differs: destinations may have been
        written by then.
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
                    (storage, [piece for one in by_storage[storage] for piece in _pieces(one, staging, last)])
                )
            for storage, pieces in self._storages.place(planned):
                self._storages.read(storage, pieces, [request.name for request in by_storage[storage]])
                for finish in finishers[storage]:
                    finish()


def read_tensor(
    source: LazyTensor,
    *,
    reader: TensorReader | None = None,
    device: str | torch.device = "cpu",
    name: str = "tensor",
) -> torch.Tensor:
    """A new tensor with the elements, shape and ``requires_grad`` of `source`, on ``device``.

    A tensor that repeats elements of its storage takes no more memory than that; any other is contiguous.
    Without ``reader``, checksums are compared as the bytes are read.
    """
    reader = TensorReader() if reader is None else reader
    layout = Layout(source.shape, source.stride, source.storage_offset)
    dtype = torch_dtype(source.dtype)
    if layout.span < source.numel:
        # Expanded: a full copy could be made as large as the file's writer likes.
        flat = LazyTensor(source.storage, source.dtype, (layout.span,), (1,), source.storage_offset)
        memory = torch.empty(layout.span, dtype=dtype, device=device)
        reader.copy([CopyRequest(flat, memory, name)])
        result = memory.as_strided(source.shape, source.stride)
    else:
        result = torch.empty(source.shape, dtype=dtype, device=device)
        reader.copy([CopyRequest(source, result, name)])
    return result.requires_grad_(source.requires_grad)


def torch_dtype(name: str) -> torch.dtype:
    """``float32`` to ``torch.float32``. Raises `FormatError` where the installed torch lacks it."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise FormatError(
            f"the checkpoint holds {name} tensors, which torch {torch.__version__} does not know"
        )
    return found


def _in_file_order(storages: Iterable[StorageRef]) -> list[StorageRef]:
    return sorted(storages, key=lambda storage: (storage.file, storage.offset))


def _pieces(
    request: CopyRequest, staging: torch.Tensor, finishers: list[Callable[[], None]]
) -> Iterator[StorageSlice]:
    """What to read for `request`; ``finishers`` gets what is to be done after the storage was read."""
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


def is_plain(destination: torch.Tensor) -> bool:
    """Whether bytes can be put into its memory as they are: the CPU's, and contiguous."""
    return (
        destination.device.type == "cpu"
        and destination.is_contiguous()
        and not destination.is_conj()
        and not destination.is_neg()
    )


def _staged(
    destination: torch.Tensor, start: int, dtype: torch.dtype, staging: torch.Tensor
) -> Iterator[StorageSlice]:
    """A contiguous source into any destination, through the buffer."""
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
    """A strided source, in parts of the buffer's size, into a contiguous or equally shaped destination."""
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
