"""Makes of a checkpoint its places, and pairs those of two. Pure.

A place is the path of keys to a value: a tensor, or anything that is no container. Parameters may be called otherwise
in the other checkpoint (`saved.names.match_names`): wherever one's name stands in a path, as in the optimizer's state,
the other's stands there instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import Repr
from typing import Any

from ..plurals import counted
from ..saved.contents import Saved
from ..saved.ignore import at_or_below
from ..saved.names import match_names
from ..saved.tensor import SavedTensor
from ..saved.ties import place_of, tied_names
from ..saved.values import GlobalName, InertArray, InertObject, InertShard, InertTensor, kind_of

Path = tuple[str, ...]

_MODEL: Path = ("state", "model")
_ONE_OF_A_KIND = (("state", "optimizers"), ("state", "schedulers"))
"""Parts under whose keys stand classes' names: where either side has one, these two are compared."""
MASTERS = "fp32 masters"
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_SHOWN = 60


@dataclass(frozen=True)
class Pairing:
    """The places of A and B."""

    pairs: tuple[tuple[Path, Path], ...]
    """Those that both have, in A's order."""
    only_a: tuple[Path, ...]
    only_b: tuple[Path, ...]
    renamed: dict[str, str] = field(default_factory=dict)
    """Names of A to those of B, of those that match and differ."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Side:
    """One checkpoint's places."""

    name: str
    leaves: Mapping[Path, Any]
    masters: Mapping[str, SavedTensor]
    """By the name of the weight."""
    tied: Mapping[str, str]
    """Names of weights that share their elements with an earlier one, which is the value."""


def side_of(saved: Saved, *, weights_only: bool) -> Side:
    """The places of `saved`; with `weights_only` those of its model alone, its masters in the second place."""
    model = saved.state.get("model")
    named = model if isinstance(model, Mapping) else {}
    tree: Any = {"state": {"model": model}} if weights_only else saved.as_tree()
    leaves = dict(leaves_of(tree))
    if not weights_only:
        # Where the checkpoint has no other weights, its masters are them.
        leaves.update(
            {
                (MASTERS, name): tensor
                for name, tensor in saved.masters.items()
                if not isinstance(named.get(name), SavedTensor) or place_of(named[name]) != place_of(tensor)
            }
        )
    tensors = {
        name: one for name, one in named.items() if isinstance(one, SavedTensor) and isinstance(name, str)
    }
    return Side(saved.name, leaves, saved.masters, tied_names(tensors, saved.aliases))


def leaves_of(tree: Any) -> Iterator[tuple[Path, Any]]:
    """Each value of `tree` that is no container, with its path, in order. Lists of plain values are one value."""
    pending: list[tuple[Path, Any, frozenset[int]]] = [((), tree, frozenset())]
    while pending:
        path, value, above = pending.pop()
        children = _children(value)
        if children is None:
            yield path, value
        elif id(value) not in above:  # objects may refer to themselves
            inside = above | {id(value)}
            pending += reversed([((*path, key), item, inside) for key, item in children])


def pair(a: Side, b: Side, *, rename: Mapping[str, str], exact: bool) -> Pairing:
    """Which places of A and B are the same. With `exact`, only those whose paths are equal once `rename` is applied.

    Raises `OptionError` where `rename` makes two names one.
    """
    names_a, names_b = _names(a), _names(b)
    match = match_names(names_a, names_b, rename)
    target_of = match.target_of
    if exact:
        target_of = {name: hit for name, hit in target_of.items() if _renamed_exactly(name, hit, rename)}
    keys = {**_classes(a, b), **{name: hit for name, hit in target_of.items() if name != hit}}
    there: dict[Path, Path] = {}
    for path in a.leaves:
        there[path] = _other(path, keys, b)
    taken = {other for other in there.values() if other in b.leaves}
    pairs = tuple((path, other) for path, other in there.items() if other in b.leaves)
    only_a = [path for path, other in there.items() if other not in b.leaves]
    only_b = [path for path in b.leaves if path not in taken]
    only_a, tied_a = _without_tied(only_a, a)
    only_b, tied_b = _without_tied(only_b, b)
    notes = [
        f"{which} has {counted(len(tied), 'name')} more, tied to names that both have: {_short_list(tied)}"
        for tied, which in ((tied_a, "A"), (tied_b, "B"))
        if tied
    ]
    renamed = {name: hit for name, hit in target_of.items() if name != hit}
    return Pairing(pairs, tuple(only_a), tuple(only_b), renamed, tuple(notes))


def matching(wanted: str) -> Callable[[Path], bool]:
    """Whether a path is at, or below, a place that `wanted` names, as `saved.ignore.at_or_below` has it."""
    matches = at_or_below(wanted)
    return lambda path: matches(key_text(path))


def key_text(path: Path) -> str:
    return "/".join(path)


