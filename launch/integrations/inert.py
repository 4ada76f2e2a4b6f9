"""Tells what of a checkpoint stayed a description, because it is of a type that is not made. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..distributed.printable import warn
from ..loader.saved.values import GlobalName, InertObject


def warn_of_inert(client_state: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Warns of objects under the keys `needed` that stayed descriptions, which their owners cannot restore."""
    found = inert_types([client_state.get(key) for key in needed])
    if found:
        warn(
            f"the checkpoint holds objects of types that are not made: {', '.join(found)}. What is restored from them "
            f"(in {', '.join(needed)}) is not as it was. If you trust their constructors, pass "
            f"options=LoadOptions(safe_types={found})",
            stacklevel=3,
        )


def inert_types(value: Any) -> list[str]:
    """The types in `value` that were not made, by name."""
    return sorted(set(_inert(value)))


def _inert(value: Any) -> Iterator[str]:
    if isinstance(value, InertObject):
        yield value.global_name
    elif isinstance(value, GlobalName):
        yield value.name
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inert(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _inert(item)
