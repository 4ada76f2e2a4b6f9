"""Walks a checkpoint's tree, and refuses trees that no walk could get through. Free of torch.

A pickle can put one list into another a thousand times, and do so again with the result, or put a list into itself: a
few hundred bytes then describe a tree without end. `check_tree` refuses such a tree when the file is read; afterwards,
code may walk its plain containers by recursion. Objects that the pickle describes may refer to themselves (real ones
do), so walks that enter their fields visit each only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from reprlib import repr as short_repr
from typing import Any

from ..errors import CorruptError, UnsafeError
from .tensor import SavedTensor, StorageRef
from .values import UNSUPPORTED, GlobalName, InertArray, InertObject, kind_of

MAX_DEPTH = 200
MAX_UNSHARED = 1_000_000
"""How many values a tree may have, plus 16 for each that the file holds, where shared ones count as often as they
appear."""

BOUND = (
    "which is more than rankload takes on for a file of its size (docs/safety.md states the bounds). Such a file can "
    "be sound: save long lists, and dicts of very many values, as tensors, or leave them out of the checkpoint."
)
"""How a message goes on that says which bound a file exceeds."""

_CONTAINERS = (dict, list, tuple, set, frozenset)
_ENTERED = (*_CONTAINERS, InertObject)
_TEXT = frozenset({str})
_LEAVES = frozenset({int, str, float, bool, type(None)})
"""Some of the types of values that hold no others."""


def check_tree(tree: Any, *, name: str) -> None:
    """Makes sure that the plain containers of `tree` can be walked by recursion, and in reasonable time.

    Raises `CorruptError` where one contains itself, and `UnsafeError` where they nest deeper than `MAX_DEPTH` or
    sharing makes the tree far larger than the file. An `InertObject` counts as one value, and its fields as another
    tree. Messages call the file `name`.
    """
    sizes: dict[int, tuple[int, int]] = {}
    roots: list[Any] = [tree]
    seen_objects: set[int] = set()
    total = held = 0
    while roots:
        root = roots.pop()
        if isinstance(root, InertObject):
            if id(root) not in seen_objects:
                seen_objects.add(id(root))
                for part in (root.args, root.kwargs, root.state, root.items, root.entries):
                    if not part or not isinstance(part, _ENTERED):
                        total += 1
                        held += 1
                    elif type(part) is dict and id(part) not in sizes and _is_flat(part):
                        total += 1 + len(part)  # as `_measure` counts it: the state of most objects
                        held += _note_flat(part, sizes)
                    else:
                        roots.append(part)
            continue
        values, own = _measure(root, sizes, roots, name)
        total += values
        held += own
    if total > MAX_UNSHARED + 16 * held:
        raise UnsafeError(
            f"{name}: shared parts make it a tree of {float(min(total, 1 << 1000)):.3g} values, of which the file "
            f"holds {held:,}, {BOUND}",
            path=name,
        )


def iterate(tree: Any, *, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of `tree`, containers too, with its ``/``-joined path, in order; a shared container only once.

    Enters the fields of an `InertObject`: keys of its state follow the object's own path.
    """
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [(path, tree)]
    while pending:
        where, value = pending.pop()
        if isinstance(value, _ENTERED):
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending.extend(reversed(list(_named_children(where, value))))
        yield where, value


def values(tree: Any) -> Iterator[Any]:
    """Every value of `tree` as `iterate` yields it, without its path and in a fraction of the time."""
    seen: set[int] = set()
    pending: list[Any] = [tree]
    while pending:
        value = pending.pop()
        if isinstance(value, _ENTERED):
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending.extend(reversed(list(_children(value))))
        yield value


def tensors(tree: Any, *, path: str = "") -> list[tuple[str, SavedTensor]]:
    """Every saved tensor of `tree` with its path, in order; those inside inert objects too."""
    return [(where, value) for where, value in iterate(tree, path=path) if isinstance(value, SavedTensor)]


def storages(tree: Any) -> list[StorageRef]:
    """The storages of every saved tensor of `tree` that are known, each once, in order."""
    found: dict[StorageRef, None] = {}
    for value in values(tree):
        if isinstance(value, SavedTensor):
            found.update(dict.fromkeys(value.storages))
    return list(found)


