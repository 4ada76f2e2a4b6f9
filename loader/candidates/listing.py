"""Lists the candidates of a run: the checkpoints, as far as names tell, in a folder or of a template."""

from __future__ import annotations

import fnmatch
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import CorruptError, FormatError, NotFoundError, UnsafeError
from ..redaction import redact_path
from ..retries import Outages
from ..stores.base import Entry, Heard, Store, unheard
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

    path: str = field(repr=False)  # may have a signature or a password in it
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
    """A folder, and what is in it."""

    store: Store
    name: str
    """In the store."""
    path: str = field(repr=False)
    """For `load`, without a slash at its end."""
    entries: Mapping[str, Entry]
    listed: bool
    """Whether the store could list it; else what is in it is not known."""

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
    heard: Heard = unheard,
    outages: Outages | None = None,
) -> list[Candidate]:
    """What may be the checkpoints of a run, in no order; empty where there is nothing. One process calls it.

    Args:
        path: a folder of checkpoints, or one checkpoint; or a template with ``{rank}``. One part of it may have ``*``
            for what differs between checkpoints: ``run/ep*-ba*-rank{rank}.pt``, ``run/global_step_*/actor``.
        object_store, storage_options: as `load` takes them.
        run_name: stands for ``{run_name}``.
        heard: called while the store is waited for.
        outages: of the call that it is for.

    Raises:
        RankloadError: `AccessError` where the store refuses to list, or cannot be reached; `TemplateError`,
            `FormatError` or `OptionError` for a path that means nothing.
    """
    by_rank = bool(template_variables(path) & _RANK_VARIABLES)
    plain = expand_path(path, rank=0, local_rank=0, node_rank=0, run_name=run_name)
    store, name = open_store(plain, object_store, storage_options, heard, outages)
    try:
        if "*" in path and not (store.is_local and os.path.lexists(name)):
            return _of_pattern(path, object_store, storage_options, run_name, heard, store.outages)
        if by_rank:
            return _of_folder_for_each(store, path, name) or _of_template(store, path, name)
        return _of_path(store, escaped(plain) if not is_url(plain) else plain, name)
    finally:
        store.close()


def _of_folder_for_each(store: Store, template: str, name: str) -> list[Candidate]:
    """What is in the first rank's folder, where the template names a folder: each node's own disk, say."""
    entries = store.entries(name)
    return _of_folder(_folder(store, name, template, entries)) if entries else []


def _of_path(store: Store, path: str, name: str) -> list[Candidate]:
    info = Probes(store).look(name) if not name.endswith("/") else None
    if info is not None and info.certain and not info.is_folder:
        return [Candidate(path, store.describe(name), step_of(posixpath.basename(name)))]
    entries = store.entries(name)
    if entries is None:
        return _by_pointer(store, path, name)
    return _of_folder(_folder(store, name, path, entries))


def _folder(store: Store, name: str, path: str, entries: Iterable[Entry] | None) -> _Folder:
    held = {one.name: one for one in entries or ()}
    return _Folder(store, name.rstrip("/") or name, path.rstrip("/") or path, held, entries is not None)


def _by_pointer(store: Store, path: str, name: str) -> list[Candidate]:
    """Where nothing can be listed: what ``latest`` names, else the path itself."""
    pointed = _latest(_folder(store, name, path, None))
    if pointed is not None:
        return [pointed]
    return [Candidate(path, store.describe(name), step_of(posixpath.basename(name)), surely=False)]


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
    latest = _latest(folder)
    pointers = dict(_links(folder))
    if latest is not None and not latest.fault:
        pointers[latest.path.removeprefix(f"{folder.path}/")] = LATEST
    sets: dict[tuple[str, str], list[int]] = {}
    for name, entry in folder.entries.items():
        if entry.link is not None and _link_target(folder, entry) is not None:
            continue  # what it points at is a candidate itself
        if entry.is_folder:
            made = _of_subfolder(folder, name)
            if made is not None:
                yield replace(made, pointer=pointers.pop(escaped(name), ""))
            continue
        if not is_checkpoint_file(name):
            continue
        ranked = of_rank(name)
        if ranked is not None:
            sets.setdefault((ranked.before, ranked.after), []).append(ranked.rank)
            continue
        yield folder.candidate(name, pointer=pointers.get(escaped(name), ""))
    for (before, after), ranks in sets.items():
        first = OfRank(before, 0, after)
        one = folder.candidate(first.name, pointer=pointers.get(escaped(first.name), ""))
        if 0 not in ranks:
            yield replace(one, fault=f"{first.name} is not there")
        elif len(ranks) > 1 or ".tar" in after:
            yield replace(one, path=_joined(folder.path, first.template))
        else:
            yield one
    if latest is not None and (latest.fault or LATEST in pointers.values()):
        yield latest  # it names nothing that is there, or a tag below another folder, which was not listed


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


