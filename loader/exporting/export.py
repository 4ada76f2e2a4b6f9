"""Exports a checkpoint from end to end: `export_checkpoint` makes safetensors or a DCP folder of any kind.

open       alone                  the path is located, and the indexes of its files are read
select     exporting.select       which weights, in which dtype; what is left out, and why
lay out    exporting.safetensors  which file has which tensor, and where; before any of it is read
           exporting.dcp
write      exporting.pieces       file by file: what it needs is fetched, read piece by piece, cast and written
checksums  exporting.pieces       the source's, summed on the way; its files' own by ``verify="before"``
finish     exporting.places       files get their names; the index or ``.metadata`` last, then the manifest
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ..alone import EVERYTHING, OpenCheckpoint, open_alone
from ..errors import FormatError, OptionError, fetched_twice
from ..fetch.parts import all_parts, check_headers, fetching, files_reader, restore_parts
from ..fetch.rounds import fetch_now
from ..materialize.tensors import TensorReader
from ..options import LoadOptions, Options, parse_size, resolve_options
from ..redaction import redact_path
from ..request import as_path
from ..retries import Outages
from ..saved.copies import reads_of
from ..saved.ignore import IgnoreKeys, ignore, unmatched_glob
from ..saved.tensor import StorageRef
from ..saved.tree import storages
from ..saved.values import is_tensor
from ..stores.fsspec import FsspecStore
from ..stores.local import LocalStore
from ..stores.locate import DCP_METADATA
from ..stores.open import open_store
from ..torch_modes import default_modes
from ..writing.summed import SummedFile
from . import dcp, safetensors
from .pieces import Pieces, StorageSums, copies_of
from .places import Place, WrittenFile, place_of
from .real import RealValues, inert_values, tensors_of
from .select import DTYPES, DType, OutTensor, Selection, refused, select
from .torch_stream import OVERHEAD_BYTES, write_torch

Format = Literal["safetensors", "dcp"]
FORMATS: tuple[Format, ...] = ("safetensors", "dcp")
MAX_SHARD = "5GB"
TRAINING_STATE = "training_state.pt"
"""The file beside safetensors that has all but the weights."""
OnProgress = Callable[[int, int], None]
"""Called with how many bytes of tensors were read to be written, and how many will be."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what it did not."""

    source: str
    """The checkpoint, for messages."""
    kind: str
    out: str
    """What was written, for messages."""
    format: Format
    dtype: DType
    everything: bool
    step: int | None
    files: tuple[WrittenFile, ...]
    """All but the manifest."""
    tensors: int
    """Weights that were written; a tied one once."""
    parameters: int
    """Their elements, buffers' too."""
    tensor_bytes: int
    """Bytes of all tensors that were written."""
    from_masters: int
    """How many of the weights are the optimizer's fp32 masters."""
    casts: Mapping[str, int]
    """How many weights changed their dtype, by ``FROM to TO``."""
    aliases: Mapping[str, str]
    """Further names of tied weights, each with the one that they are written under."""
    left_out: Mapping[str, str]
    """What the checkpoint has and the export has not, by its place, and why."""
    lost: tuple[str, ...]
    """Those of `left_out` that are tensors of the model, which the format cannot hold."""
    notes: tuple[str, ...]
    seconds: float

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(one.bytes for one in self.files)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            **own,
            "files": [{"name": one.name, "bytes": one.bytes, "sha256": one.sha256} for one in self.files],
            "casts": dict(self.casts),
            "aliases": dict(self.aliases),
            "left_out": dict(self.left_out),
            "lost": list(self.lost),
            "notes": list(self.notes),
            "bytes": self.bytes,
        }