def unknown_values(tree: Any, *, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that `is_unknown`, with its path, in order."""
    return ((where, value) for where, value in iterate(tree, path=path) if is_unknown(value))


def is_unknown(value: Any) -> bool:
    """Whether it cannot be made real: it is of an unknown class, or a tensor or array of a kind that is not restored.

    What it holds is not looked at.
    """
    if isinstance(value, InertObject | GlobalName):
        return not value.known
    return isinstance(value, InertArray) and value.dtype == UNSUPPORTED


def find_unknown(tree: Any, *, path: str = "") -> list[tuple[str, str]]:
    """(path, what it is) of every value of `unknown_values`: the name of its class or function, where it has one."""
    return [(where, kind_of(value)) for where, value in unknown_values(tree, path=path)]


def join_path(path: str, key: Any) -> str:
    """``path/key``; the key alone where `path` is empty."""
    return f"{path}/{_key_text(key)}" if path else _key_text(key)


def _key_text(key: Any) -> str:
    """A dict's key as it appears in a ``/``-joined path."""
    return key if isinstance(key, str) else short_repr(key)


def _measure(root: Any, sizes: dict[int, tuple[int, int]], objects: list[Any], name: str) -> tuple[int, int]:
    """How many values `root` has, shared ones counted wherever they appear, and how many that are counted once.

    For a container measured before: 1, and 0.

    Adds each container's (values, depth) to `sizes`, by id, and each `InertObject` met to `objects`.
    """
    if not isinstance(root, _CONTAINERS):
        return 1, 1
    if id(root) in sizes:
        return 1, 0
    if _is_flat(root):
        return 1 + len(root), _note_flat(root, sizes)
    held = 1
    stack: list[tuple[Any, Iterator[Any]]] = [(root, _children(root))]
    sizes[id(root)] = (0, 0)
    counts = [[1, 1]]
    while True:
        node, children = stack[-1]
        for child in children:
            if isinstance(child, _CONTAINERS):
                known = sizes.get(id(child))
                if known is None:
                    if len(stack) > MAX_DEPTH:
                        raise _too_deep(name)
                    if _is_flat(child):
                        held += _note_flat(child, sizes) - 1
                        counts[-1][0] += 1 + len(child)
                        counts[-1][1] = max(counts[-1][1], 2)
                        continue
                    sizes[id(child)] = (0, 0)
                    stack.append((child, _children(child)))
                    counts.append([1, 1])
                    break
                if known[0] == 0:
                    raise CorruptError(f"{name}: one of its containers contains itself.", path=name)
                counts[-1][0] += known[0]
                counts[-1][1] = max(counts[-1][1], known[1] + 1)
            else:
                counts[-1][0] += 1
                if isinstance(child, InertObject):
                    objects.append(child)
        else:
            values, depth = counts.pop()
            held += len(node)
            if depth > MAX_DEPTH:
                raise _too_deep(name)
            sizes[id(node)] = (values, depth)
            stack.pop()
            if not stack:
                return values, held
            counts[-1][0] += values
            counts[-1][1] = max(counts[-1][1], depth + 1)


def _is_flat(node: Any) -> bool:
    """Whether a container holds neither containers nor objects, and no key of a dict counts as a value of its own."""
    kinds = set(map(type, node))
    if isinstance(node, dict):
        if not kinds <= _TEXT:
            return False
        kinds = set(map(type, node.values()))
    return kinds <= _LEAVES or not any(issubclass(kind, _ENTERED) for kind in kinds)


def _note_flat(node: Any, sizes: dict[int, tuple[int, int]]) -> int:
    """Adds the size of a flat container to `sizes`, as `_measure` does; returns how many values it holds."""
    if id(node) in sizes:
        return 0
    sizes[id(node)] = (1 + len(node), 1)
    return 1 + len(node)


def _too_deep(name: str) -> UnsafeError:
    return UnsafeError(
        f"{name}: its containers nest deeper than {MAX_DEPTH} levels, {BOUND}",
        path=name,
    )


def _children(node: Any) -> Iterator[Any]:
    """The values directly inside a container or the fields of an `InertObject`."""
    if isinstance(node, InertObject):
        for part in (node.args, node.kwargs, node.state, node.items, node.entries):
            if isinstance(part, _CONTAINERS):
                yield from _children(part)
            elif part is not None:
                yield part
    elif isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str):
                yield key
            yield value
    else:
        yield from node


def _named_children(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, InertObject):
        for part in (value.args, value.kwargs, value.state, value.items, value.entries):
            if isinstance(part, _CONTAINERS):
                yield from _named_children(path, part)
            elif part is not None:
                yield path, part
    elif isinstance(value, dict):
        for key, item in value.items():
            here = join_path(path, key)
            if not isinstance(key, str):
                yield here, key
            yield here, item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield join_path(path, index), item
    elif isinstance(value, (set, frozenset)):
        for item in value:
            yield path, item
