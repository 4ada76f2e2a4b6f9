"""Unpickles bytes that `scan` has accepted into inert values. Free of torch.

Every class or function that the pickle names comes to ``find_class``, which imports nothing and never returns one of
this process: it returns the name, marked as known or unknown (`known`). The unpickler is thus the restricted one of
Python's documentation, but refuses no name for being unknown, since the part that holds it may be ignored;
`materialize.safe_types.require_safe` refuses it in what is restored.

``NEWOBJ`` would need a real class, which a later opcode of the file could then change. So, at the offsets that the scan
found, it is replaced by opcodes that make a persistent id of its operands, which Python hands to ``persistent_load``.
Frames, whose lengths would be wrong then, are left out: they only say how much to read at once.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import CorruptError, RankloadError, UnsafeError
from .budget import Budget
from .build import BUILDERS, maker_of, new_object
from .inert import PickledGlobal, PickledInertTensor, PickledTensor
from .known import KNOWN_VALUES, canonical
from .opcodes import MAX_NAME
from .scan import PickleScan

StorageFinder = Callable[[tuple[Any, ...]], PickledTensor | PickledInertTensor]
"""Returns the one-dimensional tensor over the storage that a persistent id ``("storage", ...)`` names."""

StorageLoader = Callable[[bytes], PickledTensor]
"""Returns the one-dimensional tensor over the storage that a torch file, given as bytes, is."""

_LOAD_STORAGE = "torch.storage._load_from_bytes"
"""The function that a plain pickle calls for a tensor's storage."""

_NEW_AS_PERSISTENT = {
    pickle.NEWOBJ[0]: pickle.TUPLE2 + pickle.BINPERSID,
    pickle.NEWOBJ_EX[0]: pickle.TUPLE3 + pickle.BINPERSID,
}
_FRAME_BYTES = 9
"""Of the opcode ``FRAME`` and its length."""


def read_pickle(
    data: bytes,
    scan: PickleScan,
    *,
    name: str,
    memory_limit: int,
    find_storage: StorageFinder | None = None,
    load_storage: StorageLoader | None = None,
    start: int = 0,
    inert: bool = False,
) -> Any:
    """The tree that the pickle at ``data[start:scan.end]`` describes: plain values, tensors and `saved.values`.

    ``scan`` is what `scan_pickle` returned for the same bytes, ``name`` what messages call the file. Without
    ``find_storage``, a pickle that holds tensors is refused, but a plain one (which `torch.save` did not write), for
    whose storages there is ``load_storage``. With ``inert``, as the scan was made, every call is kept as an
    `InertObject`, those of Python's and torch's own types too. Nothing that the file names is imported, looked up or
    called.

    Raises `CorruptError` where it is malformed or describes impossible values, `UnsafeError` where its calls copy or
    hash more than ``memory_limit`` allows, where a global's name is too long, or where it sets the state of something
    that must not change.
    """
    source = io.BytesIO(_without_new_calls(data, scan, start))
    builders = {} if inert else BUILDERS
    reader = _InertUnpickler(source, Budget(memory_limit), builders, find_storage, load_storage)
    try:
        return reader.load()
    except RankloadError as error:
        raise type(error)(f"{name}: {error.message}", path=name) from None
    except Exception as error:
        # The unpickler and the stand-ins raise many types for malformed input.
        raise CorruptError(
            f"{name}: its pickle is malformed ({type(error).__name__}: {str(error)[:200]}). "
            "The file is damaged; take another copy of it.",
            path=name,
        ) from error


def _without_new_calls(data: bytes, scan: PickleScan, start: int) -> bytes:
    """The pickle with each ``NEWOBJ`` and ``NEWOBJ_EX`` replaced by opcodes for a persistent id of its operands."""
    parts = []
    begin = start
    for position in sorted((*scan.new_calls, *scan.frames)):
        parts.append(data[begin:position])
        replaced = _NEW_AS_PERSISTENT.get(data[position])
        if replaced is not None:
            parts.append(replaced)
        begin = position + (_FRAME_BYTES if replaced is None else 1)
    parts.append(data[begin : scan.end])
    return b"".join(parts)


class _InertUnpickler(pickle.Unpickler):
    def __init__(
        self,
        source: io.BytesIO,
        budget: Budget,
        builders: Mapping[str, Callable[..., Any]],
        find_storage: StorageFinder | None,
        load_storage: StorageLoader | None,
    ) -> None:
        super().__init__(source, fix_imports=False, encoding="utf-8")
        self._budget, self._builders = budget, builders
        self._find_storage = find_storage
        self._load_storage = load_storage
        self._globals: dict[tuple[str, str], PickledGlobal] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The class or function as a name. Raises `UnsafeError` for an overlong name only, never for an unknown one."""
        found = self._globals.get((module, name))
        if found is None:
            if len(module) > MAX_NAME or len(name) > MAX_NAME:
                raise UnsafeError(f"a class or function whose name has {len(module) + len(name)} characters")
            full = canonical(module, name)
            if full == _LOAD_STORAGE and self._load_storage:
                found = PickledGlobal(full, full in KNOWN_VALUES, self._make_storage)
            else:
                builder = self._builders.get(full)
                build = None if builder is None else functools.partial(builder, self._budget)
                make = maker_of(self._budget, self._builders, full)
                found = PickledGlobal(full, full in KNOWN_VALUES, make, build)
            self._globals[module, name] = found
        return found

    def _make_storage(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], via_new: bool) -> Any:
        """What stands for the call of the function that a plain pickle loads a storage by."""
        if self._load_storage is None or len(args) != 1 or kwargs or not isinstance(args[0], bytes):
            raise CorruptError("a storage that is no bytes of a torch file")
        return self._load_storage(args[0])

    def persistent_load(self, pid: Any) -> Any:
        """The tensor over a storage that torch's id names, or the object of a replaced ``NEWOBJ``."""
        if not isinstance(pid, tuple) or len(pid) < 2:
            raise CorruptError("a persistent id that names no storage")
        first = pid[0]
        if not isinstance(first, str | bytes):
            return new_object(first, pid[1], pid[2] if len(pid) == 3 else {})
        if isinstance(first, bytes):
            first = first.decode("ascii", "replace")
        if first == "storage":
            if self._find_storage is None:
                raise CorruptError("a tensor where none can be")
            return self._find_storage(pid)
        if first == "module":
            # Older torch files keep a module's class with its source code; the class alone is of use.
            return pid[1]
        raise CorruptError("a persistent id that names no storage")
