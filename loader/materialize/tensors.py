"""Copies saved tensors' bytes into the memory of live tensors: parameters, buffers, optimizer states.

`TensorReader.copy` is where the bytes of a saved tensor get into a parameter. `_slices` decides how, for each `Copy`:

- a contiguous source, and a contiguous destination of its dtype in plain memory: bytes are read into the destination
- a contiguous source, and any other destination: they are read into a buffer, and from there copied (`_staged`)
- a strided source: boxes of it, gaps included, are read into the buffer, and from there copied (`_gathered`)

``Tensor.copy_`` copies from the buffer, and casts on the way; `devices` moves to CUDA devices meanwhile. `storages`
reads the slices.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..byte_ranges import ByteRange, union
from ..errors import FormatError, InternalError
from ..options import Verify
from ..ranges.destinations import FirstWrite
from ..ranges.direct import DirectReads
from ..saved.copies import Copy, Memory, NamesOf, copies_into
from ..saved.regions import Run, row_major_stride
from ..saved.strided import Box, Layout, bounded_boxes, row_major_boxes
from ..saved.tensor import SavedTensor, StorageRef
from .devices import DeviceCopies
from .slices import StorageSlice
from .staging import STAGING_BYTES
from .storages import FetchAgain, StorageReader, no_store

_NUMPY_HAS = frozenset({torch.float32, torch.float64, torch.int64, torch.uint8})
"""Some of the dtypes that NumPy has too: the memory of such tensors is reached in half the time."""


class TensorReader:
    """Copies storages' bytes into tensors, and compares storages with their checksums. For one thread.

    `verify` says when: ``before`` (the caller runs `verify` before the first change), ``during`` (each storage is
    summed whole as it is read, gaps included) or ``off``. `on_bytes` is called with how many bytes were just read.
    `comes_in_parts` says of a path whether bytes of that file may not have landed yet. `fetch_again` is called with a
    storage that does not match its checksum. `n_threads` read what is large, each with a buffer of `STAGING_BYTES`
    where there is something to cast or to move; for CUDA tensors `devices` says how much memory is page-locked.
    """

    def __init__(
        self,
        *,
        verify: Verify = "during",
        on_bytes: Callable[[int], None] | None = None,
        comes_in_parts: Callable[[str], bool] = lambda path: False,
        fetch_again: FetchAgain = no_store,
        n_threads: int = 1,
    ) -> None:
        self._storages = StorageReader(verify, on_bytes, comes_in_parts, fetch_again, n_threads)
        self._devices: DeviceCopies | None = None

    @property
    def fetch_again(self) -> FetchAgain:
        """What is called with a storage that does not match its checksum."""
        return self._storages.fetch_again

    def copy(
        self,
        copies: Sequence[Copy],
        memories: Mapping[str, torch.Tensor],
        first_writes: Mapping[str, FirstWrite] | None = None,
    ) -> None:
        """Fills `memories`, by `Memory.key`, as `copies` say, storage by storage in the order of the files.

        Ranges of `reading_direct` are read first, for all copies at once. `first_writes`, by key too, are noted before
        a memory is first written, once there are bytes for it.

        Raises `CorruptError` where a file is too short or a checksum differs; memories may have been written by then.
        Raises `FormatError` where torch lacks a dtype, `InternalError` where a memory is missing or is not as planned.
        """
        by_storage: dict[StorageRef, list[Copy]] = {}
        for copy in copies:
            by_storage.setdefault(copy.storage, []).append(copy)
        planned_memories = {id(copy.memory): copy.memory for copy in copies}.values()
        places = {memory.key: _place(memory, memories) for memory in planned_memories}
        noted = first_writes or {}
        devices = {memory.device for memory in places.values() if memory.is_cuda}
        with torch.no_grad(), self._filling(devices) as sending:
            planned = [
                (
                    storage,
                    [
                        each
                        for copy in _joined(by_storage[storage], places, noted)
                        for each in _slices(
                            copy, places[copy.memory.key], sending, noted.get(copy.memory.key)
                        )
                    ],
                )
                for storage in _in_file_order(by_storage)
            ]
            left = self._storages.place(planned)
            self._storages.read_all(left, lambda storage: NamesOf(by_storage[storage]))

    def verify(self, storages: Iterable[StorageRef]) -> None:
        """Compares all of `storages` with their checksums now; `copy` will not do so again.

        Storages without a checksum are passed over. Raises `CorruptError` for the first that differs.
        """
        self._storages.check(_in_file_order(set(storages)))

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
        other = TensorReader(
            verify="off",
            on_bytes=storages.on_bytes,
            comes_in_parts=storages.comes_in_parts,
            n_threads=storages.n_threads,
        )
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

    @contextlib.contextmanager
    def _filling(self, devices: set[torch.device]) -> Iterator[DeviceCopies | None]:
        """A block in which tensors on these CUDA `devices` are filled, by what it gives; None where there are none."""
        if not devices:
            yield None
            return
        if self._devices is None:
            self._devices = DeviceCopies()
        with self._devices.to(devices) as is_new:
            if is_new:
                self._storages.stage_in(self._devices.staging)
            yield self._devices


def read_tensor(
    source: SavedTensor,
    *,
    reader: TensorReader | None = None,
    device: str | torch.device = "cpu",
    name: str = "tensor",
) -> torch.Tensor:
    """A new tensor with the elements, shape, dtype and ``requires_grad`` of `source`, on ``device``.

    It is contiguous; but where `source` repeats elements of its storage (expanded), it repeats them too. Without
    ``reader``, checksums are compared as the bytes are read. Raises as `TensorReader.copy` and `copies_into` do.
    """
    reader = TensorReader() if reader is None else reader
    dtype = torch_dtype(source.dtype)
    piece = source.whole
    span = source.numel if piece is None else Layout(source.shape, piece.stride, 0).span
    if piece is not None and span < source.numel:
        # Expanded. A full copy would take as much memory as the file claims, whatever its size.
        known = SavedTensor(source.dtype, (span,), (replace(piece, region=Run(0, span), stride=(1,)),))
        result = read_tensor(known, reader=reader, device=device, name=name)
        result = result.as_strided(source.shape, piece.stride)
    else:
        result = torch.empty(source.shape, dtype=dtype, device=device)
        memory = Memory(name, source.dtype, source.shape, row_major_stride(source.shape), plain=False)
        reader.copy(list(copies_into(source, memory.whole, memory, name=name)), {name: result})
    return result.requires_grad_(source.requires_grad)


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name: ``float32`` gives ``torch.float32``. Raises `FormatError` where torch lacks it."""
    found = vars(torch).get(name)  # not by getattr, by which torch imports some of its modules
    if not isinstance(found, torch.dtype):
        raise FormatError(
            f"the checkpoint holds {name} tensors, which torch {torch.__version__} does not know"
        )
    return found


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether bytes can be read into its memory as they are: it is on the CPU, and no conjugate or negative view."""
    return tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()


def _place(planned: Memory, memories: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that `planned` stands for. Raises `InternalError` where it is missing, or not as planned."""
    found = memories.get(planned.key)
    what = "missing"
    if found is not None:
        if (
            found.dtype == torch_dtype(planned.dtype)
            and tuple(found.shape) == planned.shape
            and _same_steps(planned, found.stride())
            and not found.is_meta
        ):
            return found.detach()
        what = f"a {found.device.type} tensor of {found.dtype}, shape {tuple(found.shape)} and strides {found.stride()}"
    raise InternalError(
        f"the memory for {planned.key} is {what}; planned was {planned.dtype}, shape {planned.shape} and strides "
        f"{planned.stride}: this is a mistake in rankload; please report it"
    )


