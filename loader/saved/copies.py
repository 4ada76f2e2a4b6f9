"""Says what a restore reads and where that goes: a `Copy` takes elements of one storage to one piece of memory. Pure.

Targets plan copies; everything else follows from them: `reads_of` gives the bytes of each storage that they read, which
is what is fetched and what is summed, and `materialize.tensors` carries them out. `copies_into` makes the copies that
fill a region of a saved tensor, `copies_of_tree` those that make a tree of saved values real.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..byte_ranges import ByteRange, once, overlap, union
from ..errors import LayoutError
from .dtypes import ITEMSIZE
from .regions import CoverageError, Laid, row_major_stride, whole_box
from .strided import Layout
from .tensor import SavedTensor, StorageRef, Unread, fill
from .tree import tensors

_ALIGNMENT = 16
"""What is read of a storage for a tree begins at a multiple of this, so that a tensor of any dtype begins at a whole
element."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A tensor that copies fill, as the plan knows it: it may not exist before the plan is carried out."""

    key: str
    """Its name in the step that fills it; unique there."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    plain: bool
    """Whether bytes can be read into it as they are: it is on the CPU, and no conjugate or negative view."""

    @property
    def whole(self) -> Laid:
        """All of its elements, as the region of a tensor of its shape."""
        return Laid(whole_box(self.shape), 0, self.stride)


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """Elements of a storage, and the part of a piece of memory that they fill. Both layouts have the same shape."""

    name: str
    """What messages call the tensor that it is for."""
    storage: StorageRef
    dtype: str
    """Of the saved elements."""
    source: Layout
    """Where they lie in the storage, in elements of `dtype`."""
    memory: Memory
    target: Layout
    """Where they go in the memory, in its elements from its first one on."""

    def __str__(self) -> str:
        start, stop = self.span
        how = "as they are" if self.as_it_is else f"as {self.memory.dtype} {self.target.shape}"
        return f"{self.name}: bytes {start:,} to {stop:,} of {self.storage.key} into {self.memory.key}, {how}"

    @property
    def span(self) -> ByteRange:
        """The bytes of the storage from the first element to the last one; gaps between them included."""
        size = ITEMSIZE[self.dtype]
        return ByteRange(self.source.offset * size, (self.source.offset + self.source.span) * size)

    @property
    def as_it_is(self) -> bool:
        """Whether the bytes can be read into their place unchanged."""
        return (
            self.memory.plain
            and self.memory.dtype == self.dtype
            and self.source.is_contiguous
            and self.target.is_contiguous
        )


@dataclass
class StorageReads:
    """The bytes of one storage that a rank reads."""

    ranges: list[ByteRange] = field(default_factory=list)
    """Disjoint and in order."""
    names: tuple[str, ...] = ()
    """A few of the tensors that they are for."""
    direct: list[ByteRange] = field(default_factory=list)
    """The part of `ranges` that goes unchanged into one tensor's memory, and may be fetched directly into it."""

    @property
    def nbytes(self) -> int:
        """How many bytes are read."""
        return sum(stop - start for start, stop in self.ranges)


def copies_into(tensor: SavedTensor, into: Laid, memory: Memory, *, name: str) -> Iterator[Copy]:
    """The copies that fill the region `into` of `tensor`, which is laid in `memory`; `name` is for messages.

    Raises `LayoutError` where elements lie in files that were not read, or in no piece.
    """
    piece = tensor.whole
    if piece is not None and isinstance(piece.storage, StorageRef) and into.region == piece.region:
        in_order = row_major_stride(tensor.shape)
        if piece.stride == into.stride == in_order and (n := tensor.numel):
            # What `fill` finds, for the tensors that a checkpoint has most of.
            source, target = Layout((n,), (1,), piece.offset), Layout((n,), (1,), into.offset)
            yield Copy(name, piece.storage, tensor.dtype, source, memory, target)
            return
    try:
        for piece, source, target in fill(tensor, into):
            if isinstance(piece.storage, Unread):
                raise LayoutError(f"{name} {piece.storage.reason}")
            yield Copy(name, piece.storage, tensor.dtype, source, memory, target)
    except CoverageError as error:
        raise LayoutError(f"{name}: {error}") from error


def copies_of_tree(tree: Any, *, path: str = "", owner: str = "") -> list[Copy]:
    """The copies that `materialize.objects.materialize` makes before it builds `tree`, whose own place is `path`.

    The keys of their memories begin with `owner`, so that two trees that are made at once have memory of their own.

    Of each storage they take the bytes from the first to the last that tensors reach, into memory of that size, because
    tensors that share a storage share memory. A tensor in several pieces gets memory of its own.
    """
    extents: dict[StorageRef, tuple[int, int, str]] = {}
    found: list[Copy] = []
    for where, tensor in tensors(tree, path=path):
        if not tensor.numel:
            continue
        piece = tensor.whole
        if piece is None or not isinstance(piece.storage, StorageRef):
            memory = Memory(
                owner + apart(tensor), tensor.dtype, tensor.shape, row_major_stride(tensor.shape), plain=False
            )
            found.extend(copies_into(tensor, memory.whole, memory, name=where))
            continue
        size = tensor.itemsize
        first = piece.offset * size
        stop = (piece.offset + Layout(tensor.shape, piece.stride, 0).span) * size
        low, high, name = extents.get(piece.storage, (first, stop, where))
        extents[piece.storage] = (min(low, first), max(high, stop), name)
    for storage, (low, high, name) in extents.items():
        low -= low % _ALIGNMENT
        memory = Memory(owner + shared(storage), "uint8", (high - low,), (1,), plain=False)
        found.append(
            Copy(
                name,
                storage,
                "uint8",
                Layout((high - low,), (1,), low),
                memory,
                Layout((high - low,), (1,), 0),
            )
        )
    return found


def shared(storage: StorageRef) -> str:
    """The key of the memory that `copies_of_tree` reads a storage into."""
    return f"{storage.file}:{storage.key}@{storage.offset}"


def apart(tensor: SavedTensor) -> str:
    """The key of the memory that `copies_of_tree` reads a tensor in several pieces into."""
    return f"tensor {id(tensor)}"


def reads_of(copies: Iterable[Copy]) -> dict[StorageRef, StorageReads]:
    """The bytes that `copies` read, by storage, in the order of the files.

    Bytes that two copies read are not `StorageReads.direct`: they would have to be fetched twice.
    """
    found: dict[StorageRef, StorageReads] = {}
    for copy in copies:
        reads = found.setdefault(copy.storage, StorageReads())
        span = copy.span
        reads.ranges.append(span)
        if copy.as_it_is:
            reads.direct.append(span)
        if len(reads.names) < 3 and copy.name and copy.name not in reads.names:
            reads.names = (*reads.names, copy.name)
    for reads in found.values():
        if len(reads.ranges) > 1:
            reads.direct = list(overlap(once(reads.ranges), union(reads.direct)))
            reads.ranges = list(union(reads.ranges))
    return {one: found[one] for one in sorted(found, key=lambda storage: (storage.file, storage.offset))}
