"""Compares two checkpoints: `compare_checkpoints`, from their paths to where they differ."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..alone import EVERYTHING, OUTLINE, OpenCheckpoint, open_alone
from ..byte_ranges import ByteRange
from ..collector import collect_young
from ..errors import OptionError
from ..materialize.tensors import TensorReader, read_tensor, torch_dtype
from ..options import LoadOptions, Options, resolve_options
from ..plurals import counted
from ..ranges.direct import DirectReads
from ..saved.copies import Copy, Memory, copies_into, reads_of
from ..saved.regions import Laid, Run, row_major_stride
from ..saved.strided import Box, Layout
from ..saved.tensor import SavedTensor, same_shape
from ..torch_modes import default_modes
from .elements import Differing, Tolerance
from .leaves import MASTERS, Pairing, Path, Side, key_text, matching, pair, side_of, text_of, values_equal
from .results import Comparison, Difference

PIECE_BYTES = 8 << 20
"""Bytes of a tensor, or of several small ones, that are read of each checkpoint at a time."""
_ITEM_BYTES = 8
"""What an element takes at least while it is compared."""
_MOST_AT_ONCE = 4096
"""Pieces that are read at a time."""
_ALIGNMENT = 16
"""Pieces in the buffer begin at multiples of this."""


@dataclass(frozen=True)
class Watch:
    """Hears how far it is; what it raises ends the work."""

    begin: Callable[[int], None] = lambda elements: None
    """With how many elements are compared."""
    on_elements: Callable[[int], None] = lambda elements: None


def compare_checkpoints(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    weights_only: bool = False,
    keys_only: bool = False,
    grep: str | None = None,
    exact_names: bool = False,
    rtol: float = 0.0,
    atol: float = 0.0,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    other_options: Options | LoadOptions | Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Comparison:
    """Tells where two checkpoints of any kinds differ: names, shapes, dtypes, elements of tensors, and other values.

    Parameters that wrappers call otherwise are the same (``module.``, ``_orig_mod.``), as in a load. Where weights have
    different dtypes, and one checkpoint keeps fp32 masters in the other's dtype, these are compared. Of each checkpoint
    a few MiB are read at a time; what is read of a remote store is kept nowhere, but for indexes and small files.

    Args:
        a: the first checkpoint, as `load` takes it.
        b: the second one.
        weights_only: compares the models' parameters and buffers alone.
        keys_only: compares names, shapes and dtypes alone; no tensor is read, and no other value compared.
        grep: compares only places whose key holds this text, or matches it where it is a glob.
        exact_names: takes names that differ for different ones; ``rename`` of `options` is applied all the same.
        rtol: by how much elements may differ, relative to B's.
        atol: by how much they may differ besides.
        object_store: as `load` takes it; both are in it.
        options: `LoadOptions`, or a mapping of its fields; ``rename`` is applied to A's names.
        other_options: those of B, where they are others.
        watch: hears how far it is.

    Raises:
        RankloadError: as `open_alone`, for either; `CorruptError` where bytes are missing, `LayoutError` where elements
            of a tensor are in no file, `OptionError` for a negative tolerance.
    """
    tolerance = Tolerance(_checked("rtol", rtol), _checked("atol", atol))
    own = options if isinstance(options, Options) else resolve_options(options)
    other = own if other_options is None else other_options
    other = other if isinstance(other, Options) else resolve_options(other)
    # With the fp32 masters, which are weights.
    demand = OUTLINE if keys_only else replace(EVERYTHING, optimizer=not weights_only)
    with contextlib.ExitStack() as leaving:
        leaving.enter_context(default_modes())
        sides = [
            # Small items of a remote DCP folder are not to fill this node's cache.
            leaving.enter_context(
                open_alone(
                    path,
                    demand,
                    object_store=object_store,
                    options=replace(each, mode="direct", verify="off"),
                )
            )
            for path, each in ((a, own), (b, other))
        ]
        return _compared(
            sides[0],
            sides[1],
            _How(weights_only, keys_only, grep, exact_names, own.rename, tolerance, watch or Watch()),
        )


@dataclass(frozen=True)
class _How:
    weights_only: bool
    keys_only: bool
    grep: str | None
    exact_names: bool
    rename: Mapping[str, str]
    tolerance: Tolerance
    watch: Watch


@dataclass
class _Pair:
    """Two tensors of one number of elements."""

    key: str
    other_key: str
    a: SavedTensor
    b: SavedTensor
    found: Differing = field(default_factory=Differing)


def _compared(a: OpenCheckpoint, b: OpenCheckpoint, how: _How) -> Comparison:
    side_a, side_b = (side_of(one.saved, weights_only=how.weights_only) for one in (a, b))
    paired = _only(pair(side_a, side_b, rename=how.rename, exact=how.exact_names), how.grep)
    differences: dict[tuple[Path, Path], list[Difference]] = {}
    pairs: dict[tuple[Path, Path], _Pair] = {}
    notes = [*paired.notes]
    from_masters: dict[str, set[str]] = {"A": set(), "B": set()}
    """Of each side the weights whose masters are compared."""
    for path, other in paired.pairs:
        value, theirs = side_a.leaves[path], side_b.leaves[other]
        where = (key_text(path), key_text(other))
        said = differences.setdefault((path, other), [])
        if isinstance(value, SavedTensor) and isinstance(theirs, SavedTensor):
            value, theirs, whose = _in_one_dtype(path, other, side_a, side_b, value, theirs)
            if whose:
                from_masters[whose].add(path[-1] if whose == "A" else other[-1])
            said += _shapes(*where, value, theirs)
            if not how.keys_only and same_shape(value.shape, theirs.shape):
                pairs[path, other] = _Pair(*where, value, theirs)
        elif (
            isinstance(value, SavedTensor)
            or isinstance(theirs, SavedTensor)
            or type(value) is not type(theirs)
        ):
            said.append(Difference(*where, "kind", text_of(value), text_of(theirs)))
        elif not how.keys_only and not values_equal(value, theirs, paired.renamed, how.tolerance.allows):
            said.append(Difference(*where, "value", text_of(value), text_of(theirs)))
    for which, names in from_masters.items():
        if names:
            other_one = "B" if which == "A" else "A"
            notes.append(
                f"{counted(len(names), 'weight')} of {which} compared by its fp32 masters: {other_one} keeps fp32"
            )
    _count(list(pairs.values()), a, b, how)
    for place, one in pairs.items():
        if one.found.differing:
            differences[place].append(_of_elements(one))
    only_a = map(key_text, _unused(paired.only_a, side_a, from_masters["A"]))
    only_b = map(key_text, _unused(paired.only_b, side_b, from_masters["B"]))
    return Comparison(
        a.saved.name,
        b.saved.name,
        a.saved.kind,
        b.saved.kind,
        tuple(only_a),
        tuple(only_b),
        tuple(one for said in differences.values() for one in said),
        sum(not said for said in differences.values()),
        sum(one.a.numel for one in pairs.values()),
        how.keys_only,
        paired.renamed,
        tuple(notes),
    )


def _only(paired: Pairing, grep: str | None) -> Pairing:
    if grep is None:
        return paired
    wanted = matching(grep)
    return replace(
        paired,
        pairs=tuple((path, other) for path, other in paired.pairs if wanted(path) or wanted(other)),
        only_a=tuple(filter(wanted, paired.only_a)),
        only_b=tuple(filter(wanted, paired.only_b)),
    )


def _in_one_dtype(
    path: Path, other: Path, a: Side, b: Side, value: SavedTensor, theirs: SavedTensor
) -> tuple[SavedTensor, SavedTensor, str]:
    """The two tensors to compare, and whose master is one of them: where dtypes differ, it may be in the other's."""
    if value.dtype == theirs.dtype or path[:2] != ("state", "model"):
        return value, theirs, ""
    master = a.masters.get(path[-1])
    if master is not None and master.dtype == theirs.dtype and same_shape(master.shape, value.shape):
        return master, theirs, "A"
    master = b.masters.get(other[-1])
    if master is not None and master.dtype == value.dtype and same_shape(master.shape, theirs.shape):
        return value, master, "B"
    return value, theirs, ""


