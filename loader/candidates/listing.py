"""Lists the candidates of a run: the checkpoints, as far as names tell, in a folder or of a template."""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FormatError, NotFoundError, RankloadError
from ..stores.base import Entry, Store
from ..stores.locate import LATEST, read_tag
from ..stores.names import child_of, is_url
from ..stores.open import open_store
from ..stores.probes import Probes
from ..stores.symlinks import MAX_TEXT, SUFFIX
from ..template import expand_path, template_variables
from .names import (
    OfRank,
    escaped,
    is_checkpoint_file,
    is_one_checkpoint,
    looks_like_checkpoint,
    of_rank,
    step_of,
)

FOLDERS_OF_RUNS = ("checkpoints", "checkpoint")
"""Folders in a run's own folder in which frameworks save: Accelerate and Lightning, torchtitan."""
_RANK_VARIABLES = {"rank", "local_rank", "node_rank"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """What may be a checkpoint."""

    path: str
    """For `load`; a template where each rank has a file."""
    shown: str
    """The same for messages, without secrets."""
    step: int | None
    """That its name tells."""
    modified_s: float | None = None
    """When it was last written, as the store says; of a template's files, of the first rank's."""
    pointer: str = ""
    """The name of what points at it: ``latest``, a link."""
    surely: bool = True
    """Whether its name is a checkpoint's. What else turns out to be none was never meant to be one."""
    fault: str = ""
    """Why it cannot be one, where that is known already."""


@dataclass(frozen=True)
class _Folder:
    """A folder that was listed."""

    store: Store
    name: str
    """In the store."""
    path: str
    """For `load`, without a slash at its end."""
    entries: Mapping[str, Entry]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.entries)

    def candidate(self, name: str, *, pointer: str = "", surely: bool = True, fault: str = "") -> Candidate:
        """That of an entry, or of one further down (``epoch1/step3``)."""
        entry = self.entries.get(name)
        return Candidate(
            _joined(self.path, escaped(name)),
            self.store.describe(self.store.join(self.name, name)),
            step_of(name),
            entry.modified_s if entry is not None else None,
            pointer,
            surely,
            fault,
        )


def list_candidates(
    path: str,
    object_store: Any = None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    run_name: str | None,
) -> list[Candidate]:
    """What may be the checkpoints of a run, in no order; empty where there is nothing. One process calls it.

    Args:
        path: a folder of checkpoints, or one checkpoint; or a template with ``{rank}``, whose last part may have ``*``
            for what differs between checkpoints: ``run/ep*-ba*-rank{rank}.pt``.
        object_store, storage_options: as `load` takes them.
        run_name: stands for ``{run_name}``.

    Raises:
        RankloadError: `AccessError` where the store refuses to list, or cannot be reached; `TemplateError` or
            `OptionError` for a path that means nothing.
    """
    by_rank = bool(template_variables(path) & _RANK_VARIABLES)
    plain = expand_path(path, rank=0, local_rank=0, node_rank=0, run_name=run_name)
    store, name = open_store(plain, object_store, storage_options)
    try:
        if by_rank:
            return _of_folder_for_each(store, path, name) or _of_template(store, path, name, run_name)
        return _of_path(store, escaped(plain) if not is_url(plain) else plain, name)
    finally:
        store.close()


def _of_folder_for_each(store: Store, template: str, name: str) -> list[Candidate]:
    """What is in the first rank's folder, where the template names a folder: each node's own disk, say."""
    entries = None if "*" in template else store.entries(name)
    return _of_folder(_folder(store, name, template, entries)) if entries else []


def _of_path(store: Store, path: str, name: str) -> list[Candidate]:
    info = Probes(store).look(name) if not name.endswith("/") else None
    if info is not None and info.certain and not info.is_folder:
        return [Candidate(path, store.describe(name), step_of(posixpath.basename(name)))]
    entries = store.entries(name)
    if entries is None:
        return _by_pointer(store, path, name)
    return _of_folder(_folder(store, name, path, entries))


