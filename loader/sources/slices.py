"""Opens what torch's ``HuggingFaceStorageWriter(save_distributed=True)`` saves: each rank's slices as safetensors.

The files are called ``shard-R-model-I-of-N.safetensors``: rank R, from 1 on, saved its slices in up to N files. No file
says how many ranks there were, nor how large a tensor is: each has the offsets of its own slices. So a tensor reaches
as far as its slices do, and they must hold each of its elements once, which tells of any lost file but the last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError, FormatError, LayoutError, NotFoundError
from ..formats.strict_json import parse_json
from ..formats.torch_file import FileIndex
from ..saved.contents import Saved, SetFile
from ..saved.demand import Demand
from ..saved.regions import CoverageError, row_major_stride
from ..saved.strided import Box
from ..saved.tensor import Piece, SavedTensor
from ..stores.locate import SLICES_FILE
from .base import Files

_OFFSETS = "DCP_SHARDING_INFO"
"""The metadata that have the offsets, as JSON: ``{NAME: {"saved_offsets": [...]}}``."""
_FIRST_RANKS = 8
"""How many ranks' files are asked for at least; else twice as many as there are, so that a gap shows."""
_MOST_DIMENSIONS = 8
"""Of a tensor in slices: whether these cover it takes time that doubles with each dimension."""
_LARGEST = (1 << 63) - 1


class Slices:
    """A model of which each rank saved its slices, without a file that lists them: weights, and nothing else."""

    def recognises(self, files: Files) -> bool:
        return files.in_folder and SLICES_FILE.fullmatch(files.first.name) is not None

    def open(self, files: Files, demand: Demand) -> Saved:
        by_rank, names = _slices_of_ranks(files)
        with files.stage("read"):
            slices: dict[str, list[_Slice]] = {}
            for of_rank in by_rank.values():
                for one in of_rank:
                    slices.setdefault(one.name, []).append(one)
            model = {name: _whole(found, files.name) for name, found in slices.items()}
            note = (
                f"{files.name} does not say how many ranks saved it: files of {len(by_rank)} were found, and what "
                "further ones held would be missing from the ends of tensors"
            )
            return Saved(
                files.name,
                "slices",
                "safetensors",
                {"model": model},
                world_size=len(by_rank),
                notes=(note,),
                files=tuple(map(SetFile, names)),
            )


@dataclass(frozen=True, slots=True)
class _Slice:
    """What one file has of a tensor."""

    name: str
    start: tuple[int, ...]
    """Where it begins in the whole tensor."""
    tensor: SavedTensor
    file: str


def _slices_of_ranks(files: Files) -> tuple[dict[int, list[_Slice]], list[str]]:
    """What the files of all saved ranks have, by rank, and their names. Every rank must call.

    They are fetched to this node.

    Raises `NotFoundError` where a rank has no file, and one after it has.
    """
    match = SLICES_FILE.fullmatch(files.first.name)
    parts = int(match["parts"]) if match else 0
    found: dict[int, list[_Slice]] = {}
    held: list[str] = []
    asked = 0
    while asked < (last := max(_FIRST_RANKS, 2 * max(found, default=0))):
        names = {
            f"shard-{rank:05}-model-{part:05}-of-{parts:05}.safetensors": rank
            for rank in range(asked + 1, last + 1)
            for part in range(1, parts + 1)
        }
        fetched = files.fetch(list(names), "fetch", optional=True)
        with files.stage("read slices"):
            # Before more is asked for: a server may answer to every name.
            for name, file in fetched.items():
                found.setdefault(names[name], []).extend(_slices_of(files.index(file)))
                held.append(name)
        asked = last
    lost = sorted(set(range(1, max(found, default=0))) - found.keys())
    if lost or not found:
        shown = ", ".join(f"shard-{rank:05}-model-..." for rank in lost[:8] or [1])
        raise NotFoundError(
            f"{files.name} lacks the files of a rank between others that are there: {shown}. Copy them too.",
            path=files.name,
        )
    return found, held


def _slices_of(index: FileIndex) -> Iterator[_Slice]:
    if index.format != "safetensors" or _OFFSETS not in index.metadata:
        raise FormatError(
            f"{index.name} is called as torch's HuggingFaceStorageWriter calls a rank's slices, and does not say where "
            f"they lie ({_OFFSETS} in its metadata)",
            path=index.name,
        )
    offsets = parse_json(index.metadata[_OFFSETS].encode(), name=index.name, what=_OFFSETS)
    known: Mapping[str, Any] = offsets if isinstance(offsets, dict) else {}
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
        yield _Slice(name, tuple(start), tensor, index.name)


def _whole(slices: Sequence[_Slice], shown: str) -> SavedTensor:
    """The tensor that `slices` make up; messages call the checkpoint `shown`."""
    one = slices[0]
    dtype, dimensions = one.tensor.dtype, len(one.start)
    for other in slices:
        if (other.tensor.dtype, len(other.start)) != (dtype, dimensions):
            raise CorruptError(
                f"{shown}: {one.name!r} is {dtype} of {dimensions} dimensions in {one.file}, and "
                f"{other.tensor.dtype} of {len(other.start)} in {other.file}: they were not saved together",
                path=shown,
            )
    if dimensions > _MOST_DIMENSIONS:
        raise LayoutError(
            f"{one.file}: {one.name!r} is a slice of {dimensions} dimensions; at most {_MOST_DIMENSIONS} are supported",
            path=one.file,
        )
    shape = tuple(
        max(each.start[dim] + each.tensor.shape[dim] for each in slices) for dim in range(dimensions)
    )
    pieces = [
        Piece(
            Box(each.start, each.tensor.shape),
            0,
            row_major_stride(each.tensor.shape),
            each.tensor.pieces[0].storage,
        )
        for each in slices
    ]
    try:
        return SavedTensor.in_pieces(dtype, shape, pieces)
    except CoverageError as error:
        raise CorruptError(
            f"{shown}: the slices of {one.name!r} in {len(slices)} files do not make up a tensor of shape {shape}: "
            f"{error}. A file is missing, or they are of several saves.",
            path=shown,
        ) from error