def export_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: Format = "safetensors",
    dtype: DType = "as-saved",
    everything: bool = False,
    max_shard_bytes: int | str = MAX_SHARD,
    force: bool = False,
    ignore_keys: IgnoreKeys | str | None = None,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    progress_bar: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Writes the weights of the checkpoint at `path`, or all of it, to the folder `out`. One process calls it.

    Takes memory for one tensor, and that only where its elements lie in another order; else for pieces of 8 MiB. A
    remote `path` takes room in this node's cache for what is exported of it; a remote `out` takes room for one file in
    the temporary folder.

    Args:
        path: as `load` takes it. ``{rank}`` and its like stand for the files of every saved rank.
        out: a local path, or a URI that fsspec writes to, of a folder that is empty or not there.
        to: ``safetensors``: ``model.safetensors``, or several files and ``model.safetensors.index.json``, as
            transformers reads them; with `everything`, what is no weight is in ``training_state.pt``. ``dcp``: a folder
            of torch.distributed.checkpoint, with the weights under ``model``, or everything in Composer's layout.
        dtype: of the weights and buffers that are floats: ``as-saved``, or ``fp32`` (from the optimizer's fp32 masters,
            where the checkpoint has them) or ``bf16``.
        everything: whether all that the checkpoint has is exported; else its weights and buffers.
        max_shard_bytes: the largest size of a file, unless a single tensor takes more: a number, or text as ``"5GB"``.
        force: whether an export that `out` has is replaced. Other files there are left as they are.
        ignore_keys: parts to leave out, as `load` takes them: ``state/model/head.*``.
        object_store: as `load` takes it; for `path` alone.
        options: `LoadOptions`, or a mapping of its fields. ``rename`` changes the names of weights where they alone are
            exported, and ``leave_out`` leaves parts out.
        out_storage_options: those for `out`; where not given, those of `options`.
        progress_bar: whether the bytes are shown that come from a remote store.
        on_progress: called as bytes of tensors are read to be written.

    Raises:
        RankloadError: as the beginning of a load, and `CorruptError` where bytes do not match their checksums,
            `OptionError` where `out` is not empty or arguments do not fit, `LayoutError` where the model was split
            by pipeline or tensor parallelism, `AccessError` where `out` cannot be written. Nothing that a load takes is
            in `out` then, unless an export before is.
    """
    begin = time.monotonic()
    _check_choice("to", to, FORMATS)
    _check_choice("dtype", dtype, DTYPES)
    limit = parse_size("max_shard_bytes", max_shard_bytes)
    if limit <= 0:
        raise OptionError(f"max_shard_bytes={max_shard_bytes!r}: expected at least 1 byte")
    resolved = options if isinstance(options, Options) else resolve_options(options)
    if everything and resolved.rename:
        raise OptionError(
            "rename changes the names of weights alone, and an optimizer's state has them too: export everything under "
            "the saved names, and load it with this rename; or export the weights alone"
        )
    # One process has no ranks to share with, and nobody has the export before all of it was compared.
    reading = replace(resolved, mode="node")
    where = as_path(out)
    storage_options = resolved.storage_options if out_storage_options is None else out_storage_options
    store, name = open_store(where, None, storage_options, outages=Outages(resolved.stall_timeout_s))
    if not isinstance(store, LocalStore | FsspecStore):
        raise OptionError(
            f"{redact_path(where)}: http(s) is not written to; name a local folder or an fsspec URI such as s3://"
        )
    try:
        place = place_of(store, name)
        demand = EVERYTHING if everything or dtype != "as-saved" else replace(EVERYTHING, weights_only=True)
        with (
            default_modes(),
            open_alone(
                path, demand, object_store=object_store, options=reading, progress_bar=progress_bar
            ) as opened,
        ):
            _refuse_own_folder(opened, store, name, place.described)
            opened, ignored = _without(opened, ignore_keys, resolved)
            selection = select(opened.saved, dtype, everything=everything, rename=resolved.rename)
            selection = replace(
                selection, left_out={**selection.left_out, **dict.fromkeys(ignored, "left out as asked for")}
            )
            plan = _plan(opened, selection, resolved, to, limit)
            total = sum(tensor.nbytes for file in plan.files for tensor in file.tensors)
            place.begin(
                sum(file.size_bytes for file in plan.files),
                max(file.size_bytes for file in plan.files),
                force=force,
            )
            try:
                _write(opened, plan.files, place, resolved, _counter(on_progress, total))
                files = place.finish(plan.last())
            except BaseException:
                place.abandon()
                raise
            saved, selection, again = opened.saved, plan.selection, opened.files.remote.fetched_again
    finally:
        store.close()
    return Exported(
        source=saved.name,
        kind=saved.kind,
        out=place.described,
        format=to,
        dtype=dtype,
        everything=everything,
        step=saved.step,
        files=files,
        tensors=len(selection.weights),
        parameters=sum(one.source.numel for one in selection.weights.values()),
        tensor_bytes=total,
        from_masters=selection.from_masters,
        casts=selection.casts,
        aliases=selection.aliases,
        left_out=selection.left_out,
        lost=selection.lost,
        notes=(
            *selection.notes,
            *(f"{one.nbytes:,} bytes of {one.name} were fetched twice: {one.why}" for one in again),
        ),
        seconds=time.monotonic() - begin,
    )


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def _without(
    opened: OpenCheckpoint, ignore_keys: IgnoreKeys | str | None, options: Options
) -> tuple[OpenCheckpoint, tuple[str, ...]]:
    """The checkpoint without what is to be left out, and the places of that."""
    saved = opened.saved
    tree = saved.as_tree()
    ignored = ignore(tree, ignore_keys)
    if ignored.unmatched:
        raise OptionError(unmatched_glob(tree, ignored.unmatched[0], saved.name))
    paths = (*saved.paths_of(options.leave_out), *ignored.paths)
    kept = saved.with_tree(ignored.tree) if ignored.paths else saved
    return replace(opened, saved=kept.without(options.leave_out)), tuple(dict.fromkeys(paths))


def _refuse_own_folder(opened: OpenCheckpoint, store: Any, name: str, described: str) -> None:
    """Raises `OptionError` where the checkpoint's own files lie in the folder to write to."""
    files, theirs = opened.files, opened.files.context.store
    if theirs.is_local != store.is_local or theirs.identity != store.identity:
        return

    def folder_of(path: str) -> str:
        return os.path.realpath(path) if store.is_local else path.rstrip("/")

    objects = [files.object_of(one) for one in opened.saved.files]
    if folder_of(name) in {folder_of(os.path.dirname(one) or ".") for one in objects}:
        raise OptionError(
            f"{described} is the checkpoint's own folder, and its files would be replaced while they are read: name "
            "another folder"
        )


