"""Says what a restore reads and where that goes: a `Copy` takes elements of one storage to one piece of memory. Pure.

Targets plan copies; everything else follows from them: `reads_of` gives the bytes of each storage that they read, which
is what is fetched and what is summed, and `materialize.tensors` carries them out. `copies_into` makes the copies that
fill a region of a saved tensor, `copies_of_tree` those that make a tree of saved values real.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, overload

from ..byte_ranges import ByteRange, once, overlap, union
from ..errors import LayoutError
from .dtypes import ITEMSIZE
from .regions import CoverageError, Laid, Run, as_run, row_major_stride, whole_box
from .shares import Shares
from .strided import Layout
from .tensor import SavedTensor, StorageRef, Unread, fill
from .tree import tensors

_NAMES_SHOWN = 3
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
    names: Sequence[str] = ()
    """Of the tensors that it is for, `name` first, where it is for several (`runs`)."""

    def __str__(self) -> str:
        start, stop = self.span
        how = "as they are" if self.as_it_is else f"as {self.memory.dtype} {self.target.shape}"
        more = f" and {len(self.names) - 1:,} more" if len(self.names) > 1 else ""
        return f"{self.name}{more}: bytes {start:,} to {stop:,} of {self.storage.key} into {self.memory.key}, {how}"

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


class NamesOf(Sequence[str]):
    """The names of all tensors that `copies` are for, which are made when they are asked for."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = copies

    def __len__(self) -> int:
        return sum(len(copy.names) or 1 for copy in self._copies)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return list(self)[index]

    def __iter__(self) -> Iterator[str]:
        for copy in self._copies:
            yield from copy.names or (copy.name,)


def copies_into(tensor: SavedTensor, into: Laid, memory: Memory, *, name: str) -> Iterator[Copy]:
    """The copies that fill the region `into` of `tensor`, which is laid in `memory`; `name` is for messages.

    Raises `LayoutError` where elements lie in files that were not read, or in no piece.
    """
    pieces = tensor.pieces
    if len(pieces) == 1:
        # What `fill` finds, for the tensors that a checkpoint has most of.
        piece = pieces[0]
        skipped = _elements_before(tensor.shape, piece, into)
        if skipped is not None and isinstance(piece.storage, StorageRef):
            shape, step = (into.region.numel,), (1,)
            source = Layout(shape, step, piece.offset + skipped)
            yield Copy(name, piece.storage, tensor.dtype, source, memory, Layout(shape, step, into.offset))
            return
    if isinstance(tensor.pieces, Shares):
        in_order = as_run(tensor.shape, into)
        found = (
            tensor.pieces.fill(in_order.region, in_order.offset)
            if isinstance(in_order.region, Run) and in_order.stride == (1,)
            else None
        )
        if found is not None:
            for storage, source, target in found:
                yield Copy(name, storage, tensor.dtype, source, memory, target)
            return
    try:
        for piece, source, target in fill(tensor, into):
            if isinstance(piece.storage, Unread):
                raise LayoutError(f"{name} {piece.storage.reason}")
            yield Copy(name, piece.storage, tensor.dtype, source, memory, target)
    except CoverageError as error:
        raise LayoutError(f"{name}: {error}") from error


def _elements_before(shape: tuple[int, ...], piece: Laid, into: Laid) -> int | None:
    """How many elements of `piece` come before those of `into`, where it has all of these and both lie in row-major
    order without gaps; None otherwise, and where `into` has no element.
    """
    have, want = piece.region, into.region
    if isinstance(want, Run):
        start, length = want.start, want.length
        wanted_in_order = into.stride == (1,)
    else:
        start, length = 0, want.numel
        wanted_in_order = into.stride == row_major_stride(shape) and want == whole_box(shape)
    if isinstance(have, Run):
        first, count = have.start, have.length
        held_in_order = piece.stride == (1,)
    else:
        first, count = 0, have.numel
        held_in_order = piece.stride == row_major_stride(shape) and have == whole_box(shape)
    if not (length and wanted_in_order and held_in_order and first <= start):
        return None
    return start - first if start + length <= first + count else None


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
    found: dict[StorageRef, _Reads] = {}
    # Most copies have the same few objects for storages, which need not be compared then.
    known: dict[int, tuple[StorageRef, _Reads]] = {}
    for copy in copies:
        at = known.get(id(copy.storage))
        if at is None:
            at = known[id(copy.storage)] = copy.storage, found.setdefault(copy.storage, _Reads())
        at[1].add(copy)
    in_order = sorted(found, key=lambda storage: (storage.file, storage.offset))
    return {storage: found[storage].finished() for storage in in_order}


class _Reads:
    """What the copies so far read of one storage. Those that follow each other, as most do, are one range at once."""

    __slots__ = ("_direct", "_names", "_ranges")

    def __init__(self) -> None:
        # Each as the edges of ranges: start, stop, start, stop ...
        self._ranges: list[int] = []
        self._direct: list[int] = []
        self._names: tuple[str, ...] = ()

    def add(self, copy: Copy) -> None:
        source = copy.source
        size = ITEMSIZE[copy.dtype]
        start, stop = source.offset * size, (source.offset + source.span) * size
        for edges in (self._ranges, self._direct) if copy.as_it_is else (self._ranges,):
            if edges and edges[-1] == start:
                edges[-1] = stop
            else:
                edges += (start, stop)
        if len(self._names) < _NAMES_SHOWN and copy.name:
            new = dict.fromkeys((*self._names, copy.name, *copy.names[:_NAMES_SHOWN]))
            self._names = tuple(islice(new, _NAMES_SHOWN))

    def finished(self) -> StorageReads:
        if len(self._ranges) == 2 and self._direct in ([], self._ranges):
            # One range, as of most storages of a file with one for each tensor.
            one = ByteRange(self._ranges[0], self._ranges[1])
            return StorageReads([one], self._names, [one] if self._direct else [])
        ranges, direct = (
            [ByteRange(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
            for edges in (self._ranges, self._direct)
        )
        if len(ranges) > 1:
            direct = list(overlap(once(ranges), union(direct)))
            ranges = list(union(ranges))
        return StorageReads(ranges, self._names, direct)
