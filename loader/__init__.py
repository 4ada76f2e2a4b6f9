"""Loader: restores a checkpoint into a job's state on every rank or on none, and saves one.

`journey.load` does it, in this order:

1. `request` checks the arguments and compares them over all ranks; `options` and `template` are their parts.
2. `opening.open_files`: a path becomes a store (`stores`), in which its first file shows what kind of checkpoint it is.
3. `targets` say what the job's state needs: a `saved.demand.Demand`. A source (`sources`) reads it, has the files
   brought to each node once (`fetch`, `ranges`, `http`, `cache`), and reads their indexes (`formats`): a
   `saved.contents.Saved`, whose tensors are `saved.tensor.SavedTensor`.
4. The target compares names, shapes, dtypes and types, and plans the restore: a `targets.base.Plan`. What its copies
   read is what is fetched, and what `verify` compares with checksums.
5. The plan is carried out: `materialize` copies bytes into the live tensors, while others are still fetched.
6. `rng` completes the random states, and `receipt` says what was done.

`reading.read` goes the same way for one file, which becomes a dict and is restored into nothing. `saving` goes the
other way: `writing` puts a file or a folder into its place once it is whole.

A failure of one rank in any stage is raised on all, where they agree next (`stages`, `rankload.distributed`).

Not guaranteed: a rollback. Before the first change of any rank a failure changes nothing; after it, it is a
`PartialRestoreError` on all ranks, and the state is undefined until a load succeeds. A load writes nothing to a store.
CRC-32 finds damage, not forgery. Modules other than the names below may change.

May import ``distributed``; which room imports which is in ``docs/map.md``. Importing this package imports neither torch
nor deepspeed nor any store's client: each name below brings in what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .candidates.found import FoundCheckpoint
    from .errors import (
        AccessError,
        AlgorithmError,
        CorruptError,
        FormatError,
        InternalError,
        LayoutError,
        MismatchError,
        MissingFrozenError,
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
    from .reading import read
    from .receipt import Receipt
    from .resuming import autoresume, find_checkpoints
    from .rng import capture_rng, gather_rng, restore_rng
    from .saving import save_checkpoint
    from .state import State
    from .targets.algorithms import Algorithm, AlgorithmPass, Event, register_algorithm

_HOME = {
    "targets.algorithms": ("Algorithm", "AlgorithmPass", "Event", "register_algorithm"),
    "errors": (
        "AccessError",
        "AlgorithmError",
        "CorruptError",
        "FormatError",
        "InternalError",
        "LayoutError",
        "MismatchError",
        "MissingFrozenError",
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
    "candidates.found": ("FoundCheckpoint",),
    "journey": ("LoadResult", "load", "load_checkpoint"),
    "options": ("LoadOptions",),
    "reading": ("read",),
    "receipt": ("Receipt",),
    "resuming": ("autoresume", "find_checkpoints"),
    "rng": ("capture_rng", "gather_rng", "restore_rng"),
    "saving": ("save_checkpoint",),
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
    "FoundCheckpoint",
    "InternalError",
    "LayoutError",
    "LoadOptions",
    "LoadResult",
    "MismatchError",
    "MissingFrozenError",
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
    "autoresume",
    "capture_rng",
    "find_checkpoints",
    "gather_rng",
    "load",
    "load_checkpoint",
    "read",
    "register_algorithm",
    "restore_rng",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