def _same_steps(planned: Memory, stride: Sequence[int]) -> bool:
    """Whether both have their elements at the same places; dimensions of one element may have any step."""
    if planned.stride == stride:
        return True
    return 0 in planned.shape or all(
        one == other or size == 1
        for one, other, size in zip(planned.stride, stride, planned.shape, strict=True)
    )


def _part(memory: torch.Tensor, target: Layout) -> torch.Tensor:
    """The part of `memory` that `target` describes, as a tensor of its shape."""
    return memory.as_strided(target.shape, target.stride, memory.storage_offset() + target.offset)


def _joined(
    copies: Iterable[Copy], places: Mapping[str, torch.Tensor], noted: Mapping[str, FirstWrite]
) -> Iterator[Copy]:
    """`copies` of one storage, with those as one that follow each other both there and in memory: an engine's flat
    memory takes thousands of parameters, which its file has side by side.

    One of several memories has the first one's name, and goes on in the storage beyond that memory.
    """
    last: Copy | None = None
    source = target = stop = 0
    for copy in copies:
        n = copy.source.numel
        if not (copy.source.is_contiguous and copy.target.is_contiguous):
            yield copy
            continue
        if (
            last is not None
            and copy.dtype == last.dtype
            and copy.source.offset == source + stop
            and (
                copy.target.offset == target + stop
                if copy.memory is last.memory
                else _goes_on(last, target + stop, copy, places)
                and noted.get(last.memory.key) is noted.get(copy.memory.key)
            )
        ):
            stop += n
            continue
        if last is not None:
            yield _run_of(last, source, target, stop)
        last, source, target, stop = copy, copy.source.offset, copy.target.offset, n
    if last is not None:
        yield _run_of(last, source, target, stop)


