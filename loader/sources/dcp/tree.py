"""Puts the values of a DCP folder back into the nested state dict that was saved. Pure.

The folder keeps flat keys, and the path of each: keys of dicts, all of which became text, and positions in lists. Empty
dicts and lists of a state dict leave no trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import CorruptError
from ...formats.dcp_metadata import Path

_SPARE = 16
"""Positions of a list without a value, apart from as many as have one: empty dicts stood there."""


def nested(values: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """The state dict that has `values` at their paths. Raises `CorruptError` where they contradict each other."""
    root: dict[str | int, Any] = {}
    inner = {id(root)}
    for path, value in values:
        node = root
        for part in path[:-1]:
            if part not in node:
                node[part] = {}
                inner.add(id(node[part]))
            node = node[part]
            if id(node) not in inner:
                raise _contradiction(path)
        if path[-1] in node:
            raise _contradiction(path)
        node[path[-1]] = value
    made = _made(root, inner, ())
    if not isinstance(made, dict):
        raise CorruptError("its top level is a list, expected a dict")
    return made


def _made(node: Any, inner: set[int], path: Path) -> Any:
    """`node` with lists where all keys are positions."""
    if not isinstance(node, dict) or id(node) not in inner:
        return node
    made = {key: _made(value, inner, (*path, key)) for key, value in node.items()}
    positions = [key for key in made if isinstance(key, int)]
    if not positions:
        return made
    last = max(positions)
    if len(positions) < len(made) or last >= 2 * len(made) + _SPARE:
        raise _contradiction(path)
    return [made.get(position, {}) for position in range(last + 1)]


def _contradiction(path: Path) -> CorruptError:
    shown = ".".join(map(str, path))[:120]
    return CorruptError(
        f"planner_data contradicts itself at {shown!r}: it is a value and a dict or list at once"
    )
