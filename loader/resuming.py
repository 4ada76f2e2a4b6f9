"""Resumes a run from its newest checkpoint that is proven whole: `find_checkpoints` looks, `autoresume` loads.

    arguments   request              each rank's are checked, and compared over all ranks
    find        finding.find         rank 0 lists what is there, and proves the newest that it can
    elsewhere   completeness         what rank 0's node lacks is looked for on nodes with disks of their own
    load        journey.load         the newest proven one; where a rank finds it damaged before anything was changed,
                                     the next older one

All ranks agree on each step. What is passed over is a warning on rank 0, each with its reason, and in
`LoadResult.passed_over`. The world size may be another at each restart.

Not guaranteed: that a load succeeds. One that fails after its first change raises: the state is undefined then.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..distributed.printable import Lines, package_logger, warn
from ..distributed.session import Session, open_session
from .cache.folder import default_cache_folder, make_private_folder
from .candidates.found import FoundCheckpoint
from .completeness import fault_in
from .errors import CorruptError, NotFoundError, OptionError, RankloadError
from .finding import find
from .http.connections import Connections
from .journey import LoadResult, load
from .options import RESUME, LoadOptions, Options
from .plurals import counted
from .redaction import redact_path
from .request import LoadRequest, agree_on_arguments, check_same, settle_options
from .saved.contents import SetFile
from .saved.ignore import IgnoreKeys
from .stages import Stages
from .state import AlgorithmPass, State
from .stores.local import LocalStore
from .template import expand_path
from .wire import decode, encode
from .writing.local import replace_small

_ATTEMPTS = "attempts.json"
_SHOWN = 4
_COUNTED = ("CorruptError", "FormatError", "LayoutError")
"""What a load may end in by the checkpoint's fault."""

_logger = package_logger()


