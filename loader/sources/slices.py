"""Opens what torch's ``HuggingFaceStorageWriter(save_distributed=True)`` saves: each rank's slices as safetensors.

The files are called ``shard-R-model-I-of-N.safetensors``: rank R, from 1 on, saved its slices in up to N files. No file
says how many ranks there were, nor how large a tensor is: each has the offsets of its own slices. So a tensor reaches
as far as its slices do, and they must hold each of its elements once, which tells of any lost file but the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CorruptError, FormatError, LayoutError, NotFoundError
from ..formats.strict_json import parse_json
from ..formats.torch_file import FileIndex
from ..saved.contents import Saved
from ..saved.demand import Demand
from ..saved.node_file import NodeFile
from ..saved.regions import CoverageError, row_major_stride
from ..saved.strided import Box
from ..saved.tensor import Piece, SavedTensor
from ..stores.locate import SLICES_FILE
from .base import Files

_OFFSETS = "DCP_SHARDING_INFO"
"""The metadata that have the offsets, as JSON: ``{NAME: {"saved_offsets": [...]}}``."""
_FIRST_RANKS = 8
"""How many ranks' files are asked for at first; each further time twice as many."""
_MOST_DIMENSIONS = 8
"""Of a tensor in slices: whether these cover it takes time that doubles with each dimension."""
_LARGEST = (1 << 63) - 1


class Slices:
    """A model of which each rank saved its slices, without a file that lists them: weights, and nothing else."""

    def recognises(self, files: Files) -> bool:
        return files.in_folder and SLICES_FILE.fullmatch(files.first.name) is not None

    def open(self, files: Files, demand: Demand) -> Saved:
        by_rank = _fetched(files)
        with files.stage("read"):
            slices: dict[str, list[tuple[tuple[int, ...], SavedTensor, str]]] = {}
            for of_rank in by_rank.values():
                for file in of_rank:
                    index = files.index(file)
                    for name, (start, tensor) in _slices_of(index).items():
                        slices.setdefault(name, []).append((start, tensor, index.name))
            model = {name: _whole(name, found, files.name) for name, found in slices.items()}
            note = (
                f"{files.name} does not say how many ranks saved it: files of {len(by_rank)} were found, and what "
                "further ones held would be missing from the ends of tensors"
            )
            return Saved(
                files.name, "slices", "safetensors", {"model": model}, world_size=len(by_rank), notes=(note,)
            )


def _fetched(files: Files) -> dict[int, list[NodeFile]]:
    """The files of all saved ranks, by rank, fetched to this node. Every rank must call.

    Raises `NotFoundError` where a rank has none, and one after it has.
    """
    match = SLICES_FILE.fullmatch(files.first.name)
    parts = int(match["parts"]) if match else 0
    found: dict[int, list[NodeFile]] = {}
    first, count = 1, _FIRST_RANKS
    while first == 1 or first - 1 in found:
        ranks = range(first, first + count)
        names = {
            f"shard-{rank:05}-model-{part:05}-of-{parts:05}.safetensors": rank
            for rank in ranks
            for part in range(1, parts + 1)
        }
        fetched = files.fetch(list(names), "fetch", optional=True)
        for name, file in fetched.items():
            found.setdefault(names[name], []).append(file)
        first, count = first + count, 2 * count
    lost = sorted(set(range(1, max(found, default=0))) - found.keys())
    if lost or not found:
        shown = ", ".join(f"shard-{rank:05}-model-..." for rank in lost[:8] or [1])
        raise NotFoundError(
            f"{files.name} lacks the files of a rank between others that are there: {shown}. Fetch them again.",
            path=files.name,
        )
    return found


def _slices_of(index: FileIndex) -> dict[str, tuple[tuple[int, ...], SavedTensor]]:
    """Where each tensor of a file begins in the whole one, and the tensor, by name."""
    if index.format != "safetensors" or _OFFSETS not in index.metadata:
        raise FormatError(
            f"{index.name} is called as torch's HuggingFaceStorageWriter calls a rank's slices, and does not say where "
            f"they lie ({_OFFSETS} in its metadata)",
            path=index.name,
        )
    offsets = parse_json(index.metadata[_OFFSETS].encode(), name=index.name, what=_OFFSETS)
    known: Mapping[str, Any] = offsets if isinstance(offsets, dict) else {}
    found = {}
    for name, tensor in index.tree.items():
        entry = known.get(name)
        start = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if (
            not isinstance(start, list)
            or len(start) != len(tensor.shape)
            or not all(type(one) is int and 0 <= one <= _LARGEST for one in start)
        ):
            raise CorruptError(
                f"{index.name}: {_OFFSETS} has {str(start)[:80]} for tensor {name!r} of shape {tensor.shape}, expected "
                "an offset for each dimension.",
                path=index.name,
            )
        found[name] = tuple(start), tensor
    return found


def _whole(name: str, slices: list[tuple[tuple[int, ...], SavedTensor, str]], shown: str) -> SavedTensor:
    """The tensor that `slices` make up, each with where it begins and the file that it is in."""
    _, one, file = slices[0]
    dimensions = len(one.shape)
    for _, other, other_file in slices:
        if (other.dtype, len(other.shape)) != (one.dtype, dimensions):
            raise LayoutError(
                f"{shown}: {name!r} is {one.dtype} of {dimensions} dimensions in {file}, and {other.dtype} of "
                f"{len(other.shape)} in {other_file}: they were not saved together",
                path=shown,
            )
    if dimensions > _MOST_DIMENSIONS:
        raise LayoutError(
            f"{file}: {name!r} is a slice of {dimensions} dimensions; at most {_MOST_DIMENSIONS} are supported",
            path=file,
        )
    ends = zip(
        *([at + size for at, size in zip(start, part.shape, strict=True)] for start, part, _ in slices),
        strict=True,
    )
    shape = tuple(map(max, ends))
    try:
        return SavedTensor.in_pieces(one.dtype, shape, list(_pieces(slices)))
    except CoverageError as error:
        raise LayoutError(
            f"{shown}: the slices of {name!r} in {len(slices)} files do not make up a tensor of shape {shape}: "
            f"{error}. A file is missing, or they are of several saves.",
            path=shown,
        ) from error


def _pieces(slices: Iterable[tuple[tuple[int, ...], SavedTensor, str]]) -> Iterable[Piece]:
    for start, tensor, _ in slices:
        yield Piece(Box(start, tensor.shape), 0, row_major_stride(tensor.shape), tensor.pieces[0].storage)
