"""Lays a checkpoint out as a DCP folder: torch.distributed.checkpoint's, of one rank, with one chunk for each tensor.

Keys are the paths in the nested dict, joined by dots, as DCP flattens a state dict. A dict whose keys are no text is
one value, unless it has tensors: then its keys become text, as in DCP. Names of tied weights share one item.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError
from .pieces import Pieces, Write
from .real import tensors_of
from .select import OutTensor
from .torch_stream import OVERHEAD_BYTES, write_torch

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Item:
    """One value of the folder: a tensor, or whatever else `write_torch` saves."""

    path: Path
    value: Any

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def size_bytes(self) -> int:
        """About what it takes in a file."""
        return OVERHEAD_BYTES + sum(one.nbytes for one in tensors_of(self.value))


@dataclass
class DcpFolder:
    """Items in files, and where in them each was written."""

    files: dict[str, list[Item]]
    places: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """By key: file, offset and length, once `write_file` has written it."""

    def write_file(self, name: str, pieces: Pieces, write: Write) -> None:
        """Writes the file `name`, by calls of `write`. Raises as `write_torch`."""
        position = 0

        def count(view: memoryview) -> None:
            nonlocal position
            write(view)
            position += len(view)

        for item in self.files[name]:
            start = position
            write_torch(item.value, pieces, count)
            self.places[item.key] = name, start, position - start

    def metadata(self, aliases: Mapping[Path, Path]) -> bytes:
        """The ``.metadata``, once all files were written; `aliases` are further paths of items that have the second."""
        return _metadata(self, aliases)


def lay_out(tree: Mapping[str, Any], max_bytes: int) -> DcpFolder:
    """The folder for `tree`, whose tensors are `OutTensor`; each file has at most `max_bytes`, or a single value.

    Raises `FormatError` where two values would have one key.
    """
    items = list(_items(tree, ()))
    seen: dict[str, Path] = {}
    for item in items:
        if seen.setdefault(item.key, item.path) != item.path:
            raise FormatError(
                f"{'/'.join(map(str, item.path))} and {'/'.join(map(str, seen[item.key]))} would both be called "
                f"{item.key!r} in a DCP folder: leave one of them out, or export safetensors"
            )
    groups: list[list[Item]] = [[]]
    taken = 0
    for item in items:
        if groups[-1] and taken + item.size_bytes > max_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(item)
        taken += item.size_bytes
    return DcpFolder({f"__0_{number}.distcp": group for number, group in enumerate(groups)})


def _items(tree: Any, path: Path) -> Iterator[Item]:
    children = _children(tree)
    if not path or children:
        for key, value in children:
            yield from _items(value, (*path, key))
    else:
        yield Item(path, tree)


def _children(tree: Any) -> Sequence[tuple[str | int, Any]]:
    """What of `tree` has keys of its own; empty where it is one value."""
    if isinstance(tree, dict):
        if all(isinstance(key, str) for key in tree) or next(tensors_of(tree), None) is not None:
            return [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(one, dict | OutTensor) for one in tree):
        return list(enumerate(tree))
    return ()


def _metadata(folder: DcpFolder, aliases: Mapping[Path, Path]) -> bytes:
    # Only now: it takes memory that the tensors' pieces had.
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    known = {item.path: item for items in folder.files.values() for item in items}
    entries: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    paths: dict[str, Path] = {}
    of_aliases = [(Item(path, known[owner].value), owner) for path, owner in aliases.items()]
    for item, owner in [*((item, path) for path, item in known.items()), *of_aliases]:
        name, offset, length = folder.places[known[owner].key]
        value = item.value
        if isinstance(value, OutTensor):
            origin, sizes = torch.Size([0] * len(value.shape)), torch.Size(value.shape)
            properties = TensorProperties(
                dtype=getattr(torch, value.dtype), requires_grad=value.source.requires_grad
            )
            chunks = [ChunkStorageMetadata(offsets=origin, sizes=sizes)]
            entries[item.key] = TensorStorageMetadata(properties=properties, size=sizes, chunks=chunks)
            index = MetadataIndex(item.key, origin, 0)
        else:
            entries[item.key] = BytesStorageMetadata()
            index = MetadataIndex(item.key)
        places[index] = _StorageInfo(relative_path=name, offset=offset, length=length)
        paths[item.key] = item.path
    return pickle.dumps(Metadata(state_dict_metadata=entries, planner_data=paths, storage_data=places))
