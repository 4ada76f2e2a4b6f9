"""Gives a framework that reads local folders alone a folder for a checkpoint at a URI: its small files, once per node.

The files of DeepSpeed's engines are not copied: the adapters read them from where they are (`origin_of`). Where no
engine loads the model, the framework itself reads its files, which then are copied too.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..distributed.session import Session, open_session
from ..loader import LoadOptions, NotFoundError
from ..loader.formats.model_index import read_model_index
from ..loader.opening import outages_of
from ..loader.request import LoadRequest, agree_on_arguments, settle_options
from ..loader.retries import Outages
from ..loader.stages import Stages
from ..loader.state import State
from ..loader.stores.base import Heard, Store, path_scheme, unheard
from ..loader.stores.local import file_uri_path
from ..loader.stores.locate import LATEST, MODEL_INDEX, read_tag
from ..loader.stores.open import open_store
from ..loader.stores.probes import all_there

_origins: dict[str, str] = {}
"""Side folders of this process, by their real paths, to the URIs that they stand for. In memory alone: a URI may hold
secrets."""


def is_elsewhere(path: str, object_store: Any = None) -> bool:
    """Whether `path` is no local path, so that a framework needs a side folder for it."""
    if object_store is not None:
        return True
    return path_scheme(path) is not None and file_uri_path(path) is None and not os.path.exists(path)


def origin_of(path: str | os.PathLike[str], object_store: Any = None) -> tuple[str, Any]:
    """What the side folder at `path` stands for, and `object_store`, which has it; any other path itself, a local one,
    and None."""
    origin = _origins.get(os.path.realpath(path))
    return (os.fspath(path), None) if origin is None else (origin, object_store)


@contextlib.contextmanager
def side_folder(
    path: str,
    names: Sequence[str],
    own: Callable[[int], str],
    *,
    marker: str,
    whole: Sequence[str] = (),
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> Iterator[str]:
    """A local folder on each node, for the length of the block, with the small files of the checkpoint at `path`.

    Every rank must call, with the same arguments. Files are fetched by the first rank of each node, compared with their
    size alone.

    Args:
        path: the checkpoint's folder, as `load` takes it.
        names: the files to copy, of which those that are there are taken.
        own: the name of the random states of a rank; the node's ranks' are taken.
        marker: a file that every such checkpoint has.
        whole: the files of the model and its optimizer, where no engine loads them; with an index among them, all that
            it names. Without, the folder that ``latest`` names is made, and stays empty: frameworks look for it.
        object_store, options: as `load` takes them.

    Raises:
        RankloadError: the same on all ranks: `NotFoundError` where `marker` is not there, or a file that an index
            names, `CorruptError` for an index or a ``latest`` that is none, `AccessError` and so on.
    """
    resolved, problem = settle_options(options)
    request = LoadRequest(path, State(model=None), resolved, object_store=object_store)
    with contextlib.ExitStack() as leaving:
        with open_session(stall_timeout_s=resolved.stall_timeout_s) as session:
            stages = Stages(session.channel)
            agree_on_arguments(request, problem, session, stages)
            made = _make(request, session, stages, names, own, marker, whole, leaving)
            place = session.topology
            local = session.channel.gather("side folders", made)[place.ranks_by_node[place.node_rank][0]]
        _origins[os.path.realpath(local)] = request.path
        leaving.callback(_origins.pop, os.path.realpath(local), None)
        yield local


def _make(
    request: LoadRequest,
    session: Session,
    stages: Stages,
    names: Sequence[str],
    own: Callable[[int], str],
    marker: str,
    whole: Sequence[str],
    leaving: contextlib.ExitStack,
) -> str | None:
    """The folder that this rank made for its node; None on all but the node's first. Every rank must call."""
    place = session.topology
    with stages.stage("open side folder"):
        store, root = open_store(
            request.path,
            request.object_store,
            request.options.storage_options,
            stages.heard,
            outages_of(session, request.options.stall_timeout_s),
        )
    try:
        ranks = [own(rank) for rank in range(place.world_size)]
        wanted = [*dict.fromkeys([marker, *names, *ranks, *(whole or (LATEST,))])]
        found = session.channel.decide("side files", None, lambda _: _there(store, root, wanted))
        if marker not in found:
            shown = store.describe(root)
            raise NotFoundError(
                f"{shown} has no {marker}: expected a folder that the framework saved as a whole; look at what lies "
                f"there with rankload find {shown}",
                path=shown,
            )
        with stages.stage("side folder"):
            if place.local_rank != 0:
                return None
            folder = leaving.enter_context(tempfile.TemporaryDirectory(prefix="rankload-side-"))
            here = {own(rank) for rank in (0, *place.ranks_by_node[place.node_rank])}
            taken = [name for name in found if name not in ranks or name in here]
            for name in taken:
                _copy(store, root, name, folder, stages)
            for name in [name for name in taken if name.endswith(MODEL_INDEX)]:
                index = read_model_index(
                    os.path.join(folder, name), name=store.describe(store.join(root, name))
                )
                for shard in index.file_names:
                    _copy(store, root, shard, folder, stages)
            if LATEST in found:
                os.makedirs(os.path.join(folder, read_tag(store, store.join(root, LATEST))), exist_ok=True)
            return folder
    finally:
        store.close()


def _there(store: Store, root: str, names: Sequence[str]) -> list[str]:
    there = set(all_there(store, [store.join(root, name) for name in names]))
    return [name for name in names if store.join(root, name) in there]


def _copy(store: Store, root: str, name: str, folder: str, stages: Stages) -> None:
    target, source = os.path.join(folder, name), store.join(root, name)
    if os.path.exists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    store.download(source, target, stages.count, store.stat(source))


def count_numbered(
    path: str, name: str, *, object_store: Any = None, options: Any = None, heard: Heard = unheard
) -> int:
    """How many files of `name`, in which ``{}`` is a number from 0 on, the folder at `path` has without a gap.

    `heard` is called while the store is waited for.
    """
    resolved, _ = settle_options(options)
    outages = Outages(resolved.stall_timeout_s)
    store, root = open_store(path, object_store, resolved.storage_options, heard, outages)
    begin, size = 0, 8
    try:
        while True:
            names = [name.format(number) for number in range(begin, begin + size)]
            found = len(_there(store, root, names))
            if found < size:
                return begin + found
            begin, size = begin + size, 2 * size
    finally:
        store.close()


def read_beside(
    path: str, name: str, limit: int, *, object_store: Any = None, options: Any = None, heard: Heard = unheard
) -> bytes | None:
    """The small file `name` in the folder at `path`; None where there is none.

    `heard` is called while the store is waited for.
    """
    resolved, _ = settle_options(options)
    store, root = open_store(path, object_store, resolved.storage_options, heard)
    try:
        file = store.join(root, name)
        return store.read_small(file, limit) if store.stat(file) is not None else None
    finally:
        store.close()
