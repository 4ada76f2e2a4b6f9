"""Refuses a checkpoint's unknown types, except those that the user allows (``LoadOptions.safe_types``). No torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from ..errors import OptionError, UnsafeError
from ..formats.pickle.known import canonical
from ..saved.tree import find_unknown


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

    def type(self, global_name: str) -> Any:
        """The allowed type of that name. Raises `OptionError` where it cannot be imported."""
        found = self._types[global_name]
        if isinstance(found, str):
            found = _import(found)
            self._types[global_name] = found
        return found


def require_safe(
    tree: Any, *, safe_types: Sequence[str | type] | SafeTypes = (), file: str = "", path: str = ""
) -> None:
    """Raises `UnsafeError` where `tree` holds types that are neither known nor allowed.

    `file` and `path` (the tree's own place in the file) are for the message, which names the first such type, its key
    and the option that would allow it. To be called after ``ignore_keys`` took parts out; reads no storage.
    """
    allowed = safe_types if isinstance(safe_types, SafeTypes) else SafeTypes(safe_types)
    refused = [(where, name) for where, name in find_unknown(tree, path=path) if name not in allowed]
    if refused:
        raise unsafe(refused[0][0], refused[0][1], file, more=len(refused) - 1)


def unsafe(path: str, global_name: str, file: str, *, more: int = 0) -> UnsafeError:
    """The error for a value of an unknown type."""
    where = f"{file}: {path or 'the object itself'}" if file else path or "the object itself"
    others = f" ({more} more values are of unknown types.)" if more else ""
    return UnsafeError(
        f"{where} holds {global_name[:200]}, which is no known type; making it could run code of the file's "
        f"choosing. If you trust both, allow it with LoadOptions(safe_types=[{global_name[:200]!r}]), or "
        f"leave the part out with ignore_keys=[{path!r}].{others}",
        path=file or None,
    )


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