def find_checkpoints(
    path: str | os.PathLike[str] | None = None,
    *,
    object_store: Any = None,
    newest: bool = False,
    every: bool = False,
    run_name: str | None = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> list[FoundCheckpoint]:
    """What is at `path`, in the order in which `autoresume` would take it: the first one that is proven is taken.

    Every rank of the job must call it, with the same arguments; a script without a job may too.

    Args:
        path: a folder in which a run keeps its checkpoints, or one checkpoint, or a template with ``{rank}``; one part
            of it may have ``*``. A local path or any URI. None: what the variable ``RANKLOAD_RESUME`` names.
        object_store: as `load` takes it.
        newest: whether the one with the highest step comes first, whatever ``latest`` or a link names.
        every: whether all are examined, also older ones than the first proven one.
        run_name: stands for ``{run_name}`` in `path`.
        options: `LoadOptions`, or a mapping of its fields.

    Returns:
        `FoundCheckpoint` values; none where there is nothing.

    Raises:
        RankloadError: the same on every rank: `AccessError` where the store refuses or cannot be reached, `OptionError`
            or `TemplateError` for a path that means nothing.
    """
    resolved, problem = settle_options(options)
    request = LoadRequest(
        _path(path),
        State(model=None, run_name=run_name),
        resolved,
        object_store=object_store,
    )
    with open_session(stall_timeout_s=resolved.stall_timeout_s) as session:
        agree_on_arguments(request, problem, session, Stages(session.channel))
        return _find(request, session, newest=newest, every=every)


def autoresume(
    path: str | os.PathLike[str] | None,
    state: Any,
    logger: Any = None,
    object_store: Any = None,
    *,
    newest: bool = False,
    require: bool = False,
    max_attempts: int | None = None,
    load_weights_only: bool = False,
    strict_model_weights: bool = True,
    progress_bar: bool = True,
    ignore_keys: IgnoreKeys | str | None = None,
    exclude_algorithms: Collection[str] | None = None,
    algorithm_passes: Sequence[AlgorithmPass] | None = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> LoadResult | None:
    """Restores the newest checkpoint of a run that is proven whole; None where there is none, which starts cold.

    Every rank of the job must call it, with the same arguments. A checkpoint is proven where all files that it consists
    of are there, none is cut short, and a manifest of checksums beside it lists no other; what a killed save left is
    passed over, and so is what a rank finds damaged before anything was changed. ``latest`` and links go first where
    what they name is proven; a newer one that is proven is then a warning.

    Args:
        path: as `find_checkpoints` takes it. None: what the variable ``RANKLOAD_RESUME`` names; where that is not set,
            the run starts cold.
        state: as `load` takes it, and so are `logger` to `progress_bar` and the arguments after `max_attempts`.
        newest: take the highest step that is proven, whatever ``latest`` or a link names.
        require: raise `NotFoundError` in place of a cold start.
        max_attempts: how many loads of one checkpoint may end in a `CorruptError`, `FormatError` or `LayoutError`,
            counted in this node's cache folder over restarts; then it is passed over. None: no limit.

    Returns:
        The `LoadResult` of what was loaded: its ``step`` tells how far the run was, ``passed_over`` what was not taken.
        None after a cold start, which rank 0 logs as a warning with the reasons.

    Raises:
        RankloadError: as `load` and `find_checkpoints`. A checkpoint that is whole and does not fit the job raises: an
            older one would not fit it either.
    """
    resolved, problem = settle_options(options)
    request = LoadRequest(_path(path), state, resolved, object_store=object_store)
    asked = {"newest": str(newest), "require": str(require), "max_attempts": str(max_attempts)}
    if problem is None and max_attempts is not None and (type(max_attempts) is not int or max_attempts < 1):
        problem = OptionError(f"max_attempts is {max_attempts!r}: expected a number from 1 on, or None")
    broken: dict[str, str] = {}
    while True:
        with open_session(stall_timeout_s=resolved.stall_timeout_s) as session:
            is_first = session.topology.rank == 0
            if not any(session.channel.gather("a path", bool(path is not None or os.environ.get(RESUME)))):
                found, what = [], f"no path was passed, and {RESUME} is not set"
            else:
                agree_on_arguments(request, problem, session, Stages(session.channel))
                session.channel.decide("same resume", asked, check_same)
                found = _find(request, session, newest=newest, skip=broken, max_attempts=max_attempts)
                what = f"{redact_path(request.path)} has no checkpoint that is whole"
        passed = tuple(one for one in found if one.proven is False)
        chosen = next((one for one in found if one.proven), None)
        if chosen is None:
            _cold(what, passed, require=require, is_first=is_first)
            return None
        try:
            result = load(
                chosen.path,
                state,
                logger,
                object_store,
                load_weights_only,
                strict_model_weights,
                progress_bar,
                ignore_keys,
                exclude_algorithms,
                algorithm_passes,
                options=options,
            )
        except RankloadError as error:
            if is_first and max_attempts is not None:
                _count(resolved, chosen.shown, error)
            if not isinstance(error, CorruptError | NotFoundError):
                raise
            # Nothing was changed, and what is damaged or missing is the checkpoint's own: the next one may be whole.
            broken[chosen.shown] = error.message.removeprefix(f"{chosen.shown}: ")
            continue
        if is_first:
            if max_attempts is not None:
                _count(resolved, chosen.shown, None)
            _tell(chosen, found)
        return replace(result, passed_over=passed)


def _path(path: Any) -> Any:
    return os.environ.get(RESUME, "") if path is None else path


def _find(
    request: LoadRequest,
    session: Session,
    *,
    newest: bool,
    every: bool = False,
    skip: Mapping[str, str] | None = None,
    max_attempts: int | None = None,
) -> list[FoundCheckpoint]:
    """What rank 0 finds, completed by what other nodes have; the same on every rank. Every rank must call."""
    channel = session.channel

    def look(_: object) -> Any:
        return encode(
            find(
                request.path,
                object_store=request.object_store,
                options=request.options,
                run_name=request.run_name,
                newest=newest,
                every=every,
                skip={**_worn_out(request.options, max_attempts), **(skip or {})},
                heard=channel.heard,
            )
        )

    found = decode(list[FoundCheckpoint], channel.decide("find checkpoints", None, look))
    wanted = {file: None for one in found if one.proven is False for file in one.missing}
    if not wanted or session.topology.n_nodes == 1:
        return found
    # Nodes with disks of their own have each what their own ranks saved.
    leads = session.topology.local_rank == 0 and session.topology.rank != 0
    there = set().union(
        *channel.gather("find elsewhere", _whole_here(request, session, wanted) if leads else [])
    )
    return [
        replace(one, proven=True, reason="", missing=())
        if one.missing and there.issuperset(one.missing)
        else one
        for one in found
    ]


def _whole_here(request: LoadRequest, session: Session, wanted: Iterable[str]) -> list[str]:
    """Those of the local files `wanted`, as rank 0 calls them, that are on this node's disks, and whole."""
    first, own = (
        expand_path(request.path, rank=0, local_rank=0, node_rank=node, run_name=request.run_name)
        for node in (0, session.topology.node_rank)
    )
    with contextlib.closing(Connections()) as connections:
        return [
            file
            for file in wanted
            if fault_in(LocalStore(), file.replace(first, own, 1), SetFile(file), connections) is None
        ]


def _tell(chosen: FoundCheckpoint, found: Sequence[FoundCheckpoint]) -> None:
    """Warns of what was passed over, and of a newer one than what is named by a pointer."""
    for one in found:
        if one.proven is False:
            warn(f"passed over {one.shown}: {one.reason}", stacklevel=3)
    newer = [one for one in found if one.proven and _step(one) > _step(chosen)]
    if newer:
        listed = ", ".join(str(one) for one in newer[:_SHOWN])
        warn(
            f"{chosen.shown} is restored, which {chosen.pointer or 'was found first'} names; newer, and "
            f"whole too, is {listed}. autoresume(..., newest=True) takes the newest that is proven",
            stacklevel=3,
        )
    _logger.info("resuming from %s", chosen)


def _step(one: FoundCheckpoint) -> int:
    return -1 if one.step is None else one.step


def _cold(what: str, passed: Sequence[FoundCheckpoint], *, require: bool, is_first: bool) -> None:
    """Says that the run starts cold, and why. Raises `NotFoundError` in place of that where it must not."""
    reasons = [f"  passed over {one.shown}: {one.reason}" for one in passed]
    if require:
        text = (
            f"{what}, and require=True forbids a cold start. Pass the folder in which the run keeps its checkpoints, "
            "or leave require out to begin anew"
        )
        raise NotFoundError(Lines([text, *reasons]))
    if is_first:
        _logger.warning("COLD START: %s", Lines([f"{what}; the run begins at step 0", *reasons]))


def _worn_out(options: Options, max_attempts: int | None) -> dict[str, str]:
    """The checkpoints whose loads have failed as often as they may, each with the reason."""
    if max_attempts is None:
        return {}
    return {
        shown: f"{counted(len(kinds), 'load')} of it ended in {', '.join(dict.fromkeys(kinds))}, and "
        f"max_attempts={max_attempts}; {_attempts_file(options)} counts them"
        for shown, kinds in _attempts(options).items()
        if len(kinds) >= max_attempts
    }


def _attempts_file(options: Options) -> str:
    return os.path.join(options.cache_dir or default_cache_folder(), _ATTEMPTS)


def _attempts(options: Options) -> dict[str, list[str]]:
    """By what messages call a checkpoint, what each failed load of it ended in."""
    try:
        with open(_attempts_file(options), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    # Another version of this package, or a disk, may have put something else there.
    return {
        shown: kinds
        for shown, kinds in found.items()
        if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    }


def _count(options: Options, shown: str, error: RankloadError | None) -> None:
    """Counts a load that failed by the checkpoint's fault; with None forgets those of a checkpoint that was loaded."""
    kind = None if error is None else error.details.get("cause", type(error).__name__)
    known = _attempts(options)
    if kind is None:
        if known.pop(shown, None) is None:
            return
    elif kind in _COUNTED:
        known.setdefault(shown, []).append(kind)
    else:
        return
    file = _attempts_file(options)
    try:
        make_private_folder(os.path.dirname(file))
        replace_small(file, json.dumps(known).encode())
    except (OSError, RankloadError) as failure:
        warn(f"{file}: the failed load could not be counted: {failure}", stacklevel=3)
