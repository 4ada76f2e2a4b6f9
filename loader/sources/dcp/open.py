"""Opens a DCP folder: reads its ``.metadata``, fetches the items that this rank needs, finds the checkpoint's parts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ....distributed.printable import warn
from ...errors import CorruptError, FormatError
from ...formats.dcp_metadata import Item, Metadata, read_metadata
from ...formats.torch_file import FileIndex
from ...saved.contents import Saved, SetFile
from ...saved.demand import Demand
from ...saved.node_file import FileItem, ItemSpan, NodeFile
from ..base import Files
from .layout import parts_of
from .needs import Numbers, wanted_items
from .tree import nested
from .values import blank, values

METADATA = ".metadata"
_ZSTD = ("stream.zstd/1",)
"""The transforms of an item that torch's zstd extension compressed."""
_LATER_S = 60
META = "meta.pt"
"""What Lightning saves beside a folder's own files: everything that has no shards."""
_ACCELERATE_MODEL, _ACCELERATE_OPTIMIZER = "pytorch_model_fsdp_", "optimizer_"
"""The folders, with a number each, in which Accelerate puts the model and the optimizer."""


@dataclass(frozen=True)
class _Folder:
    """One DCP folder of the checkpoint, which may have two."""

    prefix: str
    """What its files' names begin with."""
    file: NodeFile
    """Its ``.metadata``."""
    metadata: Metadata

    def item(self, key: str, number: int) -> Item:
        tensor = self.metadata.tensors.get(key)
        return self.metadata.objects[key] if tensor is None else tensor.items[number]

    def label(self, key: str, number: int) -> str:
        """What messages call an item: its key, and of a chunk its place in the tensor."""
        tensor = self.metadata.tensors.get(key)
        return key if tensor is None else tensor.label(key, number)


@dataclass
class _Reading:
    """The items that this rank reads, each once; several keys may have one of them."""

    spans: dict[tuple[str, int, int, bool], ItemSpan] = field(default_factory=dict)
    """By the file's name, the first byte and the last, and whether it is compressed."""
    labels: dict[tuple[str, int, int, bool], str] = field(default_factory=dict)
    """What messages call them."""
    places: list[dict[str, dict[int, tuple[str, int, int, bool]]]] = field(default_factory=list)
    """For each folder, by key: the item of each number, as `spans` has it."""

    @property
    def by_file(self) -> dict[str, list[ItemSpan]]:
        found: dict[str, list[ItemSpan]] = {}
        for (name, *_), span in self.spans.items():
            found.setdefault(name, []).append(span)
        return found


class Dcp:
    """A folder that ``torch.distributed.checkpoint`` wrote, or two of Accelerate's."""

    def recognises(self, files: Files) -> bool:
        return files.in_folder and files.first.name.rpartition("/")[2] == METADATA

    def open(self, files: Files, demand: Demand) -> Saved:
        metadata = [files.first]
        beside: Mapping[str, Any] = {}
        more: list[str] = []
        if not demand.weights_only:
            there = files.existing(_names_beside(files.first.name))
            fetched = files.fetch(there, "fetch beside") if there else {}
            metadata += [fetched[name] for name in there if name != META]
            if META in fetched:
                more.append(META)
                with files.stage("read beside"):
                    beside = _beside(files, fetched[META])
        with files.stage("read metadata"):
            folders = [_folder(files, file) for file in metadata]
            reading = _reading(folders, _wanted(folders, beside, demand, files.name))
        by_file = reading.by_file
        held = files.fetch(sorted(by_file), "fetch", items=by_file)
        items = [FileItem(held[at[0]], span, reading.labels[at]) for at, span in reading.spans.items()]
        indexes = dict(zip(reading.spans, files.items(items, "read items"), strict=True))
        with files.stage("read states"):
            read = [
                {key: {number: indexes[at] for number, at in own.items()} for key, own in places.items()}
                for places in reading.places
            ]
            saved = _saved(files, folders, read, beside, demand)
        set_files = (*_set_of(folders), *map(SetFile, more))
        unfinished = _without_meta(files) if demand.outline and META not in more else ()
        notes = _notes(files, folders[0], held)
        return replace(saved, notes=notes, files=set_files, unfinished=unfinished)


def _without_meta(files: Files) -> tuple[str, ...]:
    """What shows that Lightning was killed between a folder's own files and the file beside them."""
    if not files.folder.endswith(".ckpt"):
        return ()
    return (f"{files.folder} has no {META}, which Lightning writes last: the save was not finished",)


def _set_of(folders: list[_Folder]) -> Iterator[SetFile]:
    """The folders' files, each at least as long as its last item needs."""
    for folder in folders:
        yield SetFile(folder.file.name)
        stops = folder.metadata.stops()
        yield from (SetFile(f"{folder.prefix}{name}", max(1, stop)) for name, stop in sorted(stops.items()))