def _goes_on(before: Copy, stop: int, after: Copy, places: Mapping[str, torch.Tensor]) -> bool:
    """Whether what `after` fills follows element `stop` of what `before` fills: both are parts of one tensor."""
    if not (before.memory.plain and after.memory.plain) or before.memory.dtype != after.memory.dtype:
        return False
    one, other = places[before.memory.key], places[after.memory.key]
    size = one.element_size()
    return (
        one.data_ptr() + stop * size == other.data_ptr() + after.target.offset * size
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def _run_of(copy: Copy, source: int, target: int, n: int) -> Copy:
    """`copy`, of `n` elements from `source` on, in their order in both."""
    if n == copy.source.numel:
        return copy
    return replace(copy, source=Layout((n,), (1,), source), target=Layout((n,), (1,), target))


def _slices(
    copy: Copy, memory: torch.Tensor, sending: DeviceCopies | None, first_write: FirstWrite | None
) -> Iterator[StorageSlice]:
    """The slices to read for `copy`, whose elements go to its part of `memory` one by one."""
    if first_write is None:
        yield from _slices_of(copy, memory, sending)
        return
    for one in _slices_of(copy, memory, sending):
        yield replace(one, first_write=first_write)


def _slices_of(copy: Copy, memory: torch.Tensor, sending: DeviceCopies | None) -> Iterator[StorageSlice]:
    dtype = torch_dtype(copy.dtype)
    sending = sending if memory.is_cuda else None
    if not copy.source.is_contiguous:
        yield from _gathered(copy.source, _part(memory, copy.target), dtype, sending)
        return
    start = copy.source.offset * dtype.itemsize
    is_all = (
        copy.target.is_contiguous
        and not copy.target.offset
        and copy.target.numel == memory.numel()
        and memory.is_contiguous()
    )
    destination = memory if is_all else _part(memory, copy.target)
    if memory.dtype == dtype and is_plain(memory) and destination.is_contiguous():
        view = _bytes_of(destination)
        yield StorageSlice(start, len(view), view)
    else:
        yield from _staged(destination, start, dtype, sending)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if tensor.dtype in _NUMPY_HAS and tensor.numel():
        return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
    # Not view(-1): that keeps the stride of a single element, which the view as bytes refuses.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _staged(
    destination: torch.Tensor, start: int, dtype: torch.dtype, sending: DeviceCopies | None
) -> Iterator[StorageSlice]:
    """Reads a contiguous source, from byte `start` of its storage on, through a buffer into any destination."""
    step = STAGING_BYTES // dtype.itemsize
    as_it_is = destination.is_contiguous()
    if sending is not None and as_it_is and _takes_bytes_of(destination, dtype):
        yield from _sent(destination, start, sending)
        return
    if as_it_is:
        destination = destination.as_strided((destination.numel(),), (1,))
    shape = tuple(destination.shape)
    for first in range(0, destination.numel(), step):
        stop = min(first + step, destination.numel())

        def use(staged: memoryview, first: int = first, stop: int = stop) -> None:
            with _putting(staged, dtype, destination, sending, as_it_is=as_it_is) as elements:
                done = 0
                for box in row_major_boxes(shape, first, stop):
                    _put(_narrowed(destination, box), elements[done : done + box.numel].view(box.sizes))
                    done += box.numel

        yield StorageSlice(start + first * dtype.itemsize, (stop - first) * dtype.itemsize, use=use)


