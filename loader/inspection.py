"""Says what a checkpoint is and holds, from its indexes alone: `inspect_checkpoint`. Imports no torch.

The indexes of as few files as tell all names and shapes are read; of every other file only its size is asked for. No
tensor's data are read.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .alone import OUTLINE, OpenCheckpoint, open_alone
from .completeness import ask_all, stat_surely
from .errors import OptionError
from .options import LoadOptions, Options
from .saved.contents import Saved, SetFile
from .saved.ignore import at_or_below
from .saved.tensor import SavedTensor
from .saved.ties import tied_names
from .saved.values import GlobalName, InertArray, InertObject, InertTensor, kind_of
from .template import expand_path, template_variables

_SHOWN = 60
"""Characters of a value that `Key.value` has at most."""
_COMPARED = 20_000
"""Keys that `nearest` compares at most: that takes about a second."""
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_RANK = re.compile(r"(?:(?<![a-z])(?<!mp_)rank[_-]?|(?<![a-z])rng_state_|(?<![a-z])random_states_|^__)(\d+)")
"""What names a saved rank in the name of a file: of DeepSpeed's (its place in the data-parallel group), of Composer's,
of Trainer's and Accelerate's random states, of DCP's."""


@dataclass(frozen=True, slots=True)
class HeldFile:
    """One of the files that a checkpoint consists of."""

    name: str
    """Relative to the checkpoint's folder; where it is none, as messages call it."""
    there: bool
    size_bytes: int | None
    """None where it is not there, or the store does not say."""
    least_bytes: int
    """It is cut short where it is smaller."""
    rank: int | None
    """The saved rank whose file it is, as its name says; None where it says none."""

    @property
    def short(self) -> bool:
        """Whether it is smaller than the checkpoint's index says."""
        return self.size_bytes is not None and self.size_bytes < self.least_bytes


@dataclass(frozen=True, slots=True)
class Key:
    """A place in the checkpoint, and what is there: a tensor, or another value."""

    path: str
    """As ``ignore_keys`` writes it: ``state/model/NAME``."""
    parts: tuple[str, ...]
    """The keys that lead there. Each may have a ``/`` of its own."""
    kind: str
    """``tensor``, or the value's Python type; for what was pickled as an object, its class."""
    dtype: str | None = None
    """The name that follows ``torch.``; of tensors alone, as the two that follow."""
    shape: tuple[int, ...] | None = None
    size_bytes: int = 0
    """Of a tensor's elements."""
    value: str | None = None
    """A short value as text; None for tensors, objects and containers."""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is and holds."""

    name: str
    """Where it was found; without secrets."""
    kind: str
    """As `Saved.kind`."""
    layout: str
    """As `Saved.layout`: who wrote it."""
    tag: str | None
    """The folder's name, where ``latest`` led to it."""
    zero_stage: int | None
    world_size: int | None
    """Ranks that saved it; None where it does not say."""
    model_parts: int
    """Into how many the model was split by pipeline and tensor parallelism. `keys` has the first part's where there
    are several."""
    step: int | None
    epoch: int | None
    parameters: int
    """Elements of the tensors in ``state/model``, buffers too; of tied ones once."""
    dtypes: Mapping[str, int]
    """How many tensors of ``state/model`` have each dtype, the commonest first."""
    tensors: int
    """In all parts: model, optimizer and so on."""
    tensor_bytes: int
    files: tuple[HeldFile, ...]
    files_read: tuple[str, ...]
    """Those whose indexes were read, as messages call them."""
    keys: tuple[Key, ...]
    """In the checkpoint's order."""
    notes: tuple[str, ...]
    unfinished: tuple[str, ...]
    """Sentences on what shows that its save did not end."""

    @property
    def file_bytes(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(one.size_bytes or 0 for one in self.files)

    @property
    def missing(self) -> tuple[HeldFile, ...]:
        """The files that are not there, or smaller than the index says."""
        return tuple(one for one in self.files if not one.there or one.short)


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    progress_bar: bool = False,
) -> Inspection:
    """What the checkpoint at `path` is and holds.

    Args:
        path: as `load` takes it, local or remote.
        rank: of the files, those of this saved rank, and those that name no rank. Where the path has ``{rank}`` and
            each rank's file is a checkpoint of its own, that file is the one that is looked at.
        object_store: as `load` takes it.
        options: `LoadOptions`, or a mapping of its fields.
        progress_bar: whether the bytes are shown that come from a remote store.

    Raises:
        RankloadError: as `open_alone`; `OptionError` where no rank of that number saved the checkpoint.
    """
    opening: dict[str, Any] = {
        "object_store": object_store,
        "options": options,
        "progress_bar": progress_bar,
    }
    if rank is not None and rank < 0:
        raise OptionError(f"rank {rank}: ranks are counted from 0")
    with open_alone(path, OUTLINE, **opening) as opened:
        if not (rank and opened.saved.kind == "monolithic" and opened.files.by_rank):
            return _inspection(opened, rank)
    # A file for each rank, none of which knows of the others.
    text = os.fspath(path)
    used = template_variables(text)
    if "rank" not in used:
        raise OptionError(f"rank {rank}: the path names files by {', '.join(sorted(used))}, not by {{rank}}")
    own = expand_path(text, rank=rank, local_rank=0, node_rank=0, run_name=None)
    with open_alone(own.replace("{", "{{").replace("}", "}}"), OUTLINE, **opening) as opened:
        return _inspection(opened, None)


