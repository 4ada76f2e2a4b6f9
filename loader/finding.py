"""Finds the newest checkpoint of a run that is proven whole, in one process, and says why newer ones are not.

    candidates   candidates.listing    what lies there, as far as names tell
    order        _in_order             newest first, by step; an explicit pointer before them
    proof        prove                 of each in turn, until one is proven: its outline is read, and completeness
                                       compares the files that it consists of with what the store has

Imports no torch. Not guaranteed: that no byte in the middle of a file is damaged: the load compares checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .alone import OUTLINE, OpenCheckpoint, open_alone
from .candidates.found import FoundCheckpoint
from .candidates.listing import Candidate, list_candidates
from .completeness import faults_of
from .errors import AccessError, FormatError, NotFoundError, RankloadError
from .options import LoadOptions, Options, resolve_options
from .request import as_path
from .retries import Outages
from .stores.base import Heard, Store, unheard
from .stores.locate import Located
from .stores.manifest import find_manifests, key_of, known_sums
from .writing.summed import sum_of

_SHOWN = 4
"""Faults that a reason names."""


def find(
    path: str,
    *,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    run_name: str | None = None,
    newest: bool = False,
    every: bool = False,
    skip: Mapping[str, str] | None = None,
    heard: Heard = unheard,
) -> list[FoundCheckpoint]:
    """What is at `path`, in the order in which it would be taken: the first one that is proven is the one to take.

    One process calls it.

    Args:
        path, object_store, options, run_name: as `candidates.listing.list_candidates` takes them.
        newest: whether the one with the highest step comes first, whatever ``latest`` or a link names.
        every: whether all are examined, also older ones than the first proven one.
        skip: what messages call the checkpoints that are passed over whatever they hold, each with the reason.
        heard: called while a store is waited for that lists. What is opened tells the channel that is open, if any.

    Raises:
        RankloadError: `AccessError` where the store refuses or cannot be reached: whether there is a checkpoint is not
            known then. `TemplateError`, `OptionError` or `FormatError` for a path that means nothing.
    """
    resolved = options if isinstance(options, Options) else resolve_options(options)
    given = list_candidates(
        as_path(path),
        object_store,
        resolved.storage_options,
        run_name=run_name,
        heard=heard,
        outages=Outages(resolved.stall_timeout_s),
    )

    def examine(one: Candidate) -> FoundCheckpoint | None:
        return prove(one, object_store=object_store, options=resolved)

    # Of a name that tells no step, the checkpoint itself must tell it before there is an order.
    early = {one.path: examine(one) for one in given if one.step is None}
    known = [one for one in given if one.path not in early or early[one.path] is not None]
    steps = {path: found.step for path, found in early.items() if found is not None}
    in_order = _in_order([replace(one, step=steps.get(one.path, one.step)) for one in known], newest=newest)
    listed: list[FoundCheckpoint] = []
    taken: Candidate | None = None
    for one in in_order:
        if skip is not None and one.shown in skip:
            found: FoundCheckpoint | None = replace(_not_examined(one), proven=False, reason=skip[one.shown])
        elif one.path in early:
            found = early[one.path]
        else:
            # Of what is newer than the one that a pointer names, it must be told why it is not taken.
            needed = every or taken is None or _is_newer(one, taken)
            found = examine(one) if needed else _not_examined(one)
        if found is not None:
            listed.append(found)
            taken = one if taken is None and found.proven else taken
    return listed


def _is_newer(one: Candidate, other: Candidate) -> bool:
    return one.step is not None and (other.step is None or one.step > other.step)


def _not_examined(one: Candidate) -> FoundCheckpoint:
    return FoundCheckpoint(one.path, one.step, pointer=one.pointer, shown=one.shown)


def _in_order(given: list[Candidate], *, newest: bool) -> list[Candidate]:
    """Newest first by step; those without one last, by the time of their last write. A pointer's comes first."""

    def age(one: Candidate) -> tuple[bool, int, float, str]:
        return (one.step is not None, one.step or 0, one.modified_s or 0.0, one.path)

    in_order = sorted(given, key=age, reverse=True)
    if newest:
        return in_order
    return sorted(in_order, key=lambda one: not one.pointer)


def prove(
    candidate: Candidate,
    *,
    object_store: Any = None,
    options: Options,
) -> FoundCheckpoint | None:
    """Whether `candidate` is whole; None where it is no checkpoint, and its name claims none. One process calls it.

    Raises `AccessError` where the store refuses to say or cannot be reached.
    """
    found = _not_examined(candidate)
    if candidate.fault:
        return replace(found, proven=False, reason=candidate.fault)
    # What is there is looked at; nothing is compared that a load would have to fetch whole for it.
    outline = replace(options, verify="off")
    try:
        with open_alone(candidate.path, OUTLINE, object_store=object_store, options=outline) as opened:
            return _examined(found, opened, opened.files.context.stages.count)
    except AccessError:
        raise
    except RankloadError as error:
        if not candidate.surely and isinstance(error, NotFoundError | FormatError):
            return None
        return replace(found, proven=False, reason=error.message.removeprefix(f"{found.shown}: "))


def _examined(
    found: FoundCheckpoint, opened: OpenCheckpoint, on_bytes: Callable[[int], None]
) -> FoundCheckpoint:
    saved = opened.saved
    step = saved.step if saved.step is not None else found.step
    found = replace(found, step=step, kind=saved.kind, world_size=saved.world_size)
    faults = faults_of(opened)
    reasons = [*map(str, faults[:_SHOWN]), *saved.unfinished]
    if len(faults) > _SHOWN:
        reasons.append(f"and {len(faults) - _SHOWN} more")
    reasons = reasons or list(_other_than_listed(opened, on_bytes))
    if not reasons:
        return replace(found, proven=True)
    missing = () if not faults or saved.unfinished else tuple(fault.file for fault in faults)
    return replace(found, proven=False, reason="; ".join(reasons), missing=missing)


def _other_than_listed(opened: OpenCheckpoint, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """The local files that a manifest lists with another checksum, each as a sentence.

    A save writes its manifest last, so that only a file which was written after it needs to be read: one of a later
    save that did not end, or of a copy. Of remote files, the load compares those that it fetches whole.
    """
    files, store = opened.files, opened.files.context.store
    if not store.is_local:
        return
    known = known_sums(find_manifests(store, files.located))
    for name in map(files.object_of, opened.saved.files):
        one = known.get(key_of(store, name))
        if one is None or not _is_later(store, files.located, name, one.told_by):
            continue
        with open(store.local_path(name), "rb") as file:
            found = sum_of(file, on_bytes)
        if found != one.sha256.hex():
            yield (
                f"{store.describe(name)} was written after {one.told_by}, which lists another checksum: its files are "
                "of two saves"
            )


def _is_later(store: Store, located: Located, name: str, manifest: str) -> bool:
    """Whether the file `name` was written after the manifest that lists it, as far as is known."""
    folders = {os.path.dirname(name), located.name, located.root or located.name}
    times = [
        os.stat(path).st_mtime_ns
        for path in (os.path.join(folder, manifest) for folder in folders)
        if os.path.isfile(path)
    ]
    return not times or os.stat(store.local_path(name)).st_mtime_ns > max(times)