def _sent(destination: torch.Tensor, start: int, sending: DeviceCopies) -> Iterator[StorageSlice]:
    """Reads the bytes of a contiguous tensor on a device through a buffer: with little to do for each, since threads
    that read wait for each other meanwhile."""
    flat = destination.as_strided((destination.numel(),), (1,)).view(torch.uint8)
    device = flat.device
    for first in range(0, flat.numel(), STAGING_BYTES):
        part = flat[first : first + STAGING_BYTES]

        def use(staged: memoryview, part: torch.Tensor = part) -> None:
            with sending.queuing(device):
                _put(part, torch.frombuffer(staged, dtype=torch.uint8))

        yield StorageSlice(start + first, part.numel(), use=use)


def _takes_bytes_of(target: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether elements of `dtype` go into `target` bit by bit."""
    return target.dtype == dtype and not (target.is_conj() or target.is_neg() or target.is_inference())


def _gathered(
    source: Layout, destination: torch.Tensor, dtype: torch.dtype, sending: DeviceCopies | None
) -> Iterator[StorageSlice]:
    """Reads a strided source through a buffer into a destination of its shape."""
    for box in bounded_boxes(source, STAGING_BYTES // dtype.itemsize):
        part = source.part(box)
        target = _narrowed(destination, box)

        def use(staged: memoryview, target: torch.Tensor = target, part: Layout = part) -> None:
            with _putting(staged, dtype, target, sending, as_it_is=False) as elements:
                _put(target, elements.as_strided(part.shape, part.stride))

        yield StorageSlice(part.offset * dtype.itemsize, part.span * dtype.itemsize, use=use)


@contextlib.contextmanager
def _putting(
    staged: memoryview,
    dtype: torch.dtype,
    target: torch.Tensor,
    sending: DeviceCopies | None,
    *,
    as_it_is: bool,
) -> Iterator[torch.Tensor]:
    """A block that copies the elements that it gives, those of `staged`, into parts of `target`.

    They are on the device already where `sending` is there, unless both are laid out alike (`as_it_is`), and of one
    dtype. The block may run in any thread.
    """
    elements = torch.frombuffer(staged, dtype=torch.uint8).view(dtype)
    # What was made under inference_mode can only be changed there.
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        if sending is None:
            yield elements
            return
        with sending.queuing(target.device):
            plain = as_it_is and _takes_bytes_of(target, dtype)
            yield elements if plain else elements.to(target.device, non_blocking=elements.is_pinned())


def _put(target: torch.Tensor, elements: torch.Tensor) -> None:
    # Page-locked memory is copied later, which `PinnedStaging` knows of. Other memory is filled again at once.
    target.copy_(elements, non_blocking=target.is_cuda and elements.is_pinned())


def _narrowed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.starts, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _in_file_order(storages: Iterable[StorageRef]) -> list[StorageRef]:
    return sorted(storages, key=lambda storage: (storage.file, storage.offset))