def values_equal(a: Any, b: Any, names: Mapping[str, str], close: Callable[[float, float], bool]) -> bool:
    """Whether two values that are no tensors are equal; `names` are parameters' in A with those in B, and `close` says
    of two floats whether they differ by no more than is allowed."""
    if isinstance(a, InertArray) and isinstance(b, InertArray):
        same = (a.dtype, a.shape, a.fortran_order) == (b.dtype, b.shape, b.fortran_order)
        return same and bool(a.data == b.data)
    if isinstance(a, GlobalName) and isinstance(b, GlobalName):
        return a.name == b.name
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(values_equal(x, y, names, close) for x, y in zip(a, b, strict=True))
    if isinstance(a, str):
        return b in (a, names.get(a))
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b)) or close(a, b)
    return bool(a == b)


def text_of(value: Any) -> str:
    """`value` as a reader is shown it, in one short line."""
    if isinstance(value, SavedTensor):
        return f"{value.dtype} {value.shape}"
    if isinstance(value, InertArray):
        return f"array of {value.dtype} {value.shape}"
    if isinstance(value, InertObject | GlobalName):
        return kind_of(value)
    short = Repr()
    short.maxstring = short.maxother = _SHOWN
    return short.repr(value)


def _short_list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The children of a container, with their keys; None for any other value."""
    if isinstance(value, dict) and value:
        return _by_text(value.items())
    if isinstance(value, list | tuple) and any(not isinstance(item, _SCALARS) for item in value):
        return [(str(index), item) for index, item in enumerate(value)]
    if isinstance(value, InertObject):
        return _fields(value)
    return None


def _fields(value: InertObject) -> list[tuple[str, Any]]:
    """What an object consists of: its class, and the fields that are not empty."""
    found: list[tuple[Any, Any]] = [("(class)", kind_of(value))]
    if isinstance(value, InertTensor):
        found += [("(shape)", list(value.shape)), ("(dtype)", value.dtype)]
    if isinstance(value, InertShard):
        found += [] if value.local is None else [("(local)", value.local)]
        found += [(f"(at {list(box.starts)})", part) for box, part in value.boxes]
    found += [(f"({index})", item) for index, item in enumerate(value.args)]
    found += [(f"({key}=)", item) for key, item in value.kwargs.items()]
    found += [(f"[{index}]", item) for index, item in enumerate(value.items)]
    found += [(f"[{key!r}]", item) for key, item in value.entries.items()]
    if isinstance(value.state, dict):
        found += value.state.items()
    elif value.state is not None:
        found.append(("(state)", value.state))
    return _by_text(found)


def _by_text(items: Iterable[tuple[Any, Any]]) -> list[tuple[str, Any]]:
    """`items` with their keys as text, no two of which are the same."""
    found: dict[str, Any] = {}
    for key, item in items:
        text = str(key)
        while text in found:
            text = f"{text} ({type(key).__name__})"
        found[text] = item
    return list(found.items())


def _names(side: Side) -> list[str]:
    """The names of the model's tensors, and those under which an optimizer keeps state."""
    found: dict[str, None] = {}
    for path in side.leaves:
        if path[:2] == _MODEL and len(path) > 2:
            found[path[2]] = None
        elif path[:2] == ("state", "optimizers") and len(path) > 4 and path[3] == "state":
            if not path[4].isdigit():
                found[path[4]] = None
        elif path[0] == MASTERS:
            found[path[1]] = None
    return list(found)


def _renamed_exactly(name: str, hit: str, rename: Mapping[str, str]) -> bool:
    """Whether `rename` alone makes `hit` of `name`."""
    fitting = [
        key for key in rename if key == name or (key.endswith(".") and name.startswith(key)) or not key
    ]
    if not fitting:
        return name == hit
    key = max(fitting, key=len)
    return rename[key] + name[len(key) :] == hit


def _classes(a: Side, b: Side) -> dict[str, str]:
    """The names of classes in A to those in B, of parts of which each side has one."""
    found: dict[str, str] = {}
    for part in _ONE_OF_A_KIND:
        own = {path[2] for path in a.leaves if path[:2] == part and len(path) > 2}
        other = {path[2] for path in b.leaves if path[:2] == part and len(path) > 2}
        if len(own) == len(other) == 1:
            found["/".join((*part, *own))] = other.pop()
    return found


def _other(path: Path, keys: Mapping[str, str], b: Side) -> Path:
    """Where B has what A has at `path`."""
    own_class = keys.get("/".join(path[:3])) if path[:2] in _ONE_OF_A_KIND else None
    mapped = tuple(keys.get(part, part) for part in path)
    if own_class is not None:
        mapped = (*mapped[:2], own_class, *mapped[3:])
    # A key may happen to be called like a parameter.
    return path if mapped not in b.leaves and path in b.leaves else mapped


def _without_tied(only: Iterable[Path], side: Side) -> tuple[list[Path], list[str]]:
    """`only` without weights that are tied to one which the other side has; and the names of those."""
    left = list(only)
    absent = {path[2] for path in left if path[:2] == _MODEL and len(path) == 3}
    groups: dict[str, set[str]] = {}
    for name, owner in side.tied.items():
        groups.setdefault(owner, {owner}).add(name)
    known = {name for group in groups.values() if group - absent for name in group & absent}
    kept = [path for path in left if not (path[:2] == _MODEL and len(path) == 3 and path[2] in known)]
    return kept, sorted(known)