@dataclass(frozen=True)
class _File:
    """A file to write."""

    name: str
    tensors: Sequence[OutTensor]
    """What it has of the checkpoint."""
    size_bytes: int
    """About its size."""
    write: Callable[[Pieces, SummedFile], None]


@dataclass(frozen=True)
class _Plan:
    """What an export will write."""

    selection: Selection
    """With what the format cannot hold among what is left out."""
    files: Sequence[_File]
    last: Callable[[], dict[str, bytes]]
    """Gives the small files that a reader begins with, once the others were written."""


def _plan(opened: OpenCheckpoint, selection: Selection, options: Options, to: Format, limit: int) -> _Plan:
    files, saved = opened.files, opened.saved
    real = RealValues(_reader(opened, options.verify), options.safe_types, saved.name)
    kept = selection.objects if to == "dcp" else {}
    small = inert_values([kept, selection.rest])
    fetch_now(files.context, files.remote, all_parts(small), "fetch objects")
    check_headers(files, storages(small))
    objects = real.real(kept, "state/model")
    rest = real.real(selection.rest, "") if selection.rest is not None else None
    selection = replace(selection, left_out={**selection.left_out, **real.left_out})
    if to == "safetensors":
        return _plan_safetensors(selection, rest, limit, saved.name)
    return _plan_dcp(selection, objects, rest, limit)


def _plan_safetensors(selection: Selection, rest: dict[str, Any] | None, limit: int, name: str) -> _Plan:
    held = {key: one for key, one in selection.weights.items() if safetensors.can_hold(one)}
    lost = {
        f"state/model/{key}": f"{one.dtype}, which safetensors has not; --format dcp keeps it"
        for key, one in selection.weights.items()
        if key not in held
    }
    objects = {f"state/model/{key}": value for key, value in selection.objects.items()}
    lost_tensors = (*lost, *(place for place, value in objects.items() if is_tensor(value)))
    lost.update({place: refused(value) for place, value in objects.items()})
    if not held:
        raise FormatError(
            f"{name}: safetensors can hold none of its weights: {next(iter(lost.items()))}", path=name
        )
    aliases = {alias: owner for alias, owner in selection.aliases.items() if owner in held}
    selection = replace(
        selection,
        weights=held,
        aliases=aliases,
        left_out={**selection.left_out, **lost},
        lost=lost_tensors,
    )
    laid_out = safetensors.lay_out(list(held.values()), aliases, limit)
    files = [_File(one.name, one.tensors, one.size_bytes, _safetensors_writer(one)) for one in laid_out]
    if rest is not None:
        tensors = list(tensors_of(rest))
        size = sum(OVERHEAD_BYTES + one.nbytes for one in tensors)
        # First: a reader begins with the weights, or with their index.
        files.insert(
            0,
            _File(TRAINING_STATE, tensors, size, lambda pieces, file: write_torch(rest, pieces, file.write)),
        )
    index = {safetensors.INDEX: safetensors.index_of(laid_out)} if len(laid_out) > 1 else {}
    return _Plan(selection, files, lambda: index)


