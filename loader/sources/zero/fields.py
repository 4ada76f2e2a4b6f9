"""Checks types and ranges of the values in a checkpoint's pickle, with errors that name the file. Pure.

Each ``a_...`` function returns its value where it is of that type, and raises the `CorruptError` of `Field.wrong` where
it is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import CorruptError
from ...saved.tensor import SavedTensor
from ...saved.values import InertObject, kind_of


@dataclass(frozen=True)
class Field:
    """The place of a value in a file, for messages."""

    file: str
    key: str = ""
    """Joined by ``/``; empty for the whole tree."""

    def at(self, key: object) -> Field:
        """The place of what this value holds under `key`."""
        return Field(self.file, f"{self.key}/{key}" if self.key else str(key))

    def wrong(self, expected: str, got: object) -> CorruptError:
        """The error for a value that is not `expected`."""
        return CorruptError(
            f"{self.file}: {self.key or 'the file'} holds {_shown(got)}, expected {expected}. The file is damaged, or "
            "DeepSpeed did not write it",
            path=self.file,
        )


def a_mapping(value: Any, place: Field) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise place.wrong("a dict", value)
    return value


def a_sequence(value: Any, place: Field, length: int | None = None) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise place.wrong("a list", value)
    if length is not None and len(value) != length:
        raise place.wrong(f"a list of {length}", value)
    return value


def a_count(value: Any, place: Field, *, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise place.wrong(f"a whole number of at least {least}", value)
    return int(value)


def a_name(value: Any, place: Field) -> str:
    if not isinstance(value, str) or not value:
        raise place.wrong("a name", value)
    return str(value)


def named(value: Mapping[Any, Any], place: Field) -> dict[str, Any]:
    """`value` as a dict, each of whose keys is `a_name`."""
    if set(map(type, value)) <= {str} and "" not in value:
        return dict(value)
    return {a_name(name, place): item for name, item in value.items()}


def a_tensor(value: Any, place: Field) -> SavedTensor:
    if not isinstance(value, SavedTensor):
        raise place.wrong("a tensor", value)
    return value


def a_shape(value: Any, place: Field) -> tuple[int, ...]:
    shape = tuple(a_count(size, place) for size in a_sequence(value, place))
    if math.prod(filter(None, shape)) >= 1 << 62:
        raise place.wrong("a shape that memory can hold", shape)
    return shape


def enum_value(value: Any, place: Field) -> int:
    """The number of an enumeration's member, or a plain number."""
    if isinstance(value, InertObject) and len(value.args) == 1:
        value = value.args[0]
    return a_count(value, place)


def _shown(value: object) -> str:
    if isinstance(value, SavedTensor):
        return f"a {value.dtype} tensor of shape {value.shape}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__.lower()} of {len(value)}"
    if isinstance(value, Mapping):
        return "a dict"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80]
    return f"a {kind_of(value)}"
