"""Says what lies where a local path names no checkpoint: the checkpoints in that folder, or beside the missing name.

Only for messages: what is loaded is never found by listing.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from .locate import DCP_METADATA, FILE_SUFFIXES, LATEST, MODEL_FILES, MODEL_STATES, OTHER_FILES, OTHER_KINDS

_LISTED = 2_000
"""Entries of a folder that are looked at: a message is not worth more."""
_SHOWN = 8
"""Entries that a message names."""
_CHECKPOINTS = tuple(end for end in FILE_SUFFIXES if end not in (".json", *OTHER_FILES))
"""Ends of the names of checkpoints."""


def local_nearby(name: str) -> str:
    """What lies in the folder `name`, or beside it where it is not there, as sentences for a message; "" if unknown."""
    folder = name.rstrip("/") or name
    if os.path.isdir(folder):
        return _sentences(folder, close_to=None)
    parent, wanted = os.path.split(folder)
    missing = None
    while parent not in ("", "/") and not os.path.isdir(parent):
        missing = parent
        parent, wanted = os.path.split(parent)
    said = f"There is no folder {missing}. " if missing is not None else ""
    return (said + _sentences(parent or os.curdir, close_to=wanted)).strip()


_KINDS = {
    "a DeepSpeed folder": (LATEST, *MODEL_STATES),
    "a DCP folder": (DCP_METADATA,),
    "a model's folder": MODEL_FILES,
}
"""Kinds of folders that can be loaded to the files by which they are known."""


@dataclass(frozen=True)
class _Found:
    """An entry of a folder that has to do with checkpoints."""

    shown: str
    """Its name, and what it is where that is not a file."""
    to_pass: str | None
    """The path to load it by; None where it cannot be loaded, or where that is not certain."""


def _sentences(folder: str, *, close_to: str | None) -> str:
    """What `folder` holds, checkpoints first; of the rest only names like `close_to`, where that is given."""
    try:
        with os.scandir(folder) as entries:
            names = sorted((entry.name for entry in itertools.islice(entries, _LISTED)), key=_by_number)
    except OSError:
        return ""
    names = [name for name in names if not name.startswith(".")]
    if not names:
        return f"{folder} is empty." if close_to is None else ""
    found = {name: one for name in names if (one := _found(folder, name)) is not None}
    others = [name for name in names if name not in found]
    if close_to is not None:
        others = get_close_matches(close_to, others, n=_SHOWN)
    # Of checkpoints, those with the highest numbers are the newest: a long list keeps its end.
    shown = [one.shown for one in found.values()][-_SHOWN:]
    shown += others[: _SHOWN - len(shown)]
    if not shown:
        return ""
    left = len(found) + len(others) - len(shown)
    more = f" and {left} more" if left else ""
    loadable = [one.to_pass for one in found.values() if one.to_pass is not None]
    advice = f" Pass one of them, such as {loadable[-1]}" if loadable else ""
    if len(loadable) == 1:
        advice = f" Did you mean {loadable[0]}?"
    return f"In {folder} there is {', '.join(shown)}{more}.{advice}"


def _found(folder: str, name: str) -> _Found | None:
    """What the entry `name` is; None for what is no checkpoint."""
    path = os.path.join(folder, name)
    if not os.path.isdir(path):
        return _Found(name, path) if name.endswith(_CHECKPOINTS) else None
    for kind, markers in _KINDS.items():
        if any(os.path.isfile(os.path.join(path, one)) for one in markers):
            return _Found(f"{name} ({kind})", path)
    for marker, (kind, _) in OTHER_KINDS.items():
        if os.path.isfile(os.path.join(path, marker)):
            return _Found(f"{name} ({kind}, which is not supported)", None)
    files = sorted(_files(path))
    if not files:
        return None
    weights = [file for file in files if "model" in file or len(files) == 1]
    listed = ", ".join(files[:3]) + ", ..." * (len(files) > 3)
    return _Found(f"{name} (a folder with {listed})", os.path.join(path, weights[0]) if weights else None)


def _files(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in itertools.islice(entries, _LISTED):
                if entry.name.endswith(_CHECKPOINTS):
                    yield entry.name
    except OSError:
        return


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """A key that puts ``checkpoint-9`` before ``checkpoint-10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
