"""Picks the torch store that the ranks talk over: the default process group's, under a prefix for each load."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from .errors import TopologyError
from .key_value import KeyValue

_loads = itertools.count()


def key_value_opener(world_size: int, store: Any = None) -> Callable[[], KeyValue]:
    """A function that opens this rank's connection for the next load, for the thread that will use it to call.

    ``store`` by default: the default process group's, or, with one rank, one in memory. Every rank must call this
    as often as every other: the count of calls is the prefix that keeps loads apart.

    Raises:
        TopologyError: there is no process group, or it has another size or no store.
    """
    number = next(_loads)
    shared = store if store is not None else _default_store(world_size)

    def open_key_value() -> KeyValue:
        from torch.distributed.distributed_c10d import PrefixStore

        return KeyValue(PrefixStore(f"rankload/{number}", _own_connection(shared)))

    return open_key_value


def _default_store(world_size: int) -> Any:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if world_size == 1:
        return HashStore()
    if not (dist.is_available() and dist.is_initialized()):
        raise TopologyError(f"world size {world_size}, but no process group is initialised to talk over")
    if dist.get_world_size() != world_size:
        raise TopologyError(
            f"world size {world_size}, but the default process group has {dist.get_world_size()} ranks"
        )
    store = dist.distributed_c10d._get_default_store()
    if store is None:
        raise TopologyError("the default process group has no store; initialise it with gloo or nccl")
    return store


def _own_connection(store: Any) -> Any:
    """A clone of the store with a connection that no other thread uses, where torch's version has ``clone``."""
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    try:
        return clone()
    except NotImplementedError:
        return store