def _unused(only: Sequence[Path], side: Side, compared: Collection[str]) -> list[Path]:
    """`only` without masters that were compared with the other side's weights: those of `compared`, by any name."""

    def owner(name: str) -> str:
        return side.tied.get(name, name)

    owners = {owner(name) for name in compared}
    return [path for path in only if not (path[0] == MASTERS and owner(path[1]) in owners)]


def _shapes(key: str, other_key: str, a: SavedTensor, b: SavedTensor) -> Iterator[Difference]:
    if not same_shape(a.shape, b.shape):
        yield Difference(key, other_key, "shape", str(a.shape), str(b.shape))
    if a.dtype != b.dtype:
        yield Difference(key, other_key, "dtype", a.dtype, b.dtype)


def _of_elements(one: _Pair) -> Difference:
    found, shape = one.found, one.a.shape
    first = None
    if found.first is not None:
        steps = row_major_stride(shape)
        first = tuple(
            found.first // step % size if step else 0 for step, size in zip(steps, shape, strict=True)
        )
    return Difference(
        one.key,
        one.other_key,
        "elements",
        text_of(one.a),
        text_of(one.b),
        found.differing,
        one.a.numel,
        found.max_abs,
        found.only_a_nan,
        found.only_b_nan,
        first,
    )


def _count(pairs: Sequence[_Pair], a: OpenCheckpoint, b: OpenCheckpoint, how: _How) -> None:
    """Reads all pairs, some pieces at a time, and counts where they differ."""
    how.watch.begin(sum(one.a.numel for one in pairs))
    readers = _Pieces(a), _Pieces(b)
    for batch in _batches(pairs):
        mine_read = readers[0].read([(one.a, run) for one, run in batch])
        theirs_read = readers[1].read([(one.b, run) for one, run in batch])
        for (one, run), mine, theirs in zip(batch, mine_read, theirs_read, strict=True):
            one.found.count(mine, theirs, run.start, how.tolerance)
            how.watch.on_elements(run.length)
        collect_young()


