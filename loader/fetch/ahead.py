"""Asks for the beginning of a file, and where it needs it for the end, before anything is known of the file.

These answers say whether it is there, how long it is and in which version, and mostly hold its index: so nothing else
has to be asked for first. It is done over http(s) only; other stores are asked what there is of a file before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..context import LoadContext
from ..formats.sniff import HEAD_BYTES, sniff
from ..stores.base import Store
from ..stores.http import HttpStore
from ..stores.names import path_of
from ..stores.probes import AT_ONCE, ask_each

HEAD_AND_TAIL_BYTES = 256 << 10
"""The first request for a file, from each end: mostly enough for its pickle and its directory."""
OF_ITEMS = ".distcp"
"""Suffix of objects that are torch files end to end: each begins like one, and none is its whole index. Which parts to
fetch, another file says (`items`)."""
COMPRESSED_NAMES = (".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Suffixes of objects that come whole; for them no range source is opened."""
_OTHERS = (*COMPRESSED_NAMES, ".tar", ".symlink")
"""Suffixes of objects of which neither end is an index."""


def ask_ahead(context: LoadContext, name: str, *, beginning_only: bool = False) -> None:
    """Has the store answer for the file `name` with what is needed of it first: both ends, or its beginning.

    Raises as `Store.stat`.
    """
    store = context.store
    if not isinstance(store, HttpStore) or path_of(name).endswith(_OTHERS):
        return
    if context.options.cache_dir is not None and context.session.topology.n_nodes > 1:
        # Nodes may share the folder that was given, so that another one may put the file there meanwhile.
        return
    # What the node's cache may have already is not asked for: one byte tells its version.
    is_small = path_of(name).endswith(OF_ITEMS) or context.cache.may_hold(store.describe(name))
    both = not is_small and not beginning_only
    store.ask_ahead(name, 1 if is_small else HEAD_AND_TAIL_BYTES, _ends_with_index if both else _never)


def ask_all_ahead(
    context: LoadContext, names: Sequence[str], *, beginning_only: bool = False, at_once: int = AT_ONCE
) -> None:
    """`ask_ahead` for several files that may not be there, `at_once` at a time."""
    if isinstance(context.store, HttpStore):
        ask = partial(ask_ahead, context, beginning_only=beginning_only)
        ask_each(context.store, ask, names, at_once=at_once)


def taken(store: Store, name: str) -> Sequence[tuple[int, bytes]]:
    """The bytes that have come so, from a position on, once."""
    if not isinstance(store, HttpStore) or (first := store.first_bytes(name)) is None:
        return ()
    store.forget(name)
    return first.parts


def _ends_with_index(head: bytes) -> bool:
    return sniff(head[:HEAD_BYTES]) == "torch-zip"


def _never(head: bytes) -> bool:
    return False
