"""Runs a load from end to end: `load` calls the stages below in order, and the functions of this file follow its order.

    arguments      _agree_on_arguments     each rank's arguments are checked, and compared over all ranks
    open ... read  opening                 the path is located, its files fetched and their indexes read: `Checkpoint`
    ignore         _leave_out              what ``ignore_keys`` names is taken out of the saved parts: `Ignored`
    check          check                   types, names, shapes and dtypes; the restore is planned: `Checked`
    plan           verify, fetch           which rank sums which bytes, provides which weights, fetches which ranges
    restore        _restore                FIRST CHANGE: bytes are copied into place, while others are still fetched
    weights        verify.weights          weights that ranks share come to each node once
    checksums      verify.checks           what was summed is compared (with ``verify="before"``: before `restore`)
    finish         _finish                 what DeepSpeed does on all ranks at the end
    timestamp      _agree_on_timestamp     all ranks restored the same batch count
    rng            _complete_rng           one random state for each rank; returned, not applied
    receipt        _make_receipt           every rank's report is joined to one `Receipt`

Every stage ends in one agreement: all ranks go on, or all ranks raise the same error. Nothing that the user owns is
changed before ``restore``.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..distributed.channel import Channel
from ..distributed.session import Session, open_session
from .check import Checked, check
from .checkpoint import Checkpoint
from .errors import OptionError, TimestampError, after_first_change, partial_once_begun
from .fetch.parts import fetch_now, fetcher, fetching, restore_parts, small_parts
from .fetch.whole_checks import NOTHING
from .opening import open_checkpoint
from .options import LoadOptions, resolve_options
from .receipt import FileRecord, Receipt, StageRecord, combine, log_receipt, trace_events, write_trace
from .request import LoadRequest, check_arguments, check_same
from .rng import RngState, complete_states, decode_each, encode_own
from .saved.ignore import Ignored, IgnoreKeys, ignore
from .stages import Stages
from .targets.algorithms import AlgorithmPass
from .targets.deepspeed.engine import finish_engine
from .targets.restore import apply_restore
from .verify.checks import deal_checks, verify_after, verify_before
from .verify.weights import plan_weights, share_weights


@dataclass(frozen=True)
class LoadResult:
    """What a load returns.

    Attributes:
        rng_states: one entry for each rank of this world, for `restore_rng`; None with ``load_weights_only``, when the
            checkpoint has none, or when ``rng`` is ignored.
        receipt: what was restored, from which bytes, and what was not; the same on every rank.
        extra: top-level entries of the checkpoint that are no part of `State`, as real values: a hand-written file's
            ``epoch``, DeepSpeed's ``client_state``.
    """

    rng_states: list[RngState] | None
    receipt: Receipt
    extra: dict[str, Any]


def load_checkpoint(
    path: str | os.PathLike[str],
    state: Any,
    logger: Any = None,
    object_store: Any = None,
    load_weights_only: bool = False,
    strict_model_weights: bool = True,
    progress_bar: bool = True,
    ignore_keys: IgnoreKeys | str | None = None,
    exclude_algorithms: Collection[str] | None = None,
    algorithm_passes: Sequence[AlgorithmPass] | None = None,
    *,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> list[RngState] | None:
    """Restores the checkpoint at `path` into `state`, on every rank or on none; returns the random states.

    It is `load` under the name, and with the result, of Composer's function. Every rank of the job must call it, with
    the same arguments (``options.cache_dir`` may differ).

    Args:
        path: a local path, an http(s) URL, any fsspec URI, or an object's name in `object_store`. It may hold
            ``{rank}``, ``{local_rank}``, ``{node_rank}`` and ``{run_name}`` (or ``<rank>`` and so on). A folder that
            DeepSpeed saved is named by itself, or by one of its tags.
        state: a `State`, or an object that loads itself as Composer's ``State`` does.
        logger: a ``logging.Logger``, or an object with ``log_metrics`` or ``log_hyperparameters``, which rank 0 gives
            the receipt. None: the logger named ``rankload``.
        object_store: the store that `path` names an object of: an fsspec file system, an object with
            ``download_object``, or one with ``download_file``. None: the store that `path` itself names.
        load_weights_only: restore the model's weights and buffers, and nothing else.
        strict_model_weights: whether missing and unexpected names are an error. Wrong shapes always are.
        progress_bar: whether rank 0 shows the bytes of all nodes while a remote checkpoint is fetched.
        ignore_keys: parts to leave out: globs over ``/``-joined keys (``state/model/head.*``, ``state/optimizers/*``,
            ``rng``), or a callable that changes the nested dict in place.
        exclude_algorithms: names of algorithms not to add although the checkpoint needs them.
        algorithm_passes: functions that order the algorithms that are added.
        options: `LoadOptions`, or a mapping of its fields.

    Returns:
        One entry for each rank of this world, for `restore_rng`; they are not applied. None with `load_weights_only`,
        when the checkpoint has none, or when ``rng`` is ignored.

    Raises:
        RankloadError: as `load` raises.
    """
    return load(
        path,
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
    ).rng_states


def load(
    path: str | os.PathLike[str],
    state: Any,
    logger: Any = None,
    object_store: Any = None,
    load_weights_only: bool = False,
    strict_model_weights: bool = True,
    progress_bar: bool = True,
    ignore_keys: IgnoreKeys | str | None = None,
    exclude_algorithms: Collection[str] | None = None,
    algorithm_passes: Sequence[AlgorithmPass] | None = None,
    *,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> LoadResult:
    """Restores the checkpoint at `path` into `state`, on every rank or on none; returns what it did.

    Every rank of the job must call it, with the same arguments (``options.cache_dir`` may differ).

    Args:
        path: a local path, an http(s) URL, any fsspec URI, or an object's name in `object_store`. It may hold
            ``{rank}``, ``{local_rank}``, ``{node_rank}`` and ``{run_name}`` (or ``<rank>`` and so on). A folder that
            DeepSpeed saved is named by itself, or by one of its tags.
        state: a `State`, or an object that loads itself as Composer's ``State`` does.
        logger: a ``logging.Logger``, or an object with ``log_metrics`` or ``log_hyperparameters``, which rank 0 gives
            the receipt. None: the logger named ``rankload``.
        object_store: the store that `path` names an object of: an fsspec file system, an object with
            ``download_object``, or one with ``download_file``. None: the store that `path` itself names.
        load_weights_only: restore the model's weights and buffers, and nothing else.
        strict_model_weights: whether missing and unexpected names are an error. Wrong shapes always are.
        progress_bar: whether rank 0 shows the bytes of all nodes while a remote checkpoint is fetched.
        ignore_keys: parts to leave out: globs over ``/``-joined keys (``state/model/head.*``, ``state/optimizers/*``,
            ``rng``), or a callable that changes the nested dict in place.
        exclude_algorithms: names of algorithms not to add although the checkpoint needs them.
        algorithm_passes: functions that order the algorithms that are added.
        options: `LoadOptions`, or a mapping of its fields.

    Returns:
        A `LoadResult`: the random states, the receipt, and the checkpoint's other top-level entries.

    Raises:
        RankloadError: one of its subclasses, the same on every rank (``docs/errors.md`` lists them). Unless it is a
            `PartialRestoreError`, or a `TimestampError` after the restore, nothing was changed.
    """
    try:
        resolved, problem = resolve_options(options), None
    except OptionError as error:
        # Raised in the first stage, on all ranks: they are about to enter the session, and would wait for this one.
        resolved, problem = resolve_options(None, {}), error
    request = LoadRequest(
        path,  # type: ignore[arg-type]  # made text there, or refused by `check_arguments`
        state,
        logger,
        object_store,
        load_weights_only,
        strict_model_weights,
        progress_bar,
        ignore_keys,
        exclude_algorithms,
        algorithm_passes,
        resolved,
    )
    stall_timeout_s = resolved.stall_timeout_s or 120.0
    with (
        partial_once_begun() as begun,
        open_session(stall_timeout_s=stall_timeout_s) as session,
        contextlib.ExitStack() as leaving,
    ):
        stages = Stages(session.channel)
        _agree_on_arguments(request, problem, session, stages)
        checkpoint = open_checkpoint(request, session, stages, leaving)
        fetch_now(checkpoint.opening, small_parts(checkpoint), "fetch small parts")
        ignored = _leave_out(request, checkpoint, stages)
        checked = check(request, checkpoint, ignored, stages)
        verify = request.options.verify or "during"
        weights = plan_weights(checkpoint, checked, session, stages, verify=verify)
        verification = deal_checks(checkpoint, checked, session, stages, verify=verify)
        parts = restore_parts(checkpoint, checked, verification, weights)
        if verify == "before":
            fetch_now(checkpoint.opening, parts.wanted, "fetch parts")
        verify_before(verification, checkpoint, checked, session, stages)
        with fetching(checkpoint, checked.reader, parts, "fetch parts"):
            begun.append(checkpoint.name)
            restored = _restore(request, checkpoint, checked, stages)
            share_weights(weights, checkpoint, checked, session, stages, fetcher(checkpoint), verify=verify)
            verify_after(verification, checkpoint, checked, session, stages)
        _finish(checkpoint, checked, stages)
        _agree_on_timestamp(request.state, session.channel)
        rng_states, derived = _complete_rng(request, checkpoint, checked, session, stages)
        notes = weights.notes if weights is not None else []
        receipt = _make_receipt(
            request, checkpoint, ignored, checked, restored, derived, notes, session, stages
        )
    if session.topology.rank == 0:
        try:
            log_receipt(receipt, request.logger)
        except Exception as error:
            # All ranks have restored: a tracker that is down is no reason for one of them to fail alone.
            warnings.warn(f"the logger refused the receipt ({type(error).__name__}: {error})", stacklevel=2)
        _write_trace(request, receipt)
    return LoadResult(rng_states, receipt, checked.extra)


def _agree_on_arguments(
    request: LoadRequest, problem: OptionError | None, session: Session, stages: Stages
) -> None:
    """Raises `OptionError` on all ranks where one has arguments that do not fit, or where they differ between ranks."""
    with stages.stage("arguments"):
        if problem is not None:
            raise problem
        check_arguments(request)
    session.channel.decide("same arguments", request.comparable(), check_same)


def _leave_out(request: LoadRequest, checkpoint: Checkpoint, stages: Stages) -> Ignored:
    """The checkpoint's nested dict without what ``ignore_keys`` names; warns of globs that match nothing."""
    with stages.stage("ignore"):
        ignored = ignore(checkpoint.contents.as_tree(), request.ignore_keys)
        for glob in ignored.unmatched:
            warnings.warn(f"ignore_keys: {glob!r} matches nothing in {checkpoint.name}", stacklevel=3)
        return ignored


def _restore(request: LoadRequest, checkpoint: Checkpoint, checked: Checked, stages: Stages) -> list[str]:
    """Carries out the plan of `check`; returns what was restored, as the receipt names it. The first change is here."""
    changed: list[str] = []
    with stages.stage("restore"), after_first_change(checkpoint.name, changed):
        return apply_restore(
            request,
            checked.prepared,
            checked.contents,
            checkpoint.contents,
            checked.reader,
            changed.append,
            checked.materialize_options,
        )


def _finish(checkpoint: Checkpoint, checked: Checked, stages: Stages) -> None:
    """Runs what DeepSpeed does on all ranks together, once the restore has succeeded on every rank."""
    if checked.prepared.engine is None:
        return
    with stages.stage("finish"), after_first_change(checkpoint.name, ["all parts"]):
        finish_engine(checked.prepared.engine)


def _agree_on_timestamp(state: Any, channel: Channel) -> None:
    """Raises `TimestampError` on every rank unless all have the same batch count, or none. Every rank must call."""

    def compare(batches: list[Any]) -> None:
        known = [batch for batch in batches if batch is not None]
        if known and (min(known) != max(known) or len(known) != len(batches)):
            listed = ", ".join(f"rank {rank}: {batch}" for rank, batch in list(enumerate(batches))[:16])
            raise TimestampError(
                f"timestamp.batch differs between ranks after the restore ({listed}): they did not load the same "
                "checkpoint"
            )

    channel.decide("timestamp", _batch_of(state), compare)


def _batch_of(state: Any) -> int | None:
    """A state's batch count: Composer's ``timestamp.batch.value``, or a plain dict's ``batch``; None without one."""
    timestamp = getattr(state, "timestamp", None)
    batch = timestamp.get("batch") if isinstance(timestamp, Mapping) else getattr(timestamp, "batch", None)
    batch = getattr(batch, "value", batch)
    return int(batch) if isinstance(batch, int) else None


def _complete_rng(
    request: LoadRequest, checkpoint: Checkpoint, checked: Checked, session: Session, stages: Stages
) -> tuple[list[RngState] | None, tuple[str, ...]]:
    """One random state for each rank of this world, and which of them were derived; None where there are none saved."""
    saved = checked.rng
    with stages.timed("rng"):
        if checkpoint.rng_per_rank and not request.weights_only:
            # The file that this rank read has one saved rank's state, or all ranks' where the saving job gathered them.
            own = encode_own(saved, session.topology.rank, single=checkpoint.own_rng)
            saved = decode_each(session.channel.gather_bytes("rng", own))
    if not saved:
        return None, ()
    states, derived = complete_states(saved, session.topology.world_size, checked.contents.rank_zero_seed)
    if not states:
        return None, ()
    if derived and session.topology.rank == 0:
        warnings.warn(
            f"{checkpoint.name} has RNG states of {len(saved) - saved.count(None)} ranks, this world has "
            f"{session.topology.world_size}; derived: {', '.join(derived)}",
            stacklevel=3,
        )
    return states, derived


def _make_receipt(
    request: LoadRequest,
    checkpoint: Checkpoint,
    ignored: Ignored,
    checked: Checked,
    restored: list[str],
    derived: tuple[str, ...],
    notes: list[str],
    session: Session,
    stages: Stages,
) -> Receipt:
    """The receipt, from every rank's report: the same on all ranks, but for `Receipt.cache_dir`."""
    prepared, remote = checked.prepared, checkpoint.opening.remote
    own = {
        "ignored": list(ignored.paths),
        "missing": prepared.mismatch.missing,
        "unexpected": prepared.mismatch.unexpected,
        "renamed": prepared.renamed,
        "cast": prepared.cast,
        "derived": [*derived, *(f"{name} (zeros)" for name in prepared.reset)],
        "not_restored": [] if request.weights_only else list(prepared.not_restored),
        "restored": restored,
        "notes": notes,
        "parts": remote.fetched_by_path(),
        "streamed": remote.streamed,
        "node": session.topology.node_rank,
        "host": session.channel.host,
        "timings": [[one.stage, one.seconds, one.bytes, one.begin_s] for one in stages.timings],
        "files": [
            [
                file.name,
                file.size_bytes,
                file.fetched_bytes,
                remote.known.own_bytes(checkpoint.paths.get(file.name, "")),
                file.verified,
                checkpoint.paths.get(file.name, ""),
                *_compared(checkpoint, file),
            ]
            for file in checkpoint.files
        ],
    }
    verify = request.options.verify or "during"
    everybody = session.channel.gather("receipt", own)
    # All ranks of a node report the same bytes of a file fetched whole; of one that came in parts, the counts of the
    # rank that fetched it are the right ones.
    parts = {(one["node"], path): count for one in everybody for path, count in one["parts"].items()}
    cost: dict[str, dict[int, int]] = {}
    direct: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    for one in everybody:
        for name, size, whole_bytes, own_bytes, verified, path, by, left_out in one["files"]:
            direct[name] = direct.get(name, 0) + own_bytes
            by_node = cost.setdefault(name, {})
            fetched = parts.get((one["node"], path), whole_bytes)
            by_node[one["node"]] = max(fetched, by_node.get(one["node"], 0))
            known = files.get(name)
            files[name] = FileRecord(
                name,
                size,
                sum(by_node.values()) + direct[name],
                verified and (not known or known.verified),
                tuple(dict.fromkeys((*(known.verified_by if known else ()), *by))) if verify != "off" else (),
                tuple(dict.fromkeys((*(known.not_compared if known else ()), *left_out))),
            )
    streamed = dict.fromkeys(name for one in everybody for name in one["streamed"])
    return Receipt(
        path=checkpoint.name,
        kind=checkpoint.kind,
        layout=checkpoint.contents.layout,
        saved_world_size=checkpoint.saved_world_size,
        world_size=session.topology.world_size,
        n_nodes=session.topology.n_nodes,
        weights_only=request.weights_only,
        verify=verify,
        cache_dir=checkpoint.cache_dir,
        restored=tuple(everybody[0]["restored"]),
        **combine(everybody),
        unverified=tuple(file.name for file in files.values() if verify == "off" or not file.verified),
        notes=(
            *checkpoint.notes,
            *prepared.notes,
            *everybody[0]["notes"],
            *(f"server without ranges: {name} was read as one stream" for name in streamed),
        ),
        files=tuple(files.values()),
        hosts=tuple(one["host"] for one in everybody),
        nodes=tuple(one["node"] for one in everybody),
        stages=tuple(
            StageRecord(rank, stage, seconds, count, begin_s)
            for rank, one in enumerate(everybody)
            for stage, seconds, count, begin_s in one["timings"]
        ),
    )


def _compared(checkpoint: Checkpoint, file: FileRecord) -> tuple[list[str], list[str]]:
    """The checksums that `file` was compared with on this rank until now, and those that it was not."""
    whole = checkpoint.opening.remote.compared(checkpoint.paths.get(file.name, "")) or NOTHING
    return [*file.verified_by, *whole.by], [*file.not_compared, *whole.left_out]


def _write_trace(request: LoadRequest, receipt: Receipt) -> None:
    if request.options.trace is None:
        return
    try:
        write_trace(request.options.trace, trace_events(receipt.stages, receipt.hosts, receipt.nodes))
    except OSError as error:
        warnings.warn(f"the trace could not be written to {request.options.trace}: {error}", stacklevel=3)
