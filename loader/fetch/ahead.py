"""Asks for the beginning of a file, and where it needs it for the end, before anything is known of the file.

These answers say whether it is there, how long it is and in which version, and mostly hold its index: so nothing else
has to be asked for first. A store that signs no URLs is asked what there is of a file before (`stores.fsspec`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from ..byte_ranges import ByteRange, coalesce, total_bytes, union
from ..context import LoadContext
from ..formats.sniff import HEAD_BYTES, sniff
from ..stores.base import Store
from ..stores.first_answers import AsksFirst
from ..stores.names import path_of
from ..stores.probes import AT_ONCE, ask_each

_MOSTLY_SMALL = re.compile(r"/\.metadata$|/zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt$|\.json$")
"""Files that mostly come whole with their first bytes, and so are compared with the checksums of the whole object."""
HEAD_AND_TAIL_BYTES = 256 << 10
"""The first request for a file, from each end: mostly enough for its pickle and its directory."""
MOST_PARTS_BYTES = 4 << 20
"""How many bytes of one file are asked for with its first one."""
OF_ITEMS = ".distcp"
"""Suffix of objects that are torch files end to end: each begins like one, and none is its whole index. Which parts to
fetch, another file says (`items`)."""
TORCH_NAMES = (".pt", ".pth", ".ckpt", ".bin")
"""Suffixes that torch files mostly have."""
COMPRESSED_NAMES = (".tgz", ".gz", ".bz2", ".xz", ".lzma", ".zst")
"""Suffixes of objects that come whole; for them no range source is opened."""
_OTHERS = (*COMPRESSED_NAMES, ".tar", ".symlink")
"""Suffixes of objects of which neither end is an index."""


def ask_ahead(
    context: LoadContext,
    name: str,
    *,
    beginning_only: bool = False,
    parts: Sequence[ByteRange] = (),
) -> None:
    """Has the store answer for the file `name` with what is needed of it first: both ends, or its beginning.

    `parts` of it are known to be needed, and come at the same time, unless they are too much to be kept in memory.
    Raises as `Store.stat`.
    """
    store = context.store
    if not isinstance(store, AsksFirst) or path_of(name).endswith(_OTHERS):
        return
    if context.options.cache_dir is not None and context.session.topology.n_nodes > 1:
        # Nodes may share the folder that was given, so that another one may put the file there meanwhile.
        return
    if context.cache.may_hold(store.describe(name)):
        # What the node's cache may have already is not asked for: one byte tells its version.
        store.ask_ahead(name, 1)
    elif path_of(name).endswith(OF_ITEMS):
        known = coalesce(union(parts))
        if total_bytes(known) > MOST_PARTS_BYTES:
            known = ()
        first = known[0].stop if known and known[0].start == 0 else 1
        store.ask_ahead(name, first, parts=[one for one in known if one.start])
    else:
        store.ask_ahead(
            name,
            HEAD_AND_TAIL_BYTES,
            _ends_with_index,
            last_likely=path_of(name).endswith(TORCH_NAMES),
            last_later=beginning_only,
            with_sums=context.options.verify != "off" and _MOSTLY_SMALL.search(path_of(name)) is not None,
        )


def ask_all_ahead(
    context: LoadContext, names: Sequence[str], *, beginning_only: bool = False, at_once: int = AT_ONCE
) -> None:
    """`ask_ahead` for several files that may not be there, `at_once` at a time."""
    if isinstance(context.store, AsksFirst):
        ask = partial(ask_ahead, context, beginning_only=beginning_only)
        ask_each(context.store, ask, names, at_once=max(1, at_once))


def taken(store: Store, name: str) -> Sequence[tuple[int, bytes]]:
    """The bytes that have come so, from a position on, once."""
    if not isinstance(store, AsksFirst) or (first := store.first_bytes(name)) is None:
        return ()
    store.forget(name)
    return first.parts


def latency_s(store: Store) -> float:
    """How long the store's answers take at least, as far as `ask_ahead` found out; else 0."""
    return store.latency_s if isinstance(store, AsksFirst) else 0.0


def _ends_with_index(head: bytes) -> bool:
    return sniff(head[:HEAD_BYTES]) == "torch-zip"
