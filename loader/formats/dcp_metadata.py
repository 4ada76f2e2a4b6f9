"""Reads the ``.metadata`` of a folder of ``torch.distributed.checkpoint`` (DCP): where each tensor's chunks lie.

Free of torch. The file is a plain pickle of torch's own dataclasses. Nothing is imported or called for it: every
class comes out as an inert object, whose fields are taken here by name. Fields that an older or newer torch lacks or
adds, and attributes that others put there (Megatron's ``mcore_data``), do no harm; a value of another type than torch
writes is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from ..collector import without_collector
from ..errors import CorruptError, FormatError, RankloadError, UnsafeError
from ..saved.division import Division
from ..saved.strided import Box
from ..saved.values import GlobalName, InertObject, kind_of
from .dcp_pickle import STORAGE_DATA, Boxes, Entries, read_usual
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
class Items(Sequence[Item]):
    """Items without an object for each: a list of each field."""

    files: Sequence[str]
    offsets: Sequence[int]
    lengths: Sequence[int]
    transforms: Sequence[tuple[str, ...]] = ()
    """Empty where no item has any."""

    @classmethod
    def of(cls, items: Iterable[Item]) -> Items:
        """Those of `items`, in order."""
        listed = list(items)
        transforms = [one.transforms for one in listed]
        return cls(
            [one.file for one in listed],
            array("q", [one.offset for one in listed]),
            array("q", [one.length for one in listed]),
            transforms if any(transforms) else (),
        )

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        transforms = self.transforms[index] if self.transforms else ()
        return Item(self.files[index], self.offsets[index], self.lengths[index], transforms)


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor as its chunks are listed: each lies inside it, but whether they cover it is not checked here."""

    dtype: str
    division: Division
    """Its shape, and where its chunks lie in it; one object for the tensors that are cut alike."""
    items: Items
    """That hold the chunks, in the order of the division's boxes."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.division.shape

    def label(self, key: str, number: int) -> str:
        """What messages call a chunk of the tensor `key`."""
        return f"{key}{list(self.division.boxes[number].starts)}"


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
        yield from (item for tensor in self.tensors.values() for item in tensor.items)
        yield from self.objects.values()

    def stops(self) -> dict[str, int]:
        """How far the items reach in each file that has any of them, empty ones too."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            items = tensor.items
            for file, offset, length in zip(items.files, items.offsets, items.lengths, strict=True):
                stop = offset + length
                if stop > found.get(file, -1):
                    found[file] = stop
        for item in self.objects.values():
            found[item.file] = max(item.stop, found.get(item.file, -1))
        return found

    def path_of(self, key: str) -> Path:
        """Where the value of `key` lay in the state dict."""
        return self.paths.get(key, (key,))


def read_metadata(path: str, *, name: str) -> Metadata:
    """What the ``.metadata`` at the local `path` says; `name` is what messages call it.

    Raises `CorruptError` where it is truncated or contradicts itself, `UnsafeError` where it asks for more memory or
    work than it can need, or names files outside of its folder, `FormatError` where it is of another kind.
    """
    data = _all_of(path, name)
    limit = _SPARE_MEMORY + _MEMORY_PER_BYTE * len(data)
    with without_collector():
        usual = read_usual(data, memory_limit=limit)
        del data  # many megabytes, which are not needed beside what is made of them
        if usual is not None:
            # What is wrong with it, the other way tells.
            with contextlib.suppress(RankloadError, RecursionError):
                return metadata_of(*usual)
    del usual
    again = bytes(_all_of(path, name))
    scan = scan_pickle(again, name=name, memory_limit=limit, inert=True)
    with without_collector():
        tree = read_pickle(again, scan, name=name, memory_limit=limit, inert=True)
        try:
            return metadata_of(tree)
        except (CorruptError, UnsafeError, FormatError) as error:
            raise type(error)(f"{name}: {error.message}", path=name) from None


