"""Restores checkpoints of distributed PyTorch jobs: `load_checkpoint`.

Importing this package imports neither torch nor deepspeed nor any store's client: each name below brings in what
it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AccessError,
        AlgorithmError,
        CorruptError,
        FormatError,
        LayoutError,
        MismatchError,
        NotFoundError,
        OptionError,
        PartialRestoreError,
        PeerError,
        RankloadError,
        StalledError,
        TemplateError,
        TimestampError,
        TopologyError,
        UnsafeError,
    )
    from .journey import LoadResult, load, load_checkpoint
    from .options import LoadOptions
    from .receipt import Receipt
    from .rng import capture_rng, gather_rng, restore_rng
    from .state import State
    from .targets.algorithms import Algorithm, AlgorithmPass, Event, register_algorithm

_HOME = {
    "targets.algorithms": ("Algorithm", "AlgorithmPass", "Event", "register_algorithm"),
    "errors": (
        "AccessError",
        "AlgorithmError",
        "CorruptError",
        "FormatError",
        "LayoutError",
        "MismatchError",
        "NotFoundError",
        "OptionError",
        "PartialRestoreError",
        "PeerError",
        "RankloadError",
        "StalledError",
        "TemplateError",
        "TimestampError",
        "TopologyError",
        "UnsafeError",
    ),
    "journey": ("LoadResult", "load", "load_checkpoint"),
    "options": ("LoadOptions",),
    "receipt": ("Receipt",),
    "rng": ("capture_rng", "gather_rng", "restore_rng"),
    "state": ("State",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AccessError",
    "Algorithm",
    "AlgorithmError",
    "AlgorithmPass",
    "CorruptError",
    "Event",
    "FormatError",
    "LayoutError",
    "LoadOptions",
    "LoadResult",
    "MismatchError",
    "NotFoundError",
    "OptionError",
    "PartialRestoreError",
    "PeerError",
    "RankloadError",
    "Receipt",
    "StalledError",
    "State",
    "TemplateError",
    "TimestampError",
    "TopologyError",
    "UnsafeError",
    "capture_rng",
    "gather_rng",
    "load",
    "load_checkpoint",
    "register_algorithm",
    "restore_rng",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
