"""Reads the ``.metadata`` of a folder of ``torch.distributed.checkpoint`` (DCP): where each tensor's chunks lie.

Free of torch. The file is a plain pickle of torch's own dataclasses. Nothing is imported or called for it: every
class comes out as an inert object, whose fields are taken here by name. Fields that an older or newer torch lacks or
adds, and attributes that others put there (Megatron's ``mcore_data``), do no harm; a value of another type than torch
writes is an error.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptError, FormatError, RankloadError, UnsafeError
from ..saved.strided import Box
from ..saved.values import GlobalName, InertObject, kind_of
from .dcp_pickle import STORAGE_DATA, Entry, read_usual
from .pickle.known import DTYPES
from .pickle.read import read_pickle
from .pickle.scan import scan_pickle
from .pickle.tensors import MAX_DIMENSIONS

_LARGEST_FILE = 512 << 20
_SPARE_MEMORY = 48 << 20
_MEMORY_PER_BYTE = 40
"""Bytes of objects for each byte of the file; torch's own files take about 30."""
_LARGEST = 1 << 62
_LONGEST_NAME = 1024
"""Characters of a file's name that is followed."""
_ORDERED = "collections.OrderedDict"

Path = tuple[str | int, ...]
"""Where a value lay in the nested state dict: keys of dicts, which became text, and positions in lists."""


