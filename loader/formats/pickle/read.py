"""Unpickles what `pickle_scan` has let pass, into inert values. Free of torch.

This is the restricted unpickler of Python's own documentation: ``find_class`` hands out names, never a class
or function of this process, and imports nothing. ``NEWOBJ`` asks for a real class, which a later opcode of
the file could then change; so the scan's offsets are used to turn it into a persistent id, which comes to us.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

from ...errors import CorruptError, RankloadError, UnsafeError
from ...saved.values import LazyTensor
from .budget import Budget
from .build import make, new_object
from .inert import SealedGlobal, SealedObject
from .known import KNOWN_VALUES, canonical
from .opcodes import MAX_NAME
from .scan import PickleScan

StorageFinder = Callable[[tuple[Any, ...]], LazyTensor]
"""Gives the one-dimensional tensor over the storage that a persistent id ``("storage", ...)`` names."""

_NEW_AS_PERSISTENT = {
    pickle.NEWOBJ[0]: pickle.TUPLE2 + pickle.BINPERSID,
    pickle.NEWOBJ_EX[0]: pickle.TUPLE3 + pickle.BINPERSID,
}


def read_pickle(
    data: bytes,
    scan: PickleScan,
    *,
    name: str,
    memory_limit: int,
    find_storage: StorageFinder | None = None,
    start: int = 0,
) -> Any:
    """The tree that the pickle at ``data[start:scan.end]`` describes, in the types of
    `rankload.loader.saved.values`.

    ``scan`` is `scan_pickle`'s answer for the same bytes. Without ``find_storage``, a pickle that holds
    tensors is refused. Nothing that the file names is imported, looked up or called.

    Raises `CorruptError` where it is malformed or describes impossible values, `UnsafeError` where it asks
    for more than it may.
    """
    source = io.BytesIO(_without_new_calls(data, scan, start))
    reader = _InertUnpickler(source, Budget(memory_limit), find_storage)
    try:
        return reader.load()
    except RankloadError as error:
        kind = UnsafeError if isinstance(error, UnsafeError) else type(error)
        raise kind(f"{name}: {error.message}", path=name) from None
    except Exception as error:
        # Whatever the unpickler or one of our own constructors says of malformed input.
        raise CorruptError(
            f"{name}: its pickle is malformed ({type(error).__name__}: {str(error)[:200]}). "
            "The file is damaged; fetch it again.",
            path=name,
        ) from error


def _without_new_calls(data: bytes, scan: PickleScan, start: int) -> bytes:
    parts = []
    begin = start
    for position in scan.new_calls:
        parts.append(data[begin:position])
        parts.append(_NEW_AS_PERSISTENT[data[position]])
        begin = position + 1
    parts.append(data[begin : scan.end])
    return b"".join(parts)


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, budget: Budget, find_storage: StorageFinder | None) -> None:
        super().__init__(source, fix_imports=False, encoding="utf-8")
        self._make = functools.partial(make, budget)
        self._find_storage = find_storage
        self._globals: dict[tuple[str, str], SealedGlobal] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = self._globals.get((module, name))
        if found is None:
            if len(module) > MAX_NAME or len(name) > MAX_NAME:
                raise UnsafeError(f"a class or function whose name has {len(module) + len(name)} characters")
            full = canonical(module, name)
            found = SealedGlobal(full, full in KNOWN_VALUES, self._make)
            self._globals[module, name] = found
        return found

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise CorruptError("a persistent id that names no storage")
        first = pid[0]
        if isinstance(first, (SealedGlobal, SealedObject)):
            return new_object(first, pid[1], pid[2] if len(pid) == 3 else {})
        if isinstance(first, bytes):
            first = first.decode("ascii", "replace")
        if first == "storage":
            if self._find_storage is None:
                raise CorruptError("a tensor where none can be")
            return self._find_storage(pid)
        if first == "module":
            # torch files of old keep a module's class with its source, which nobody needs.
            return pid[1]
        raise CorruptError("a persistent id that names no storage")
