"""Completes a folder that a DeepSpeed engine wrote: its files are summed, and it gets its name once it is whole.

DeepSpeed writes ``latest`` before it knows that every rank is done, so ``latest`` proves nothing. Here the engine
writes into a tag of a temporary name and no ``latest``; every rank sums files; ``SHA256SUMS`` is written; the folder
gets its name; ``latest`` comes last. Uploaded, the manifest is the last file of the tag.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from ..stores.manifest import FOLDER_SUMS
from .local import part_name, parts_in, sync_folder
from .summed import least_bytes

Seen = Mapping[str, Sequence[int]]
"""The files that a rank sees in the tag's folder, by name: size and inode."""


def engine_bytes(engine: Any) -> int:
    """Bytes that this rank's files have at least: its optimizer's partitions, and the module where it writes that."""
    module_too = getattr(engine, "save_non_zero_checkpoint", False)
    parts: list[Any] = []
    if module_too:
        parts += [list(engine.module.parameters()), list(engine.module.buffers())]
    optimizer = engine.optimizer
    if module_too or getattr(engine, "save_zero_checkpoint", False):
        while getattr(optimizer, "optimizer", None) is not None:
            optimizer = optimizer.optimizer
        parts.append(list(getattr(optimizer, "state", {}).values()))
        parts += [list(group["params"]) for group in getattr(optimizer, "param_groups", ())]
    return least_bytes(parts)


def list_files(folder: str) -> dict[str, list[int]]:
    """The files below `folder`, as `deal_files` takes them; empty where there is no such folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            status = os.stat(path)
            found[os.path.relpath(path, folder)] = [status.st_size, status.st_ino]
    return found


def deal_files(seen: Sequence[Seen]) -> list[list[str]]:
    """Which files each rank sums, by rank: every file once, by a rank that sees it, with equally many bytes for each.

    Where nodes with disks of their own have files of one name, the lowest rank's counts.
    """
    first: dict[str, Sequence[int]] = {}
    for files in seen:
        for name, marks in files.items():
            first.setdefault(name, marks)
    dealt: list[list[str]] = [[] for _ in seen]
    loads = [0] * len(seen)
    for name, marks in sorted(first.items(), key=lambda one: (-one[1][0], one[0])):
        ranks = [rank for rank, files in enumerate(seen) if files.get(name) == marks]
        rank = min(ranks, key=lambda one: (loads[one], one))
        loads[rank] += marks[0]
        dealt[rank].append(name)
    return dealt


def take_name(part: str, folder: str) -> None:
    """Renames the finished folder `part` to `folder`; an old one of that name makes room first, and is then removed."""
    old = None
    if os.path.lexists(folder):
        old = part_name(folder)
        os.rename(folder, old)
    os.rename(part, folder)
    sync_folder(os.path.dirname(folder) or ".")
    if old is not None:
        remove_folder(old)


def remove_unfinished(folder: str) -> None:
    """Removes the tags that killed saves left in `folder` under temporary names.

    One that has its manifest is whole, and gets its name where that is free: its save was killed between two renames.
    Each node calls it, all at once where they share the folder.
    """
    for path, plain in parts_in(folder):
        final = os.path.join(folder, plain)
        with contextlib.suppress(FileNotFoundError):
            if os.path.exists(os.path.join(path, FOLDER_SUMS)) and not os.path.lexists(final):
                os.rename(path, final)
            elif os.path.isdir(path):
                remove_folder(path)
            else:
                os.unlink(path)


def remove_folder(folder: str) -> None:
    """Removes the folder, or the link to one, as far as that can be done."""
    if os.path.islink(folder):
        with contextlib.suppress(OSError):
            os.unlink(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
