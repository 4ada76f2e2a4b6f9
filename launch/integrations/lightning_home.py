"""Finds Lightning under the name by which the job has imported it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

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