def _batches(pairs: Sequence[_Pair]) -> Iterator[list[tuple[_Pair, Run]]]:
    """Pieces of the pairs, in order; together those of a batch have about `PIECE_BYTES`, and are read at once."""
    batch: list[tuple[_Pair, Run]] = []
    held = 0
    for one in pairs:
        size = max(_ITEM_BYTES, one.a.itemsize, one.b.itemsize)
        step = PIECE_BYTES // size
        for start in range(0, one.a.numel, step):
            run = Run(start, min(step, one.a.numel - start))
            if batch and (held + run.length * size > PIECE_BYTES or len(batch) == _MOST_AT_ONCE):
                yield batch
                batch, held = [], 0
            batch.append((one, run))
            held += run.length * size
    if batch:
        yield batch


class _Pieces:
    """Reads pieces of one checkpoint's tensors; those of remote files straight from their store."""

    def __init__(self, opened: OpenCheckpoint) -> None:
        self._files = opened.files
        self._known = opened.files.remote.known
        self._reader = TensorReader(verify="off")
        self._whole: tuple[SavedTensor, torch.Tensor] | None = None
        # One for all batches: what reads ranges is in cycles, which would keep each batch's own for a while.
        self._buffer = torch.empty(PIECE_BYTES + _MOST_AT_ONCE * _ALIGNMENT, dtype=torch.uint8)

    def read(self, wanted: Sequence[tuple[SavedTensor, Run]]) -> list[torch.Tensor]:
        """The elements of each run, in row-major order and the saved dtype, until the next call.

        Raises as `TensorReader.copy`.
        """
        found: list[torch.Tensor] = []
        memories: dict[str, torch.Tensor] = {}
        copies: list[Copy] = []
        taken = 0
        for number, (tensor, run) in enumerate(wanted):
            if _out_of_order(tensor):
                found.append(self._all_of(tensor).reshape(-1)[run.start : run.stop])
                continue
            key, nbytes = str(number), run.length * tensor.itemsize
            memories[key] = self._buffer[taken : taken + nbytes].view(torch_dtype(tensor.dtype))
            taken += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            memory = Memory(key, tensor.dtype, (run.length,), (1,), plain=True)
            copies += copies_into(tensor, Laid(run, 0, (1,)), memory, name="a tensor")
            found.append(memories[key])
        with self._direct(copies):
            self._reader.copy(copies, memories)
        return found

    def _all_of(self, tensor: SavedTensor) -> torch.Tensor:
        """All of a tensor whose pieces would each read all of its storage: of the last one only, it stays in memory."""
        if self._whole is None or self._whole[0] is not tensor:
            self._whole = None
            memory = Memory("all", tensor.dtype, tensor.shape, row_major_stride(tensor.shape), plain=False)
            copies = list(copies_into(tensor, memory.whole, memory, name="a tensor"))
            with self._direct(copies):
                self._whole = tensor, read_tensor(tensor, reader=self._reader).detach()
        return self._whole[1]

    @contextlib.contextmanager
    def _direct(self, copies: Sequence[Copy]) -> Iterator[None]:
        """A block in which what `copies` read of files that come in parts is read from their store."""
        ranges: dict[str, list[ByteRange]] = {}
        for storage, reads in reads_of(copies).items():
            if storage.file in self._known:
                spans = ranges.setdefault(storage.file, [])
                spans += (
                    ByteRange(storage.offset + start, storage.offset + stop) for start, stop in reads.ranges
                )
        store = self._files.context.store
        self._reader.reading_direct(
            DirectReads(ranges, lambda path: self._known.open_source(store, path), lambda count: None)
            if ranges
            else None
        )
        try:
            yield
        finally:
            self._reader.reading_direct(None)


def _out_of_order(tensor: SavedTensor) -> bool:
    """Whether pieces of it would each read more of a storage than they have elements."""
    return tensor.nbytes > PIECE_BYTES and any(
        isinstance(piece.region, Box) and not Layout(piece.region.sizes, piece.stride, 0).is_contiguous
        for piece in tensor.pieces
    )


def _checked(name: str, value: float) -> float:
    if not value >= 0:
        raise OptionError(f"{name}={value}: expected 0 or more")
    return value
