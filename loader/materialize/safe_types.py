"""Refuses a checkpoint's unknown types, except those that the user allows (``LoadOptions.safe_types``). No torch.

`require_safe` lists all that is refused at once, and what can be done about it: a type is offered for ``safe_types``
only where it is a class that can be imported here (`can_be_allowed`). To find out, nothing is imported.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import posixpath
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import ModuleType
from typing import Any

from ...distributed.printable import Lines
from ..errors import FormatError, OptionError, UnsafeError
from ..formats.pickle.known import canonical
from ..saved.tree import is_unknown, join_path, unknown_values, values
from ..saved.values import GlobalName, InertObject, InertTensor, kind_of

_SHOWN = 20
"""Lines of each kind in a message."""
_VALUE_MODULES = frozenset(
    {"collections", "datetime", "decimal", "fractions", "ipaddress", "uuid", "zoneinfo"}
)
"""Modules of Python's own whose types only hold values. Others' types open files or run programs, and are not offered.
"""


class SafeTypes:
    """The allowed types, by their canonical names. One given by name is imported when `type` first needs it."""

    def __init__(self, allowed: Sequence[str | type] = ()) -> None:
        self._types: dict[str, Any] = {}
        for entry in allowed:
            if isinstance(entry, str):
                module, _, name = entry.rpartition(".")
                self._types[canonical(module, name)] = entry
            else:
                # May be a function too: a pickle calls functions as well as classes.
                self._types[canonical(entry.__module__, entry.__qualname__)] = entry

    def __contains__(self, global_name: str) -> bool:
        return global_name in self._types

    def allows(self, value: Any) -> bool:
        """Whether `value`, which cannot be made real by itself, is of an allowed type or is one."""
        return _is_type(value) and kind_of(value) in self

    def type(self, global_name: str) -> Any:
        """The allowed type of that name. Raises `OptionError` where it cannot be imported."""
        found = self._types[global_name]
        if isinstance(found, str):
            found = _import(found)
            self._types[global_name] = found
        return found


@dataclass
class _Refused:
    """What one type, or kind of tensor or array, stands for in a message."""

    value: Any
    where: str
    """Where it is first met."""
    globs: dict[str, None] = field(default_factory=dict)
    """What ``ignore_keys`` leaves it out by, everywhere: an object only as a whole, with all that it holds."""
    count: int = 0

    @property
    def is_type(self) -> bool:
        """Whether it is a class or function that is not known, rather than a kind of tensor or array."""
        return _is_type(self.value)


def require_safe(
    trees: Mapping[str, Any], *, safe_types: Sequence[str | type] | SafeTypes = (), file: str = ""
) -> None:
    """Raises unless all of `trees`, by their places in the file, can be made real. Reads no storage.

    The message lists every type that is neither known nor allowed, each with where it is first met, and what can be
    done. To be called on what is restored only: what is ignored or left does no harm. Raises `UnsafeError`, or
    `FormatError` where all types are safe, but a tensor or an array is of a kind that is not restored.
    """
    allowed = safe_types if isinstance(safe_types, SafeTypes) else SafeTypes(safe_types)
    if all(map(allowed.allows, filter(is_unknown, values(list(trees.values()))))):
        return
    # Where they are takes longer to tell.
    refused: dict[str, _Refused] = {}
    for path, tree in trees.items():
        for leaf, glob_of, where in _leaves(tree, path):
            for inner, value in unknown_values(leaf, path=where):
                if not allowed.allows(value):
                    one = refused.setdefault(kind_of(value), _Refused(value, inner))
                    one.count += 1
                    one.globs[glob_of] = None
    types = {name: one for name, one in refused.items() if one.is_type}
    others = {name: one for name, one in refused.items() if not one.is_type}
    lines = [*_listed(types, others), *_advice(types, others)]
    error = UnsafeError if types else FormatError
    lines[0] = f"{file}: " * bool(file) + lines[0]
    raise error(Lines(lines), path=file or None)


def can_be_allowed(name: str) -> bool:
    """Whether ``safe_types`` can name `name`, as far as can be told without an import: it is a class.

    Functions are no classes, and of Python's own only those are offered that do no more than hold values. Where the
    module is not imported yet, it has to be installed, and the name to begin with a capital.
    """
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return False
    if parts[0] in sys.stdlib_module_names and parts[0] not in _VALUE_MODULES:
        return False
    imported = len(parts) - 1
    while imported and ".".join(parts[:imported]) not in sys.modules:
        imported -= 1
    if imported:
        found: Any = sys.modules[".".join(parts[:imported])]
        for part in parts[imported:]:
            # Not by getattr, which may run the module's own code.
            found = vars(found).get(part) if isinstance(found, type | ModuleType) else None
        if found is not None or imported == len(parts) - 1:
            return isinstance(found, type)
    try:
        # The packages above it are imported already, so that this imports none.
        spec = importlib.util.find_spec(".".join(parts[: imported + 1]))
    except (ImportError, ValueError):
        return False
    return spec is not None and parts[-1].lstrip("_")[:1].isupper()


def _is_type(value: Any) -> bool:
    return isinstance(value, GlobalName | InertObject) and not isinstance(value, InertTensor)


def _leaves(tree: Any, path: str) -> Iterator[tuple[Any, str, str]]:
    """What ``ignore_keys`` can name: (value, the glob for it, its path), down to what is no dict or list."""
    pending = [(tree, glob.escape(path), path)]
    seen: set[int] = set()
    while pending:
        value, glob_of, where = pending.pop()
        if not isinstance(value, dict | list):
            yield value, glob_of, where
        elif id(value) not in seen:
            seen.add(id(value))
            for key, item in reversed(list(value.items() if isinstance(value, dict) else enumerate(value))):
                if isinstance(key, GlobalName | InertObject | tuple):
                    yield key, glob_of, where
                escaped = glob.escape(str(key))
                pending.append((item, f"{glob_of}/{escaped}" if glob_of else escaped, join_path(where, key)))


def _listed(types: Mapping[str, _Refused], others: Mapping[str, _Refused]) -> Iterator[str]:
    if types:
        yield (
            f"what is restored holds {_counted(len(types), 'type')} that rankload does not know; making one could run "
            "code of the file's choosing:"
        )
        yield from _lines(types)
    if others:
        yield f"what is restored holds {_counted(len(others), 'kind')} of values that rankload does not restore:"
        yield from _lines(others)


def _lines(refused: Mapping[str, _Refused]) -> Iterator[str]:
    for name, one in islice(refused.items(), _SHOWN):
        what = "" if isinstance(one.value, GlobalName) else "a "
        more = f", and {one.count - 1:,} more" if one.count > 1 else ""
        yield f"  {one.where or 'the object itself'}: {what}{name[:200]}{more}"
    if len(refused) > _SHOWN:
        yield f"  ... and {len(refused) - _SHOWN} more"


def _advice(types: Mapping[str, _Refused], others: Mapping[str, _Refused]) -> Iterator[str]:
    offered = [name for name in types if can_be_allowed(name)]
    if offered:
        these, them = ("this type", "it") if len(offered) == 1 else ("these types", "them")
        yield f"If you trust both the file and {these}, allow {them}: LoadOptions(safe_types={offered!r})."
    rest = [name[:200] for name in types if name not in offered]
    if rest:
        yield (
            f"safe_types cannot help for {', '.join(rest[:_SHOWN])}: only a class that can be imported here can be "
            "allowed."
        )
    globs = list(
        dict.fromkeys(each for one in (*types.values(), *others.values()) for each in one.globs if each)
    )
    within = posixpath.commonpath(globs) if len(globs) > _SHOWN else ""
    if within.count("/") > 1:  # inside one object of a part: not a whole model
        globs = [f"{within}/*"]
    if globs:
        yield f"To leave such parts out: ignore_keys={globs[:_SHOWN]!r}."
    if any(isinstance(one.value, InertTensor) for one in others.values()):
        yield "To restore such tensors, save them as ordinary ones (of a DTensor, its full_tensor())."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _import(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        except Exception as error:
            raise OptionError(f"safe_types names {name}, whose import failed: {error}") from error
        for part in parts[count:]:
            found = getattr(found, part, None)
        if callable(found):
            return found
    raise OptionError(f"safe_types names {name}, but there is no such type here; is its package installed?")