@dataclass(frozen=True, slots=True)
class Item:
    """One saved value's bytes: a torch file of its own inside a ``.distcp`` file."""

    file: str
    """Relative to the folder."""
    offset: int
    length: int
    """As stored, after `transforms`."""
    transforms: tuple[str, ...] = ()
    """How its bytes were changed, such as ``stream.zstd/1``."""

    @property
    def stop(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and the item that holds it."""

    box: Box
    item: Item


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor as its chunks are listed: each lies inside it, but whether they cover it is not checked here."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a DCP folder holds, by its keys; those are the paths, joined by dots."""

    tensors: Mapping[str, ChunkedTensor]
    objects: Mapping[str, Item]
    """Values that are no tensors."""
    paths: Mapping[str, Path]
    """Of the keys whose paths are stated; all others are at the top level."""

    def items(self) -> Iterator[Item]:
        """All items, those that several keys share as often."""
        yield from (chunk.item for tensor in self.tensors.values() for chunk in tensor.chunks)
        yield from self.objects.values()

    def path_of(self, key: str) -> Path:
        """Where the value of `key` lay in the state dict."""
        return self.paths.get(key, (key,))


def read_metadata(path: str, *, name: str) -> Metadata:
    """What the ``.metadata`` at the local `path` says; `name` is what messages call it.

    Raises `CorruptError` where it is truncated or contradicts itself, `UnsafeError` where it asks for more memory or
    work than it can need, or names files outside of its folder, `FormatError` where it is of another kind.
    """
    with open(path, "rb") as file:
        data = file.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise FormatError(f"{name}: has more than {_LARGEST_FILE:,} bytes, which is not supported", path=name)
    limit = _SPARE_MEMORY + _MEMORY_PER_BYTE * len(data)
    with _without_collector():
        usual = read_usual(data, memory_limit=limit)
        if usual is not None:
            # What is wrong with it, the other way tells.
            with contextlib.suppress(RankloadError, RecursionError):
                return metadata_of(*usual)
    del usual
    scan = scan_pickle(data, name=name, memory_limit=limit, inert=True)
    with _without_collector():
        tree = read_pickle(data, scan, name=name, memory_limit=limit, inert=True)
        try:
            return metadata_of(tree)
        except (CorruptError, UnsafeError, FormatError) as error:
            raise type(error)(f"{name}: {error.message}", path=name) from None


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Leaves the garbage collector off: it would go through a million new objects again and again, and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def metadata_of(tree: Any, more: Sequence[Entry] = ()) -> Metadata:
    """What the unpickled `tree` says, with `more` entries of its ``storage_data``. Raises as `read_metadata`."""
    if not isinstance(tree, InertObject):
        raise FormatError(f"holds a {kind_of(tree)}, expected the Metadata of torch.distributed.checkpoint")
    fields = _fields(tree)
    entries = _mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
    items = _items(_mapping(fields.get(STORAGE_DATA), STORAGE_DATA), more)
    tensors: dict[str, ChunkedTensor] = {}
    objects: dict[str, Item] = {}
    for key, entry in entries.items():
        if not isinstance(key, str) or not isinstance(entry, InertObject):
            raise CorruptError(
                "state_dict_metadata has an entry that is neither of a tensor nor of an object"
            )
        kind = entry.global_name.rpartition(".")[2]
        if kind == "TensorStorageMetadata":
            tensors[key] = _tensor(key, _fields(entry), items)
        elif kind == "BytesStorageMetadata":
            objects[key] = _item_of(items, key, None)
        else:
            raise FormatError(
                f"{_short(key)} is a {entry.global_name[:80]}, expected a tensor or an object of bytes"
            )
    return Metadata(tensors, objects, _paths(fields.get("planner_data"), entries))


def _tensor(
    key: str, fields: Mapping[str, Any], items: Mapping[tuple[str, tuple[int, ...] | None], Item]
) -> ChunkedTensor:
    shape = _shape(fields.get("size"), "the size of", key)
    if math.prod(filter(None, shape)) > _LARGEST:  # torch counts the steps of a shape with a 0, too
        raise CorruptError(f"{_short(key)} has shape {shape}, which nothing can hold")
    listed = fields.get("chunks")
    if not isinstance(listed, list | tuple):
        raise CorruptError(f"the chunks of {_short(key)} are a {kind_of(listed)}, expected a list")
    chunks = []
    for one in listed:
        box = one if type(one) is Box else _box(_fields(one), key)
        if not _is_inside(box.starts, box.sizes, shape):
            raise CorruptError(
                f"a chunk of {_short(key)} at {box.starts} of sizes {box.sizes} is not inside its shape {shape}"
            )
        chunks.append(Chunk(box, _item_of(items, key, box.starts)))
    return ChunkedTensor(_dtype(key, fields.get("properties")), shape, tuple(chunks))


def _box(chunk: Mapping[str, Any], key: str) -> Box:
    return Box(
        _shape(chunk.get("offsets"), "the offsets of a chunk of", key),
        _shape(chunk.get("sizes"), "the sizes of a chunk of", key),
    )


def _is_inside(starts: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if not len(starts) == len(sizes) == len(shape):
        return False
    for start, size, whole in zip(starts, sizes, shape, strict=True):
        if start < 0 or size < 0 or start + size > whole:
            return False
    return True


def _dtype(key: str, properties: Any) -> str:
    state = properties.state if isinstance(properties, InertObject) else None
    # torch pickles a tuple of the fields; one without ``__getstate__`` would be pickled as a dict.
    found = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        found = state.get("dtype")
    if not isinstance(found, GlobalName):
        raise CorruptError(f"{_short(key)} has no dtype")
    if found.name not in DTYPES:
        raise FormatError(f"{_short(key)} is of dtype {found.name[:80]}, which is not supported")
    return DTYPES[found.name]


def _items(
    storage_data: Mapping[Any, Any], entries: Sequence[Entry]
) -> dict[tuple[str, tuple[int, ...] | None], Item]:
    """The items by key and, of a tensor's chunk, its offsets."""
    found: dict[tuple[str, tuple[int, ...] | None], Item] = {}
    strings: dict[str, str] = {}
    for index, info in storage_data.items():
        fields = _fields(index)
        key, offset = fields.get("fqn"), fields.get("offset")
        if not isinstance(key, str):
            raise CorruptError("storage_data has an entry without a key")
        place = (key, None if offset is None else _shape(offset, "the offset of an item of", key))
        if place in found:
            raise CorruptError(f"storage_data has two entries for {_short(key)} at {place[1]}")
        found[place] = _item(key, _fields(info), strings)
    for key, starts, file, first, length in entries:
        place = (key, starts)  # whose numbers those of a chunk must be
        if place in found:
            raise CorruptError(f"storage_data has two entries for {_short(key)} at {place[1]}")
        if file not in strings:
            strings[file] = _inside(file)
        if not (0 <= first <= _LARGEST and 0 <= length <= _LARGEST):
            raise CorruptError(f"the item of {_short(key)} has offset {first} and length {length}")
        found[place] = Item(strings[file], first, length)
    return found


def _item(key: str, fields: Mapping[str, Any], strings: dict[str, str]) -> Item:
    file = fields.get("relative_path")
    if not isinstance(file, str):
        raise CorruptError(f"the file of {_short(key)} is a {kind_of(file)}, expected a name")
    if file not in strings:
        strings[file] = _inside(file)
    transforms = fields.get("transform_descriptors") or ()
    if not isinstance(transforms, list | tuple) or not all(isinstance(one, str) for one in transforms):
        raise CorruptError(f"the transforms of {_short(key)} are no list of names")
    offset, length = fields.get("offset"), fields.get("length")
    if not _is_count(offset) or not _is_count(length):
        raise CorruptError(f"the item of {_short(key)} has offset {offset!r:.40} and length {length!r:.40}")
    return Item(strings[file], offset, length, tuple(transforms))  # type: ignore[arg-type]


def _item_of(
    items: Mapping[tuple[str, tuple[int, ...] | None], Item], key: str, starts: tuple[int, ...] | None
) -> Item:
    item = items.get((key, starts))
    if item is None:
        raise CorruptError(
            f"storage_data does not say where {_short(key)}{f' at {starts}' if starts else ''} lies"
        )
    return item


def _inside(file: str) -> str:
    """`file`, which must be the name of a file in the folder, or below it."""
    parts = file.split("/")
    if (
        not file
        or len(file) > _LONGEST_NAME
        or "\\" in file
        or any(part in ("", ".", "..") for part in parts)
        or any(ord(char) < 32 for char in file)
    ):
        raise UnsafeError(f"names the file {file[:80]!r}, expected one in its own folder: do not trust it")
    return file


def _paths(planner_data: Any, entries: Mapping[str, Any]) -> dict[str, Path]:
    if not isinstance(planner_data, dict):
        return {}  # a planner that keeps something else, or flattens nothing
    found: dict[str, Path] = {}
    for key, path in planner_data.items():
        if key not in entries or not isinstance(path, tuple) or not path:
            continue
        if not all(isinstance(part, str) or _is_count(part) for part in path) or len(path) > MAX_DIMENSIONS:
            raise CorruptError(f"planner_data has a path of {_short(str(key))} that is no keys and positions")
        found[key] = path
    return found


def _fields(value: Any) -> Mapping[str, Any]:
    """The fields of an object by name: its state, as a class without ``__setstate__`` takes it."""
    state = value.state if isinstance(value, InertObject) else None
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**(state[0] if isinstance(state[0], dict) else {}), **state[1]}
    return state if isinstance(state, dict) else {}


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if isinstance(value, InertObject) and value.global_name == _ORDERED:
        value = value.entries
    if not isinstance(value, dict):
        raise CorruptError(f"its {what} is a {kind_of(value)}, expected a dict")
    return value


def _shape(value: Any, what: str, key: str) -> tuple[int, ...]:
    if isinstance(value, InertObject) and value.global_name == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS or not all(map(_is_count, value)):
        raise CorruptError(f"{what} {_short(key)} is no tuple of at most {MAX_DIMENSIONS} sizes")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _short(key: str) -> str:
    return repr(key[:120])