def _folder(store: Store, name: str, path: str, entries: Iterable[Entry]) -> _Folder:
    return _Folder(
        store, name.rstrip("/") or name, path.rstrip("/") or path, {one.name: one for one in entries}
    )


def _by_pointer(store: Store, path: str, name: str) -> list[Candidate]:
    """Where nothing can be listed: what ``latest`` names, else the path itself."""
    folder = _folder(store, name, path, ())
    pointed = _latest(folder) if Probes(store).exists(store.join(name, LATEST)) else None
    return (
        [pointed]
        if pointed is not None
        else [Candidate(path, store.describe(name), step_of(name), surely=False)]
    )


def _of_folder(folder: _Folder) -> list[Candidate]:
    found = list(_inside(folder))
    numbered = any(one.step is not None and one.surely for one in found)
    if is_one_checkpoint(folder.names) and not (numbered and _is_run(folder)):
        return [
            Candidate(
                folder.path, folder.store.describe(folder.name), step_of(posixpath.basename(folder.name))
            )
        ]
    if found:
        return found
    for name in FOLDERS_OF_RUNS:
        entry = folder.entries.get(name)
        if entry is not None and entry.is_folder:
            below = folder.store.join(folder.name, name)
            entries = folder.store.entries(below)
            if entries:
                return _of_folder(_folder(folder.store, below, _joined(folder.path, name), entries))
    return []


def _is_run(folder: _Folder) -> bool:
    """Whether the folder is a run's own, in which Trainer put the last weights too, beside its checkpoints."""
    return any(re.fullmatch(r"checkpoint[-_]\d+", name) for name in folder.names)


def _inside(folder: _Folder) -> Iterator[Candidate]:
    """The candidates directly in a folder: other folders, files, and files of each rank."""
    pointers = dict(_pointers(folder))
    seen = set()
    sets: dict[tuple[str, str], list[int]] = {}
    for name, entry in folder.entries.items():
        if entry.link is not None and _link_target(folder, entry) is not None:
            continue  # what it points at is a candidate itself
        if entry.is_folder:
            made = _of_subfolder(folder, name)
            if made is not None:
                seen.add(name)
                yield replace(made, pointer=pointers.get(name, ""))
            continue
        if not is_checkpoint_file(name):
            continue
        ranked = of_rank(name)
        if ranked is not None:
            sets.setdefault((ranked.before, ranked.after), []).append(ranked.rank)
            continue
        yield folder.candidate(name, pointer=pointers.get(name, ""))
    for (before, after), ranks in sets.items():
        first = OfRank(before, 0, after)
        pointer = pointers.get(first.name, "")
        if 0 not in ranks:
            yield folder.candidate(first.name, pointer=pointer, fault=f"{first.name} is not there")
        elif len(ranks) > 1 or ".tar" in after:
            one = folder.candidate(first.name, pointer=pointer)
            yield replace(one, path=_joined(folder.path, first.template))
        else:
            yield folder.candidate(first.name, pointer=pointer)
    latest = _latest(folder) if LATEST in folder.names else None
    if latest is not None and "/" in latest.path.removeprefix(f"{folder.path}/"):
        yield latest  # a tag below another folder, which was not listed
    elif latest is not None and latest.path.rpartition("/")[2] not in map(escaped, seen):
        yield latest


def _of_subfolder(folder: _Folder, name: str) -> Candidate | None:
    """The candidate that a folder in the folder is; None where nothing shows one."""
    if name.startswith(".") or name.endswith(".part"):
        return None
    if step_of(name) is not None or name.endswith(".ckpt"):
        return folder.candidate(name)
    if name in FOLDERS_OF_RUNS:
        return None
    entries = folder.store.entries(folder.store.join(folder.name, name))
    if entries is None or not looks_like_checkpoint(frozenset(one.name for one in entries)):
        return None
    return folder.candidate(name, surely=False)