def _notes(files: Files, folder: _Folder, held: Mapping[str, NodeFile]) -> tuple[str, ...]:
    """The note, and a warning, where the files' times look like two saves in one folder. Every rank must call.

    A save writes ``.metadata`` last. A copy may give every file a later time than that; so some must have an earlier
    one.
    """
    finished = folder.file.modified_s
    if finished is None:
        return ()
    times = [
        file.modified_s
        for name, file in held.items()
        if name.startswith(folder.prefix) and file.modified_s is not None
    ]
    later = any(time > finished + _LATER_S for time in times)
    if not files.any("files that are later", later):
        return ()
    if not files.any("files that are earlier", any(time <= finished for time in times)):
        return ()
    note = (
        f"some of its files were written {_LATER_S} seconds or more after {folder.file.name}, and others before it: a "
        "later save into the same folder may have ended too early, so that the files are of two saves. Compare with a "
        "manifest of checksums, or take another checkpoint"
    )
    warn(f"{files.name}: {note}", stacklevel=3)
    return (note,)


def _names_beside(first: str) -> list[str]:
    """Names of what may lie beside the folder's own files."""
    folder = first.rpartition("/")[0]
    if folder.startswith(_ACCELERATE_MODEL):
        return [f"{_ACCELERATE_OPTIMIZER}{folder.removeprefix(_ACCELERATE_MODEL)}/{METADATA}"]
    return [META]


def _beside(files: Files, file: NodeFile) -> Mapping[str, Any]:
    tree = files.index(file).tree
    if not isinstance(tree, Mapping) or not all(isinstance(key, str) for key in tree):
        raise FormatError(
            f"{file.source}: expected a dict, as Lightning saves it beside a folder's files", path=file.source
        )
    return tree


def _folder(files: Files, file: NodeFile) -> _Folder:
    prefix = file.name.removesuffix(METADATA)
    return _Folder(prefix, file, files.parsed(file, lambda path, name: read_metadata(path, name=name)))


def _wanted(
    folders: list[_Folder], beside: Mapping[str, Any], demand: Demand, name: str
) -> list[dict[str, Numbers]]:
    """The items that this rank reads, of each folder by key."""
    stand_ins = [blank(folder.metadata) for folder in folders]
    outline = None
    if demand.weights_only or demand.parameters or demand.shards or not demand.optimizer:
        tree = dict(beside)
        for folder, stands_in in zip(folders, stand_ins, strict=True):
            tree.update(_nested(folder, stands_in))
        # Where its parts show only in the items, or not at all, reading them says so.
        with contextlib.suppress(FormatError):
            outline = parts_of(tree, demand, name=name)
    return [
        wanted_items(folder.metadata, outline, {id(value): key for key, value in stands_in.items()}, demand)
        for folder, stands_in in zip(folders, stand_ins, strict=True)
    ]


def _reading(folders: list[_Folder], wanted: list[dict[str, Numbers]]) -> _Reading:
    """How the items are read that are `wanted` of each folder. Raises `FormatError` where one is stored in a form that
    is not known."""
    reading = _Reading()
    for folder, own in zip(folders, wanted, strict=True):
        places: dict[str, dict[int, tuple[str, int, int, bool]]] = {}
        for key, numbers in own.items():
            of_key = places[key] = {}
            for number, whole in numbers:
                item = folder.item(key, number)
                if item.transforms:
                    _check(item, folder)
                start, stop, zstd = item.offset, item.offset + item.length, item.transforms == _ZSTD
                at = of_key[number] = (folder.prefix + item.file, start, stop, zstd)
                reading.spans[at] = ItemSpan(start, stop, zstd, whole)
                reading.labels[at] = folder.label(key, number)
        reading.places.append(places)
    return reading


def _nested(folder: _Folder, found: Mapping[str, Any]) -> dict[str, Any]:
    paths = folder.metadata
    try:
        return nested((paths.path_of(key), value) for key, value in found.items())
    except CorruptError as error:
        raise CorruptError(f"{folder.file.source}: {error.message}", path=folder.file.source) from error


def _check(item: Item, folder: _Folder) -> None:
    if item.transforms not in ((), _ZSTD):
        raise FormatError(
            f"{folder.file.source}: the items of {item.file} are stored through {', '.join(item.transforms)[:120]}, "
            "which is not supported; save the checkpoint without that extension",
            path=folder.file.source,
        )


def _saved(
    files: Files,
    folders: list[_Folder],
    read: list[dict[str, dict[int, FileIndex]]],
    beside: Mapping[str, Any],
    demand: Demand,
) -> Saved:
    tree: dict[str, Any] = dict(beside)
    for folder, own in zip(folders, read, strict=True):
        tree.update(_nested(folder, values(folder.metadata, own, name=folder.file.source)))
    return parts_of(tree, demand, name=files.name)
