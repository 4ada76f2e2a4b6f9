"""Leaves out the parts of a checkpoint that ``ignore_keys`` names: globs over ``/``-joined keys, or a callable. Pure.

Paths are those of Composer's ``ignore_keys``: ``state/model/NAME``, ``state/optimizers/CLASS``, ``rng``. ``*`` matches
``/`` too, and case matters. A glob may match a node inside the tree: ``state/model`` removes that node,
``state/model/*`` leaves it empty. Items of lists are named by their position in the checkpoint; tuples are leaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from itertools import islice
from typing import Any

from ..errors import OptionError

_NEAREST = 3
"""Paths that `nearest` gives at most."""
_COMPARED = 20_000
"""Keys of one dict that are compared with a glob: that takes about a second."""

IgnoreKeys = Sequence[str] | Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ignored:
    """A tree without what was ignored."""

    tree: dict[str, Any]
    paths: tuple[str, ...]
    """The nodes that were removed; not what lies below them."""
    unmatched: tuple[str, ...]
    """Globs that matched nothing."""


def ignore(tree: dict[str, Any], ignore_keys: IgnoreKeys | str | None) -> Ignored:
    """`tree` without what `ignore_keys` names; `tree` itself stays as it is.

    A callable gets a copy of the nested containers and changes it in place; its tensors were not read, and what it
    returns is not used. A string is one glob. Raises `OptionError` where a glob is no string.
    """
    if ignore_keys is None:
        return Ignored(tree, (), ())
    if callable(ignore_keys):
        changed = _copy_containers(tree)
        ignore_keys(changed)
        return Ignored(changed, tuple(_vanished(tree, changed, "")), ())
    globs = [ignore_keys] if isinstance(ignore_keys, str) else list(ignore_keys)
    for glob in globs:
        if not isinstance(glob, str):
            raise OptionError(f"ignore_keys holds {glob!r}: expected globs such as 'state/model/*'")
    patterns = [re.compile(translate(glob)) for glob in globs]
    matched: set[int] = set()
    removed: list[str] = []
    kept = _without(tree, "", patterns, matched, removed)
    unmatched = tuple(glob for index, glob in enumerate(globs) if index not in matched)
    return Ignored(kept, tuple(removed), unmatched)


def unmatched_glob(tree: dict[str, Any], glob: str, file: str) -> str:
    """The warning where `glob` matches nothing in `tree`, which `file` holds."""
    near = ", ".join(map(repr, nearest(tree, glob))) or "none: the checkpoint is empty"
    return f"ignore_keys: {glob!r} matches nothing in {file}; the nearest keys: {near}"


def nearest(tree: dict[str, Any], glob: str) -> list[str]:
    """Up to three paths in `tree` that are likest to `glob`, which matches none; for messages.

    Those that hold its text come first (``model/*`` lacks its ``state/``, ``head`` its stars). Otherwise it is followed
    key by key, each time by the likest one; where none is alike, the keys at that place are given.
    """
    text = glob.strip("*/")
    if text:
        holding = re.compile(translate(f"*{text}*"))
        found = list(islice((path for path in _paths(tree, "") if holding.match(path)), _NEAREST))
        if found:
            return found
    node: Any = tree
    path = ""
    parts = glob.strip("/").split("/")
    for position, part in enumerate(parts):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        below = {str(key): item for key, item in islice(items, _COMPARED)}
        if not below:
            return [path] if path else []
        alike = (
            [part] if part in below else get_close_matches(part.strip("*?"), below, n=_NEAREST, cutoff=0.5)
        )
        if not alike or position == len(parts) - 1:
            return [f"{path}/{key}" if path else key for key in alike or list(below)[:_NEAREST]]
        node, path = below[alike[0]], f"{path}/{alike[0]}" if path else alike[0]
    return []


def at_or_below(wanted: str) -> Callable[[str], bool]:
    """Whether a path is one that `wanted` names, or lies below one: a glob as above, or a part of the path.

    As ``ignore_keys`` would take it, for whoever shows or compares such paths.
    """
    if not re.search(r"[*?\[]", wanted):
        return lambda path: wanted in path
    pattern = re.compile(translate(wanted))
    known: dict[str, bool] = {}

    def matches(path: str) -> bool:
        if path not in known:
            above = path.rpartition("/")[0]
            known[path] = pattern.match(path) is not None or (bool(above) and matches(above))
        return known[path]

    return matches


def _copy_containers(value: Any) -> Any:
    """`value` with its dicts and lists copied; tuples and leaves are the same objects."""
    if isinstance(value, dict):
        return _with_items(value, [(key, _copy_containers(item)) for key, item in value.items()])
    if isinstance(value, list):
        return [_copy_containers(item) for item in value]
    return value


def _without(
    node: Any, path: str, patterns: list[re.Pattern[str]], matched: set[int], removed: list[str]
) -> Any:
    if not isinstance(node, dict | list):
        return node
    kept: list[tuple[Any, Any]] = []
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        child = f"{path}/{key}" if path else str(key)
        hits = [index for index, pattern in enumerate(patterns) if pattern.match(child)]
        if hits:
            matched.update(hits)
            removed.append(child)
            # A glob for something below the removed node did match: it is not reported as unmatched.
            for below in _paths(item, child):
                matched.update(i for i, pattern in enumerate(patterns) if pattern.match(below))
        else:
            kept.append((key, _without(item, child, patterns, matched, removed)))
    return _with_items(node, kept) if isinstance(node, dict) else [item for _, item in kept]


def _with_items(node: dict[Any, Any], items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """`items` in a dict of the type of `node`, with its attributes: a state dict has ``_metadata``."""
    made = copy(node)
    made.clear()
    made.update(items)
    return made


def _paths(node: Any, path: str) -> Iterator[str]:
    if not isinstance(node, dict | list):
        return
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        child = f"{path}/{key}" if path else str(key)
        yield child
        yield from _paths(item, child)


def _vanished(before: Any, after: Any, path: str) -> Iterator[str]:
    """The paths of nodes that `before` has and `after` lacks; not what lies below them."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    for key, item in before.items():
        child = f"{path}/{key}" if path else str(key)
        if key not in after:
            yield child
        else:
            yield from _vanished(item, after[key], child)