def _links(folder: _Folder) -> Iterator[tuple[str, str]]:
    """What links point at, each with the link's name; of the links of several ranks, what the first one's does."""
    for name, entry in folder.entries.items():
        ranked = of_rank(name)
        if ranked is not None and ranked.rank != 0:
            continue
        target = None
        if entry.link is not None:
            target = _link_target(folder, entry)
        elif name.endswith(SUFFIX):
            target = _text_target(folder, name)
        if target is not None:
            yield escaped(target), name


def _link_target(folder: _Folder, entry: Entry) -> str | None:
    """The entry that a symbolic link points at; None where that lies elsewhere."""
    target = os.path.normpath(entry.link or "")
    if os.path.isabs(target):
        target = os.path.relpath(target, os.path.abspath(folder.name))
    return target if target in folder.entries and target != entry.name else None


def _text_target(folder: _Folder, name: str) -> str | None:
    """The entry that a ``.symlink`` object names, relative to its bucket or its folder."""
    link = folder.store.join(folder.name, name)
    try:
        text = folder.store.read_small(link, MAX_TEXT).decode("utf-8-sig").strip()
    except (CorruptError, NotFoundError, UnicodeDecodeError):
        return None
    target = posixpath.basename(text)
    return target if target in folder.entries else None


def _latest(folder: _Folder) -> Candidate | None:
    """What DeepSpeed's ``latest`` names, with its fault where that is no name; None where there is none.

    Raises `AccessError` where the store refuses to say.
    """
    entry = folder.entries.get(LATEST)
    if folder.listed and (entry is None or entry.is_folder):
        return None
    latest = folder.store.join(folder.name, LATEST)
    if not folder.listed and not Probes(folder.store).exists(latest):
        return None
    try:
        tag = read_tag(folder.store, latest)
    except NotFoundError:
        return None
    except (CorruptError, UnsafeError) as error:
        return folder.candidate(LATEST, fault=error.message)
    return folder.candidate(tag, pointer=LATEST)


def _of_template(store: Store, template: str, name: str) -> list[Candidate]:
    """The set of files that a template names, and the others beside it: a pointer's own run goes on with them."""
    before, slash, last = template.rpartition("/")
    entries = store.entries(name.rpartition("/")[0])
    named = Candidate(template, store.describe(name), step_of(last), surely=False)
    if entries is None:
        return [named]
    folder = _folder(store, name.rpartition("/")[0], f"{before}{slash}", entries)
    found = {one.shown: one for one in _inside(folder)}
    entry = folder.entries.get(posixpath.basename(name))
    if entry is None:
        return list(found.values())
    target = _link_target(folder, entry) if entry.link is not None else None
    if target is None:
        made = replace(found.get(named.shown, named), path=template, surely=True)
    else:
        # The files of one save, not links of each rank, which a killed save may have left at two of them.
        of_save = folder.candidate(target, pointer=entry.name)
        made = found.get(of_save.shown, replace(of_save, path=template))
    return [made, *(one for shown, one in found.items() if shown != made.shown)]


def _of_pattern(
    path: str,
    object_store: Any,
    storage_options: Mapping[str, Any] | None,
    run_name: str | None,
    heard: Heard,
    outages: Outages,
) -> list[Candidate]:
    """What fits a path of which one part has ``*``."""
    parts = path.split("/")
    at = next(number for number, part in enumerate(parts) if "*" in part)
    before, part, rest = "/".join(parts[:at]), parts[at], "/".join(parts[at + 1 :])
    if "*" in rest:
        raise FormatError(
            f"{redact_path(path)!r}: '*' may stand in one part of the path alone", path=redact_path(path)
        )

    def first(text: str) -> str:
        return expand_path(text, rank=0, local_rank=0, node_rank=0, run_name=run_name) if text else text

    store, name = open_store(
        first(before) or ("/" if path.startswith("/") else "."), object_store, storage_options, heard, outages
    )
    entries = store.entries(name)
    if entries is None:
        raise FormatError(
            f"{store.describe(name)}: this store cannot list, so that '*' finds nothing: name the files, such as "
            "latest-rank{rank}.pt",
            path=store.describe(name),
        )
    folder = _folder(store, name, f"{before}/" if at else "", entries)
    made: dict[str, Candidate] = {}
    for entry in entries:
        if not fnmatch.fnmatchcase(entry.name, first(part)) or (rest and not entry.is_folder):
            continue
        ranked = of_rank(entry.name) if "{rank" in part or "<rank>" in part else None
        own = folder.candidate(f"{entry.name}/{first(rest)}" if rest else entry.name)
        of_all = ranked.template if ranked is not None else escaped(entry.name)
        child = f"{of_all}/{rest}" if rest else of_all
        made[own.path] = replace(own, path=_joined(folder.path, child), step=step_of(entry.name))
    links = dict(_links(folder))
    return [replace(one, pointer=links.get(path.rpartition("/")[2], "")) for path, one in made.items()]


def _joined(path: str, child: str) -> str:
    """The path of `child` in the folder `path`, both as `load` takes them."""
    if is_url(path):
        return child_of(path, child)
    return posixpath.join(path, child) if path else child
