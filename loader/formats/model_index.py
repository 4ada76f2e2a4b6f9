"""Reads the index of a model that lies in several files, which says in which file each weight is. Free of torch.

So Hugging Face's libraries write it: ``{"metadata": {...}, "weight_map": {NAME: FILE, ...}}`` in
``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``, beside the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError, UnsafeError
from .strict_json import parse_json

_LARGEST = 100_000_000
_MOST_FILES = 10_000
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """Which file has which weights."""

    files: dict[str, str]
    """Each weight's file, by the weight's name: a name below the index's own folder."""
    metadata: dict[str, Any]
    """What else the index says of the model, as JSON."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files, each once."""
        return tuple(dict.fromkeys(self.files.values()))


def read_model_index(path: str, *, name: str) -> ModelIndex:
    """The index in the local file at `path`; messages call it `name`.

    Raises `CorruptError` where it is none, and `UnsafeError` where it names a file outside of its folder, or more files
    than a model has.
    """
    with open(path, "rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise CorruptError(f"{name}: expected an index of at most {_LARGEST:,} bytes.", path=name)
    found = parse_json(data, name=name, what="the index")
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptError(f"{name}: expected an object with the files of weights in weight_map.", path=name)
    for key, value in weight_map.items():
        if not isinstance(value, str) or not value:
            raise CorruptError(
                f"{name}: weight_map has {str(value)[:_SHOWN]!r} for {key[:_SHOWN]!r}, expected a file's name.",
                path=name,
            )
    names = set(weight_map.values())
    if len(names) > _MOST_FILES:
        raise UnsafeError(
            f"{name}: weight_map names {len(names):,} files, expected at most {_MOST_FILES:,}: do not trust this file.",
            path=name,
        )
    for value in names:
        parts = value.split("/")
        if value.startswith("/") or "\\" in value or {"", ".", ".."} & set(parts) or not value.isprintable():
            raise UnsafeError(
                f"{name}: weight_map names the file {value[:_SHOWN]!r}, expected one in the folder of the index.",
                path=name,
            )
    metadata = found.get("metadata")
    return ModelIndex(weight_map, metadata if isinstance(metadata, dict) else {})
