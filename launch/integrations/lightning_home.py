"""Finds Lightning under the name by which the job has imported it, and tells what could not be restored for it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from ..loader.saved.values import GlobalName, InertObject

TRIED = ("2.6",)


def import_home(unified: str, alone: str) -> tuple[Callable[[str], ModuleType], str]:
    """Imports `unified`, or `alone` where the job has imported that one only, or only that is installed.

    The two hold other classes of the same names, and each takes its own alone.

    Returns:
        A function that imports a module of it by its name in there, and the name of its distribution.
    """
    home, distribution = unified, unified.partition(".")[0]
    if alone in sys.modules and unified not in sys.modules:
        home = alone
    else:
        try:
            importlib.import_module(unified)
        except ModuleNotFoundError as error:
            if not unified.startswith(str(error.name)):
                raise  # it is there, and something that it needs is not
            home = alone
    if home == alone:
        importlib.import_module(alone)
        distribution = alone.replace("_", "-")
    return (lambda name: importlib.import_module(f"{home}.{name}")), distribution


def warn_of_inert(client_state: Mapping[str, Any], needed: tuple[str, ...]) -> None:
    """Warns of objects under the keys `needed` that stayed descriptions, which their owners cannot restore."""
    found = sorted({name for key in needed for name in _inert(client_state.get(key))})
    if found:
        warnings.warn(
            f"the checkpoint holds objects of types that are not made: {', '.join(found)}. What is restored from them "
            f"(in {', '.join(needed)}) is not as it was. If you trust their constructors, pass "
            f"options=LoadOptions(safe_types={found})",
            stacklevel=3,
        )


def _inert(value: Any) -> Iterator[str]:
    if isinstance(value, InertObject):
        yield value.global_name
    elif isinstance(value, GlobalName):
        yield str(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _inert(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _inert(item)
