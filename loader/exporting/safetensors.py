"""Lays weights out as safetensors: which file has which, and each file's header, before any of them is read. Pure.

A file is filled in the order of the weights up to the largest size; a larger tensor has a file to itself. Inside a
file the tensors of wide dtypes come first, so that each begins at a multiple of its elements' size. The names of the
files and the index are those of Hugging Face's libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..formats.safetensors import CODES
from ..saved.dtypes import ITEMSIZE
from .select import OutTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FORMAT = {"format": "pt"}
_LENGTH_BYTES = 8
_LEAST_HEADER = 64
"""Bytes of a header without tensors, at least."""


@dataclass(frozen=True)
class SafetensorsFile:
    """One file of weights."""

    name: str
    header: bytes
    """All that comes before the tensors' bytes."""
    tensors: tuple[OutTensor, ...]
    """In the order of their bytes."""

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(one.nbytes for one in self.tensors)


def lay_out(
    weights: Sequence[OutTensor], aliases: Mapping[str, str], max_bytes: int
) -> list[SafetensorsFile]:
    """The files for `weights`, each of at most `max_bytes` unless a single tensor takes more.

    `aliases` are further names of tied weights. They are recorded in the header's metadata of the file that has the
    tensor, as safetensors' ``save_model`` records them.
    """
    names_of: dict[str, dict[str, str]] = {}
    for alias, name in aliases.items():
        names_of.setdefault(name, {})[alias] = name
    groups: list[list[OutTensor]] = [[]]
    taken = _LEAST_HEADER
    for one in weights:
        # The rest of the entry, at most: dtype, shape, where it begins and ends.
        needed = one.nbytes + len(json.dumps(one.name)) + 80 + 21 * len(one.shape)
        needed += sum(len(json.dumps([alias, one.name])) for alias in names_of.get(one.name, ()))
        if groups[-1] and taken + needed > max_bytes:
            groups.append([])
            taken = _LEAST_HEADER
        groups[-1].append(one)
        taken += needed
    return [
        _file(_name(number, len(groups)), group, names_of) for number, group in enumerate(groups, start=1)
    ]


def index_of(files: Sequence[SafetensorsFile]) -> bytes:
    """The index that says which file has which weight."""
    total = sum(one.nbytes for file in files for one in file.tensors)
    where = {one.name: file.name for file in files for one in file.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return f"{json.dumps(index, indent=2)}\n".encode()


def can_hold(tensor: OutTensor) -> bool:
    """Whether the format has the tensor's dtype, and its name is free."""
    return tensor.dtype in CODES and tensor.name != "__metadata__"


def _name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _file(
    name: str, group: Sequence[OutTensor], names_of: Mapping[str, Mapping[str, str]]
) -> SafetensorsFile:
    ordered = sorted(group, key=lambda one: -ITEMSIZE[one.dtype])
    metadata = {key: value for one in group for key, value in names_of.get(one.name, {}).items()}
    header: dict[str, object] = {"__metadata__": {**metadata, **_FORMAT}}
    position = 0
    for one in ordered:
        header[one.name] = {
            "dtype": CODES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [position, position + one.nbytes],
        }
        position += one.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return SafetensorsFile(name, len(text).to_bytes(_LENGTH_BYTES, "little") + text, tuple(ordered))
