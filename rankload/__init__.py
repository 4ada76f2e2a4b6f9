"""Resume distributed PyTorch jobs from real checkpoints, at any world size.

    from rankload import State, load, restore_rng

    result = load("s3://bucket/run/ep1-rank{rank}.tar", State(model=model, optimizers=optimizer))
    restore_rng(result.rng_states)

Every rank calls `load` with the same arguments: it restores on every rank, or raises the same error on every rank.
The names below are all that is promised; each brings in what it needs when it is first used, so importing this package
imports neither torch nor deepspeed nor any store's client.

The distribution's other packages are not promised, but for what ``docs/`` says of them: `rankload.loader` (files,
stores, sources, targets), `rankload.distributed` (how ranks agree), `rankload.launch` (the command line).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "loader")):
    # In a clone the other packages lie elsewhere; where the current folder is the clone's own, they are the installed
    # ones.
    from pkgutil import extend_path

    __path__ = extend_path(__path__, __name__)

from . import loader

if TYPE_CHECKING:
    from .loader import *  # noqa: F403

__version__ = "0.1.0"

__all__ = ["__version__"]
__all__ += loader.__all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(loader, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