def _safetensors_writer(laid_out: safetensors.SafetensorsFile) -> Callable[[Pieces, SummedFile], None]:
    def write(pieces: Pieces, file: SummedFile) -> None:
        file.write(laid_out.header)
        for tensor in laid_out.tensors:
            pieces.write(tensor, file.write)
        pieces.settle()

    return write


def _plan_dcp(
    selection: Selection, objects: dict[str, Any], rest: dict[str, Any] | None, limit: int
) -> _Plan:
    model: dict[str, Any] = {**selection.weights, **objects}
    tree: dict[str, Any] = {"model": model}
    prefix: dcp.Path = ("model",)
    if rest is not None:
        tree, prefix = {**rest, "state": {"model": model, **rest["state"]}}, ("state", "model")
    folder = dcp.lay_out(tree, limit)
    aliases: dict[dcp.Path, dcp.Path] = {
        (*prefix, alias): (*prefix, owner) for alias, owner in selection.aliases.items()
    }
    files = [
        _File(
            name,
            [tensor for item in items for tensor in tensors_of(item.value)],
            sum(item.size_bytes for item in items),
            _items_writer(folder, name),
        )
        for name, items in folder.files.items()
    ]
    return _Plan(selection, files, lambda: {DCP_METADATA: folder.metadata(aliases)})


def _items_writer(folder: dcp.DcpFolder, name: str) -> Callable[[Pieces, SummedFile], None]:
    return lambda pieces, file: folder.write_file(name, pieces, file.write)


def _write(
    opened: OpenCheckpoint,
    files: Sequence[_File],
    place: Place,
    options: Options,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes `files` in their order, each once its part of the checkpoint is being fetched.

    Those that were written from bytes that came damaged are written again, once these were fetched once more. Raises
    `CorruptError` where what was read differs still from the checkpoint's checksums.
    """
    reader = _reader(opened, "off")
    copies = {file.name: [copy for one in file.tensors for copy in copies_of(one)] for file in files}
    reads = reads_of([copy for each in copies.values() for copy in each])
    compared = {} if options.verify == "off" else {storage: one.ranges for storage, one in reads.items()}
    sums = StorageSums(reader, compared)
    from_files: dict[str, set[StorageRef]] = {}

    def write(file: _File) -> None:
        place.put(file.name, partial(file.write, pieces), file.size_bytes)

    with Pieces(reader, on_bytes) as pieces:
        for file in files:
            reads = reads_of(copies.pop(file.name))
            from_files[file.name] = set(reads)
            parts = restore_parts(opened.files, reads, {}, (), {})
            with fetching(opened.files, reader, parts, f"fetch {file.name}"):
                write(file)
        with fetching(
            opened.files, reader, restore_parts(opened.files, {}, sums.gaps(), (), {}), "fetch gaps"
        ):
            damaged = sums.finish()
        if not damaged:
            return
        for storage, error in damaged.items():
            why = error.message.removeprefix(f"{storage.file}: ")
            if not opened.files.again.storage(storage, why):
                raise error
        sums.begin(damaged)
        for file in files:
            if not from_files[file.name].isdisjoint(damaged):
                write(file)
    for error in sums.finish().values():
        raise fetched_twice(error)


def _reader(opened: OpenCheckpoint, verify: str) -> TensorReader:
    return files_reader(opened.files, "off" if verify == "off" else "during")


def _counter(on_progress: OnProgress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if on_progress is not None:
            on_progress(done, total)

    return count