def matching(keys: Sequence[Key], wanted: str) -> list[Key]:
    """The `keys` at, or below, a place that `wanted` names, as `saved.ignore.at_or_below` has it."""
    matches = at_or_below(wanted)
    return [key for key in keys if matches(key.path)]


def nearest(keys: Sequence[Key], wanted: str) -> list[str]:
    """Up to three paths of `keys` that are likest to `wanted`, which matches none."""
    last = {key.parts[-1]: key.path for key in keys[:_COMPARED] if key.parts}
    by = get_close_matches(wanted.strip("*").rpartition("/")[2], last, n=3, cutoff=0.5)
    return [last[one] for one in by]


def _inspection(opened: OpenCheckpoint, rank: int | None) -> Inspection:
    saved, files = opened.saved, opened.files
    keys = tuple(_keys(saved.as_tree(), ()))
    model = [key for key in keys if key.parts[:2] == ("state", "model") and key.shape is not None]
    tensors = [key for key in keys if key.shape is not None]
    parts = (
        max(1, saved.world_size // saved.data_parallel_size)
        if saved.kind in ("deepspeed", "composer-zero") and saved.world_size and saved.data_parallel_size
        else 1
    )
    return Inspection(
        name=files.name,
        kind=saved.kind,
        layout=saved.layout,
        tag=files.located.tag if files.located.by_latest else None,
        zero_stage=saved.zero_stage,
        world_size=saved.world_size,
        model_parts=parts,
        step=saved.step,
        epoch=saved.epoch,
        parameters=_elements(saved),
        dtypes=dict(Counter(key.dtype or "" for key in model).most_common()),
        tensors=len(tensors),
        tensor_bytes=sum(key.size_bytes for key in tensors),
        files=_held_files(opened, rank),
        files_read=tuple(one.source for one in files.fetched),
        keys=keys,
        notes=saved.notes,
        unfinished=saved.unfinished,
    )


def _held_files(opened: OpenCheckpoint, rank: int | None) -> tuple[HeldFile, ...]:
    """The files with their sizes, several of which are asked for at once."""
    files, store = opened.files, opened.files.context.store
    ranks = [_rank_in(one.name) for one in opened.saved.files]
    if rank is not None and any(one is not None for one in ranks) and rank not in ranks:
        known = sorted({one for one in ranks if one is not None})
        raise OptionError(
            f"rank {rank} saved no file of {files.name}: expected one of {known[0]} to {known[-1]}",
            path=files.name,
        )
    wanted = [
        (one, number)
        for one, number in zip(opened.saved.files, ranks, strict=True)
        if rank is None or number in (None, rank)
    ]
    found = ask_all(store, lambda one: stat_surely(store, files.object_of(one[0])), wanted)
    return tuple(
        HeldFile(
            _shown(opened, file),
            info is not None,
            None if info is None else info.size_bytes,
            file.least_bytes,
            number,
        )
        for (file, number), info in zip(wanted, found, strict=True)
    )


def _shown(opened: OpenCheckpoint, file: SetFile) -> str:
    """The name of `file` for a reader: never a URL's query."""
    files = opened.files
    return file.name if files.in_folder or file.beside else files.context.store.describe(file.name)


def _rank_in(name: str) -> int | None:
    found = _RANK.findall(name.rpartition("/")[2])
    return int(found[-1]) if found else None


def _elements(saved: Saved) -> int:
    """The elements of the model's tensors; those of tied ones, which are the same bytes, once."""
    model = saved.state.get("model")
    if not isinstance(model, dict):
        return 0
    tensors = {name: value for name, value in model.items() if isinstance(value, SavedTensor)}
    tied = tied_names(tensors, saved.aliases)
    return sum(tensor.numel for name, tensor in tensors.items() if name not in tied)


def _keys(node: Any, parts: tuple[str, ...]) -> Iterator[Key]:
    """The leaves of `node`, as ``ignore_keys`` enters it: dicts and lists, but no list of plain values alone."""
    pending: list[tuple[tuple[str, ...], Any]] = [(parts, node)]
    while pending:
        parts, value = pending.pop()
        if isinstance(value, dict) and (value or not parts):
            pending += reversed([((*parts, str(key)), item) for key, item in value.items()])
        elif isinstance(value, list) and any(not isinstance(item, _SCALARS) for item in value):
            pending += reversed([((*parts, str(index)), item) for index, item in enumerate(value)])
        else:
            yield _key(parts, value)


def _key(parts: tuple[str, ...], value: Any) -> Key:
    path = "/".join(parts)
    if isinstance(value, SavedTensor):
        return Key(path, parts, "tensor", value.dtype, value.shape, value.nbytes)
    if isinstance(value, InertTensor):
        return Key(path, parts, value.kind, value.dtype or None, value.shape if value.known else None)
    if isinstance(value, InertArray):
        return Key(path, parts, f"array of {value.dtype}")
    if isinstance(value, InertObject | GlobalName):
        return Key(path, parts, kind_of(value))
    if isinstance(value, dict | list | tuple | set | frozenset | bytes | bytearray):
        return Key(path, parts, type(value).__name__, value=None if value else "empty")
    text = repr(value)
    return Key(
        path, parts, type(value).__name__, value=text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
    )