def _all_of(path: str, name: str) -> bytearray:
    """The bytes of the file. Raises `FormatError` where they are more than is read at once."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _LARGEST_FILE:
            data = bytearray(size)
            del data[file.readinto(data) :]
            return data
    raise FormatError(f"{name}: has more than {_LARGEST_FILE:,} bytes, which is not supported", path=name)


def metadata_of(tree: Any, more: Mapping[str, Entries] | None = None) -> Metadata:
    """What the unpickled `tree` says, with `more` entries of its ``storage_data``. Raises as `read_metadata`."""
    if not isinstance(tree, InertObject):
        raise FormatError(f"holds a {kind_of(tree)}, expected the Metadata of torch.distributed.checkpoint")
    fields = _fields(tree)
    entries = _mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
    stored = _stored(_mapping(fields.get(STORAGE_DATA), STORAGE_DATA), more or {})
    tensors: dict[str, ChunkedTensor] = {}
    objects: dict[str, Item] = {}
    divisions = _Divisions()
    for key, entry in entries.items():
        if not isinstance(key, str) or not isinstance(entry, InertObject):
            raise CorruptError(
                "state_dict_metadata has an entry that is neither of a tensor nor of an object"
            )
        kind = entry.global_name.rpartition(".")[2]
        if kind == "TensorStorageMetadata":
            tensors[key] = _tensor(key, _fields(entry), stored.get(key, _NOTHING), divisions)
        elif kind == "BytesStorageMetadata":
            own = stored.get(key, _NOTHING)
            objects[key] = own.items()[own.number(key, None)]
        else:
            raise FormatError(
                f"{_short(key)} is a {entry.global_name[:80]}, expected a tensor or an object of bytes"
            )
    return Metadata(tensors, objects, _paths(fields.get("planner_data"), entries))


class _Divisions:
    """Gives tensors that are cut alike one division."""

    def __init__(self) -> None:
        self._by_boxes: dict[tuple[Any, ...], tuple[Division, Sequence[Boxes]]] = {}
        """By the shape and the ids of `Boxes`, which are kept so that no others get these ids."""
        self._by_value: dict[tuple[Any, ...], Division] = {}

    def of_boxes(self, shape: tuple[int, ...], listed: Sequence[Boxes]) -> Division | None:
        known = self._by_boxes.get((shape, *map(id, listed)))
        return None if known is None else known[0]

    def add(self, shape: tuple[int, ...], listed: Sequence[Any], boxes: tuple[Box, ...]) -> Division:
        division = self._by_value.setdefault((shape, boxes), Division(shape, boxes))
        if all(type(one) is Boxes for one in listed):
            self._by_boxes[(shape, *map(id, listed))] = division, listed
        return division


def _tensor(key: str, fields: Mapping[str, Any], stored: _Stored, divisions: _Divisions) -> ChunkedTensor:
    shape = _shape(fields.get("size"), "the size of", key)
    if math.prod(filter(None, shape)) > _LARGEST:  # torch counts the steps of a shape with a 0, too
        raise CorruptError(f"{_short(key)} has shape {shape}, which nothing can hold")
    listed = fields.get("chunks")
    if not isinstance(listed, list | tuple):
        raise CorruptError(f"the chunks of {_short(key)} are a {kind_of(listed)}, expected a list")
    division = divisions.of_boxes(shape, listed)
    items = None if division is None else stored.items_of(division)
    if division is None or items is None:
        boxes, numbers = [], []
        for one in itertools.chain.from_iterable(one if type(one) is Boxes else (one,) for one in listed):
            box = one if type(one) is Box else _box(_fields(one), key)
            if not _is_inside(box.starts, box.sizes, shape):
                raise CorruptError(
                    f"a chunk of {_short(key)} at {box.starts} of sizes {box.sizes} is not inside its shape {shape}"
                )
            boxes.append(box)
            numbers.append(stored.number(key, box.starts))
        division = divisions.add(shape, listed, tuple(boxes))
        items = stored.chosen(numbers)
    return ChunkedTensor(_dtype(key, fields.get("properties")), division, items)


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


@dataclass
class _Stored:
    """The entries of ``storage_data`` that are of one key, each of another chunk."""

    entries: Entries = field(default_factory=Entries)
    transforms: list[tuple[str, ...]] = field(default_factory=list)
    """Of the first of them; the others have none."""
    _numbers: dict[tuple[int, ...] | None, int] = field(default_factory=dict)

    def add(self, starts: tuple[int, ...] | None, item: Item) -> None:
        self.entries.starts.append(starts)
        self.entries.files.append(item.file)
        self.entries.offsets.append(item.offset)
        self.entries.lengths.append(item.length)
        self.transforms.append(item.transforms)

    def items(self) -> Items:
        """All of them."""
        own = self.entries
        plain = [()] * (len(own.files) - len(self.transforms))
        transforms = [*self.transforms, *plain] if any(self.transforms) else ()
        return Items(own.files, own.offsets, own.lengths, transforms)

    def items_of(self, division: Division) -> Items | None:
        """All of them, where they are those of the division's boxes, in order."""
        return self.items() if self.entries.starts == division.starts else None

    def chosen(self, numbers: Sequence[int]) -> Items:
        """Those of `numbers`, in their order."""
        items = self.items()
        if list(numbers) == list(range(len(items))):
            return items
        return Items.of(items[number] for number in numbers)

    def number(self, key: str, starts: tuple[int, ...] | None) -> int:
        """Which of them is of the chunk that begins at `starts`; of an object None. Raises `CorruptError` for none."""
        if not self._numbers:
            self._numbers = {one: number for number, one in enumerate(self.entries.starts)}
        number = self._numbers.get(starts)
        if number is None:
            raise CorruptError(
                f"storage_data does not say where {_short(key)}{f' at {starts}' if starts else ''} lies"
            )
        return number


_NOTHING = _Stored()


def _stored(storage_data: Mapping[Any, Any], more: Mapping[str, Entries]) -> dict[str, _Stored]:
    """The entries of each key."""
    found: dict[str, _Stored] = {}
    places: set[tuple[str, tuple[int, ...] | None]] = set()
    strings: dict[str, str] = {}
    for index, info in storage_data.items():
        fields = _fields(index)
        key, offset = fields.get("fqn"), fields.get("offset")
        if not isinstance(key, str):
            raise CorruptError("storage_data has an entry without a key")
        starts = None if offset is None else _shape(offset, "the offset of an item of", key)
        if (key, starts) in places:
            raise CorruptError(f"storage_data has two entries for {_short(key)} at {starts}")
        places.add((key, starts))
        found.setdefault(key, _Stored()).add(starts, _item(key, _fields(info), strings))
    for key, entries in more.items():
        for file in {*entries.files}:
            if file not in strings:
                strings[file] = _inside(file)
        for numbers in (entries.offsets, entries.lengths):
            if min(numbers) < 0 or max(numbers) > _LARGEST:
                raise CorruptError(f"an item of {_short(key)} has an offset or a length that no file has")
        own = found.get(key)
        if own is None:
            own = found[key] = _Stored(entries)
        else:
            own.entries.starts += entries.starts
            own.entries.files += entries.files
            own.entries.offsets += entries.offsets
            own.entries.lengths += entries.lengths
        if len({*own.entries.starts}) < len(own.entries.starts):
            raise CorruptError(f"storage_data has two entries for {_short(key)} at one place")
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
