"""Reads one file to a dict: `read` fetches it once per node, verifies it, and makes its values real on every rank.

    arguments    request                  each rank's arguments are checked, and compared over all ranks
    path         opening.open_own_file    this rank's file is fetched
    index        sources.single_file      its pickle is read, without being run
    ignore       saved.ignore             what ``ignore_keys`` names is taken out of it
    fetch        fetch.parts              of a remote file that comes in parts, the bytes of what is left
    values       materialize              tensors, arrays and objects are made, and compared with their checksums

As in a load, what fails on one rank is raised on all, where they agree next. Nothing that the user owns is changed, so
there is no partial outcome.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..distributed.printable import warn
from ..distributed.session import open_session
from .errors import OptionError
from .fetch.checkpoint_files import CheckpointFiles
from .fetch.parts import all_parts, check_headers, files_reader
from .fetch.rounds import fetch_now
from .materialize.objects import materialize
from .materialize.safe_types import require_safe
from .opening import open_own_file
from .options import LoadOptions
from .request import LoadRequest, agree_on_arguments, settle_options
from .right_indexes import with_right_indexes
from .saved.ignore import IgnoreKeys, ignore, unmatched_glob
from .saved.tree import storages
from .sources.single_file import file_tree
from .stages import Stages
from .state import State
from .torch_modes import default_modes


def read(
    path: str | os.PathLike[str],
    *,
    object_store: Any = None,
    run_name: str | None = None,
    progress_bar: bool = True,
    ignore_keys: IgnoreKeys | str | None = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> dict[Any, Any]:
    """The dict that one file holds, as it was saved, with real values; it restores nothing.

    For a file beside a checkpoint, or one of its files (``optimizer.pt``, ``scheduler.pt``, ``rng_state_0.pth``,
    ``random_states_0.pkl``, ``meta.pt``). What `torch.load` or `pickle.load` would run is not run. The file is one that
    torch.save or pickle wrote, such a file compressed, or a tar that holds one. It is fetched once per node, and
    compared with its checksums before anything is returned.

    Every rank of the job must call it, with the same arguments (``interface`` and the ``cache_`` options may differ).
    Every rank gets values of its own, and needs memory for all of them.

    Args:
        path: a local path, an http(s) URL, any fsspec URI, or an object's name in `object_store`. With ``{rank}``,
            ``{local_rank}`` or ``{node_rank}`` (or ``<rank>`` and so on) each rank reads the file of its own name, and
            all of them must be there. ``{run_name}`` stands for `run_name`.
        object_store: the store that `path` names an object of: an fsspec file system, an object with
            ``download_object``, or one with ``download_file``. None: the store that `path` itself names.
        run_name: stands for ``{run_name}`` in `path`.
        progress_bar: whether rank 0 shows the bytes of all nodes while a remote file is fetched.
        ignore_keys: parts to leave out, whose types need not be known, and whose bytes are not fetched from stores
            that serve ranges: globs over the file's own ``/``-joined keys (``state/*``), or a callable that changes the
            nested dict in place.
        options: `LoadOptions`, or a mapping of its fields. Only those count that say where bytes come from and what is
            trusted: the ``cache_`` fields, ``stall_timeout_s``, ``safe_types``, ``storage_options`` and ``verify``
            (``off`` compares nothing; the other two do the same here).

    Returns:
        The file's dict. Tensors are on the CPU, and those that shared memory do so again. Arrays are NumPy's, and types
        of Python's and torch's that are known become what they were. Objects of frameworks that are known stay inert:
        their class's name (``global_name``) and fields (``state``). Other types need ``safe_types``.

    Raises:
        RankloadError: one of its subclasses, the same on every rank (``docs/errors.md`` lists them): `NotFoundError`
            names each file that is missing and the ranks that need it, `FormatError` a file that holds no dict or a
            folder, `UnsafeError` a type that is neither known nor in ``safe_types``, `CorruptError` damage.
    """
    resolved, problem = settle_options(options)
    request = LoadRequest(
        path,  # type: ignore[arg-type]  # made text there, or refused by `check_arguments`
        State(model=None, run_name=run_name),
        # Bytes go to the node's cache first, and everything is compared before the caller has it.
        replace(resolved, mode="node", verify="off" if resolved.verify == "off" else "before"),
        object_store=object_store,
        progress_bar=progress_bar,
        ignore_keys=ignore_keys,
    )
    return with_right_indexes(request, partial(_read, problem=problem))


def _read(request: LoadRequest, problem: OptionError | None) -> dict[Any, Any]:
    """As `read`, for arguments that were found to be a `problem` or none. Every rank must call."""
    with (
        default_modes(),
        open_session(stall_timeout_s=request.options.stall_timeout_s) as session,
        contextlib.ExitStack() as leaving,
    ):
        stages = Stages(session.channel)
        agree_on_arguments(request, problem, session, stages)
        files = open_own_file(request, session, stages, leaving)
        with stages.stage("read"):
            tree = _wanted(request, files)
        fetch_now(files.context, files.remote, all_parts(tree), "fetch parts")
        with stages.stage("values"):
            return _real(request, files, tree)


def _wanted(request: LoadRequest, files: CheckpointFiles) -> dict[Any, Any]:
    """The file's tree without what is ignored. Raises `UnsafeError` where it holds a type that may not be made."""
    whole, name = file_tree(files), files.first.source
    found = ignore(whole, request.ignore_keys)
    for glob in found.unmatched:
        warn(unmatched_glob(whole, glob, name), stacklevel=5)
    if files.context.session.topology.rank == 0:
        for note in files.remote.checks.notes:
            warn(note, stacklevel=5)
    require_safe({"": found.tree}, safe_types=request.options.safe_types, file=name)
    return found.tree


def _real(request: LoadRequest, files: CheckpointFiles, tree: dict[Any, Any]) -> dict[Any, Any]:
    """`tree` with real values. Raises `CorruptError` where bytes are missing or do not match their checksum."""
    # Storages are compared as they are made, which is before anybody has them.
    reader = files_reader(files, "off" if request.options.verify == "off" else "during")
    check_headers(files, storages(tree))
    real: dict[Any, Any] = materialize(
        tree, reader=reader, safe_types=request.options.safe_types, file=files.first.source
    )
    return real