def _pointers(folder: _Folder) -> Iterator[tuple[str, str]]:
    """What is pointed at by name, each with the name of the pointer: links, and DeepSpeed's ``latest``."""
    for name, entry in folder.entries.items():
        if entry.link is not None:
            target = _link_target(folder, entry)
            if target is not None and (of_rank(name) or OfRank("", 0, "")).rank == 0:
                yield target, name
        elif name.endswith(SUFFIX) and (of_rank(name) or OfRank("", 0, "")).rank == 0:
            target = _text_target(folder, name)
            if target is not None:
                yield target, name
    if LATEST in folder.names and not folder.entries[LATEST].is_folder:
        latest = _latest(folder)
        if latest is not None and not latest.fault:
            yield latest.path.removeprefix(f"{folder.path}/"), LATEST


def _link_target(folder: _Folder, entry: Entry) -> str | None:
    """The entry that a symbolic link points at; None where that lies elsewhere."""
    target = os.path.normpath(entry.link or "")
    if os.path.isabs(target):
        target = os.path.relpath(target, os.path.abspath(folder.name))
    return target if target in folder.entries and target != entry.name else None


def _text_target(folder: _Folder, name: str) -> str | None:
    """The entry that a ``.symlink`` object names, relative to its bucket or its folder."""
    try:
        text = (
            folder.store.read_small(folder.store.join(folder.name, name), MAX_TEXT)
            .decode("utf-8-sig")
            .strip()
        )
    except (RankloadError, UnicodeDecodeError):
        return None
    target = posixpath.basename(text)
    return target if target in folder.entries else None


def _latest(folder: _Folder) -> Candidate | None:
    """What DeepSpeed's ``latest`` names; with its fault where that is no name."""
    latest = folder.store.join(folder.name, LATEST)
    try:
        tag = read_tag(folder.store, latest)
    except NotFoundError:
        return None
    except RankloadError as error:
        return folder.candidate(LATEST, fault=error.message)
    return folder.candidate(tag, pointer=LATEST)


def _of_template(store: Store, template: str, name: str, run_name: str | None) -> list[Candidate]:
    """The sets of files that a template names; ``*`` stands for what differs between them."""
    before, slash, last = template.rpartition("/")
    if "*" in before:
        raise FormatError(f"{template!r}: '*' may stand in the last part of the path alone", path=template)
    folder_name = name.rpartition("/")[0]
    entries = store.entries(folder_name)
    if entries is None:
        if "*" in last:
            raise FormatError(
                f"{store.describe(name)}: this store cannot list, so that '*' finds nothing: name the files, such as "
                "latest-rank{rank}.pt",
                path=store.describe(name),
            )
        return [Candidate(template, store.describe(name), step_of(last), surely=False)]
    folder = _folder(store, folder_name, f"{before}{slash}", entries)
    wanted = expand_path(last, rank=0, local_rank=0, node_rank=0, run_name=run_name)
    found = {one.shown: one for one in _inside(folder)}
    made: dict[str, Candidate] = {}
    for entry in entries:
        if not fnmatch.fnmatchcase(entry.name, wanted):
            continue
        target = _link_target(folder, entry) if entry.link is not None else None
        own = folder.candidate(target or entry.name, pointer=entry.name if target is not None else "")
        ranked = of_rank(target or entry.name)
        of_all = ranked.template if ranked is not None else escaped(entry.name)
        path = template if "*" not in wanted else _joined(folder.path, of_all)
        # The files of one save, not links of each rank, which a killed save may have left at two of them.
        made[own.shown] = found.get(own.shown) or replace(own, path=path)
        if target is None and own.shown in found:
            made[own.shown] = replace(found[own.shown], path=path)
    if "*" in wanted:
        return list(made.values())
    # A pointer's own run goes on with what lies beside it.
    return [*made.values(), *(one for shown, one in found.items() if shown not in made)]


def _joined(path: str, child: str) -> str:
    """The path of `child` in the folder `path`, both as `load` takes them."""
    if is_url(path):
        return child_of(path, child)
    return posixpath.join(path, child) if path else child
