"""Restores the random states that a framework leaves out, since it reads each rank's own file alone.

At another number of ranks, some have no file of their own, and would all go on from the job's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..distributed.printable import warn
from ..distributed.session import open_session
from ..loader import LoadOptions, read
from ..loader.rng import apply_rng, check_state, complete_states
from ..loader.stores.names import child_of


def restore_missing(
    folder: str,
    first: str | None,
    *,
    rank: int,
    has_own: bool,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> dict[Any, Any] | None:
    """Restores the random states of the ranks for which the framework did not; the others stay as they are.

    Rank 0 gets the states that `first` holds. Each other one gets states that follow from those and its rank: the same
    at each load, different on each rank. Every rank must call.

    Args:
        folder: the checkpoint's, as `load` takes it.
        first: the name of the file with rank 0's states in it; rank 0's counts. None: there is none, which is a
            warning where one was needed.
        rank: this process's.
        has_own: whether the framework has restored this rank's own.

    Returns:
        What `first` holds; None where no rank needed it, or there is none.
    """
    with open_session() as session:
        told = session.channel.gather("random states", [has_own, first])
    if all(own for own, _ in told):
        return None
    name = told[0][1]
    if name is None:
        if rank == 0:
            warn("the checkpoint has no random states: every generator stays as it is", stacklevel=3)
        return None
    held = read(child_of(folder, name), object_store=object_store, options=options, progress_bar=False)
    if not has_own:
        saved, _ = check_state(held, name)
        states, _ = complete_states([saved], rank + 1, None)
        apply_rng(states[rank])
    return held
