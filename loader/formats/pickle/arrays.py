"""Stands in for the NumPy functions that pickles call: arrays, scalars and element types. Free of numpy and of torch.

Each stand-in in `NUMPY_BUILDERS` checks its arguments, which are the file's, and raises `CorruptError` where they do
not fit. Arrays of Python objects or of structures are kept without data, as `UNSUPPORTED`. The forms of state are those
of ``array_reduce`` and ``arraydescr_reduce`` in NumPy's ``multiarray``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ...errors import CorruptError
from ...saved.values import UNSUPPORTED, GlobalName
from .inert import PickledArray, PickledObject

_PLAIN = re.compile(r"(?:([biufc])(1|2|4|8|16)|([SUV])(\d{1,6})|([Mm])8)\Z")
_UNIT = re.compile(r"[A-Za-z]{1,2}\Z")


class PickledDtype(PickledObject):
    """A ``numpy.dtype``; its state is (version, byte order, subarray, names, fields, ..., metadata at 8)."""

    __slots__ = ()

    @property
    def text(self) -> str:
        """NumPy's own string, such as ``<f4``; `UNSUPPORTED` where elements are not plain."""
        code = self.args[0] if self.args else None
        found = _PLAIN.match(code) if isinstance(code, str) else None
        if not found or not isinstance(code, str):
            return UNSUPPORTED
        state = self.state if isinstance(self.state, tuple) else ()
        if len(state) > 4 and (state[2] is not None or state[3] is not None):
            return UNSUPPORTED
        order = state[1] if len(state) > 1 else "|"
        if order not in ("<", ">", "|", "="):
            raise CorruptError("a NumPy dtype of unknown byte order")
        return ("<" if order == "=" else order) + code + (_unit(state) if found[5] else "")


def _unit(state: tuple[Any, ...]) -> str:
    """The unit of dates and durations, such as ``[s]`` or ``[25s]``; empty where the state has none."""
    metadata = state[8] if len(state) > 8 else None
    unit = metadata[1] if isinstance(metadata, tuple) and len(metadata) == 2 else None
    if not isinstance(unit, tuple) or len(unit) < 2:
        return ""
    name, count = unit[:2]
    name = name.decode("ascii", "replace") if isinstance(name, bytes) else name
    if (
        not isinstance(name, str)
        or not _UNIT.match(name)
        or type(count) is not int
        or not 0 < count < 1 << 31
    ):
        return ""
    return f"[{name}]" if count == 1 else f"[{count}{name}]"


def _dtype(budget: Any, *args: Any) -> PickledDtype:
    return PickledDtype(global_name="numpy.dtype", args=args, known=True)


def _reconstruct(budget: Any, kind: Any, shape: Any = (), code: Any = b"b") -> PickledArray | PickledObject:
    if not isinstance(kind, GlobalName) or kind.name != "numpy.ndarray":
        return PickledObject(global_name=getattr(kind, "name", "numpy.ndarray"), args=(shape, code))
    return PickledArray(UNSUPPORTED, (), b"", fill=_fill)


def _fill(array: PickledArray, state: Any) -> None:
    """Sets the contents of an array that `_reconstruct` made empty, from the state that the pickle gives it."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise CorruptError("a NumPy array without its state")
    shape, dtype, fortran_order, data = state[-4:]
    _set(array, dtype, shape, data, bool(fortran_order), scalar=False)


def _frombuffer(budget: Any, data: Any, dtype: Any, shape: Any, order: Any = "C") -> PickledArray:
    array = PickledArray(UNSUPPORTED, (), b"")
    _set(array, dtype, shape, data, order == "F", scalar=False)
    return array


def _scalar(budget: Any, dtype: Any, data: Any = b"") -> PickledArray:
    array = PickledArray(UNSUPPORTED, (), b"")
    _set(array, dtype, (), data, False, scalar=True)
    return array


def _set(
    array: PickledArray, dtype: Any, shape: Any, data: Any, fortran_order: bool, *, scalar: bool
) -> None:
    if isinstance(dtype, PickledObject) and not isinstance(dtype, PickledDtype):
        # Of a class of its own, as numpy.dtypes.StringDType and those of other packages are.
        array.set(UNSUPPORTED, (), b"", False, scalar)
        return
    if not isinstance(dtype, PickledDtype):
        raise CorruptError("a NumPy array without a dtype")
    if isinstance(shape, int):
        shape = (shape,)
    if (
        not isinstance(shape, tuple)
        or len(shape) > 64
        or not all(type(size) is int and 0 <= size < 1 << 62 for size in shape)
    ):
        raise CorruptError("a NumPy array whose shape is no tuple of at most 64 sizes")
    text = dtype.text
    if text == UNSUPPORTED or isinstance(data, list):
        array.set(UNSUPPORTED, (), b"", False, scalar)
        return
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise CorruptError("a NumPy array whose data are no bytes")
    if math.prod(filter(None, shape)) * max(1, _itemsize(text)) >= 1 << 63:  # NumPy counts so, zeros or not
        raise CorruptError(f"a NumPy array of dtype {text} and shape {shape}, which nothing can hold")
    expected = math.prod(shape) * _itemsize(text)
    if len(data) != expected:
        raise CorruptError(
            f"a NumPy array of dtype {text} and shape {shape} with {len(data):,} bytes; expected {expected:,}"
        )
    array.set(text, shape, bytes(data), fortran_order, scalar)


def _itemsize(text: str) -> int:
    """Bytes per element of a dtype, given as `PickledDtype.text` gives it."""
    code, digits = text[1], text[2:].split("[")[0]
    return int(digits) * (4 if code == "U" else 1)


NUMPY_BUILDERS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": _frombuffer,
}
"""By the name of the function or class that the pickle calls; the first argument is the file's `Budget`."""
