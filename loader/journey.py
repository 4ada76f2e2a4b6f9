"""Runs a load from end to end: `load` is the way of a checkpoint, from its path to the receipt, on one page.

    arguments      request                 each rank's arguments are checked, and compared over all ranks
    path           opening.open_files      the path is located and its first file fetched: `CheckpointFiles`
    target         targets.choose          what the job's state is; it says what it needs: `Demand`
    source         sources.kinds           the kind of checkpoint; its files are fetched and read: `Saved`
    ignore         _leave_out              what ``leave_out`` and ``ignore_keys`` name is taken out of it
    check          _check                  types, names, shapes and dtypes; the restore is planned: `Plan`
    agree          targets.deepspeed, verify, fetch
                                           which rank provides which weights, sums which bytes, fetches which ranges
    restore        targets.base.carry_out  FIRST CHANGE (`Changes.note`): bytes are copied into place, while others are
                                           still fetched
    weights        targets.deepspeed       weights that ranks share come to each node once
    checksums      verify.checks           what was summed is compared (with ``verify="before"``: before the restore);
                                           what came damaged is fetched, and restored, once more
    finish         Plan.finish             what DeepSpeed does on all ranks at the end
    rng            _complete_rng           one random state for each rank; returned, not applied
    receipt        _report, join_reports   every rank's report is joined to one `Receipt`; all ranks restored the same
                                           batch count

What fails on one rank is raised on all: at once where a stage ends in an agreement, else by the next one, since a stage
that needs no word of other ranks waits for none. ``agree`` is such an agreement, after all checks and before the first
change. Nothing that the user owns is changed before ``restore``, and a failure before any rank's first change is an
ordinary error (`changes`). What a stage hands on is a value that can be printed; what the stages work with is in
`context.LoadContext`.

One file: the stages are read in their order, each as a short function.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..distributed.printable import warn
from ..distributed.session import Session, open_session
from ..distributed.watchdog import watched_collectives
from .candidates.found import FoundCheckpoint
from .changes import partial_once_changed
from .collector import without_collector
from .errors import OptionError, TimestampError
from .fetch.checkpoint_files import CheckpointFiles
from .fetch.parts import (
    Coming,
    early_parts,
    fetch_storages,
    fetching,
    files_reader,
    restore_parts,
)
from .fetch.rounds import fetch_now
from .fetch.whole_checks import NOTHING
from .materialize.objects import materialize
from .materialize.safe_types import SafeTypes, require_safe
from .materialize.tensors import TensorReader
from .opening import open_files, other_ranks_files
from .options import LoadOptions
from .plurals import counted
from .receipt import (
    FileReport,
    RankReport,
    Receipt,
    join_reports,
    log_receipt,
    trace_events,
    write_trace,
)
from .request import LoadRequest, agree_on_arguments, settle_options
from .right_indexes import RENEWED, with_right_indexes
from .rng import RngState, check_state, complete_states, decode_each, encode_own, normal_form
from .saved.contents import Saved
from .saved.copies import StorageReads, reads_of
from .saved.ignore import Ignored, IgnoreKeys, ignore, unmatched_glob
from .saved.names import unused_renames
from .saved.tensor import StorageRef
from .saved.tree import find_unknown, storages, tensors
from .sources.kinds import open_saved
from .stages import Stages
from .state import AlgorithmPass
from .targets.base import Plan, RestoreOptions, Target, Work, carry_out, carry_out_again
from .targets.choose import target_of
from .targets.deepspeed.shared_weights import Sharing, plan_weights, share_weights
from .torch_modes import default_modes
from .verify.checks import Checking, deal_checks, verify_after, verify_before
from .wire import decode, encode

_SMALL_EXTRA_BYTES = 64 << 10
"""How many bytes of tensors an entry of `LoadResult.extra` has at most, where the caller wants the weights alone."""


@dataclass(frozen=True)
class LoadResult:
    """What a load returns.

    Attributes:
        rng_states: one entry for each rank of this world, for `restore_rng`; None with ``load_weights_only``, when the
            checkpoint has none, or when ``rng`` is ignored.
        receipt: what was restored, from which bytes, and what was not; the same on every rank.
        extra: top-level entries of the checkpoint that are no part of `State`, as real values: a hand-written file's
            ``epoch``, DeepSpeed's ``client_state``. What cannot be made real there stays a description: an object of a
            type that is neither known nor in ``safe_types`` is an ``InertObject`` with its ``global_name`` and fields.
            With ``load_weights_only`` those that cost nothing beside the weights: counters, versions, settings; no
            entry with more than 64 KiB of tensors or with a type that ``safe_types`` would have to allow.
        step: the steps that were done when the checkpoint was saved: Composer's ``timestamp.batch``, DeepSpeed's
            ``global_steps``, Trainer's and torchtitan's counters, or an entry ``global_step``, ``step`` or
            ``iteration``. None where the checkpoint does not say, or says two things.
        batch_size: samples of one step over all ranks when it was saved, where the checkpoint says so: DeepSpeed's.
        passed_over: what `autoresume` did not take, each with its reason; none of a `load`.
        epoch: in the same way ``timestamp.epoch``, or an entry ``epoch``, as whoever saved it counts them.

    ``print`` shows the receipt.
    """

    rng_states: list[RngState] | None
    receipt: Receipt
    extra: dict[str, Any]
    step: int | None = None
    epoch: int | None = None
    batch_size: int | None = None
    passed_over: tuple[FoundCheckpoint, ...] = ()

    def __str__(self) -> str:
        return str(self.receipt)


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
    the same arguments (``interface`` and the ``cache_`` options may differ).

    Args:
        path: a local path, an http(s) URL, any fsspec URI, or an object's name in `object_store`. It may hold
            ``{rank}``, ``{local_rank}``, ``{node_rank}`` and ``{run_name}`` (or ``<rank>`` and so on). A folder that
            DeepSpeed saved is named by itself, or by one of its tags; a model in several files by their folder, or by
            their index. ``~`` is the home folder.
        state: a `State`, or an object that loads itself as Composer's ``State`` does.
        logger: a ``logging.Logger``, or an object with ``log_metrics`` or ``log_hyperparameters``, which rank 0 gives
            the receipt. None: the logger named ``rankload``.
        object_store: the store that `path` names an object of: an fsspec file system, an object with
            ``download_object``, or one with ``download_file``. None: the store that `path` itself names.
        load_weights_only: restore the model's weights and buffers, and nothing else.
        strict_model_weights: whether missing and unexpected names are an error, in every part of a full load: a weight,
            but also an optimizer, scheduler, scaler or callback of `state` that the checkpoint lacks. With False they
            are in the receipt, with a warning of each such object. Wrong shapes are always an error.
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

    Every rank of the job must call it, with the same arguments (``interface`` and the ``cache_`` options may differ).
    It may be called under ``torch.inference_mode()``, a default device, autocast and the like: it runs outside of them.
    Meta tensors of the model get memory on the caller's default device.

    Args:
        path: a local path, an http(s) URL, any fsspec URI, or an object's name in `object_store`. It may hold
            ``{rank}``, ``{local_rank}``, ``{node_rank}`` and ``{run_name}`` (or ``<rank>`` and so on). A folder that
            DeepSpeed saved is named by itself, or by one of its tags; a model in several files by their folder, or by
            their index. ``~`` is the home folder.
        state: a `State`, or an object that loads itself as Composer's ``State`` does.
        logger: a ``logging.Logger``, or an object with ``log_metrics`` or ``log_hyperparameters``, which rank 0 gives
            the receipt. None: the logger named ``rankload``.
        object_store: the store that `path` names an object of: an fsspec file system, an object with
            ``download_object``, or one with ``download_file``. None: the store that `path` itself names.
        load_weights_only: restore the model's weights and buffers, and nothing else.
        strict_model_weights: whether missing and unexpected names are an error, in every part of a full load: a weight,
            but also an optimizer, scheduler, scaler or callback of `state` that the checkpoint lacks. With False they
            are in the receipt, with a warning of each such object. Wrong shapes are always an error.
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
    resolved, problem = settle_options(options)
    request = LoadRequest(
        path,  # type: ignore[arg-type]  # made text there, or refused by `check_arguments`
        state,
        resolved,
        logger=logger,
        object_store=object_store,
        weights_only=load_weights_only,
        strict=strict_model_weights,
        progress_bar=progress_bar,
        ignore_keys=ignore_keys,
        exclude_algorithms=exclude_algorithms,
        algorithm_passes=algorithm_passes,
    )
    with without_collector():
        # What the load made is gone when the collector comes back, which would visit each of it.
        return with_right_indexes(request, partial(_load, problem=problem))


def _load(request: LoadRequest, problem: OptionError | None) -> LoadResult:
    """As `load`, for arguments that were found to be a `problem` or none. Every rank must call."""
    verify = request.options.verify
    with (
        default_modes(),
        partial_once_changed() as restoring,
        open_session(stall_timeout_s=request.options.stall_timeout_s) as session,
        contextlib.ExitStack() as leaving,
    ):
        stages = Stages(session.channel)
        may_have_engines = agree_on_arguments(request, problem, session, stages)
        files = open_files(request, session, stages, leaving)
        restore = _restore_options(request, files)
        with stages.announced("target"):
            target = target_of(request.state, restore)
            demand = target.demand(session.topology.rank, session.topology.world_size)
        saved = open_saved(files, demand)
        not_read = other_ranks_files(request, files, saved)
        if not_read is not None:
            saved = replace(saved, notes=(*saved.notes, not_read))
            if session.topology.rank == 0:
                warn(not_read, stacklevel=4)
        if request.renew_indexes:
            saved = replace(saved, notes=(*saved.notes, RENEWED))
        saved, ignored = _leave_out(request, saved, stages)
        rng = None if request.weights_only else saved.rng
        early = early_parts(replace(saved, rng=rng, extra=_extra(request, saved)))
        fetch_now(files.context, files.remote, early, "fetch early parts")
        reader = files_reader(files, verify)
        checked = _check(request, files, target, saved, ignored, reader)
        from_store = not files.context.store.is_local
        sharing = Sharing(
            session,
            stages,
            reader,
            files.name,
            verify,
            files.name_at,
            session.channel.changes.note,
            from_store,
        )
        # Only engines share weights: without any, no rank waits for what others would share.
        plan, weights = plan_weights(checked.plan, sharing) if may_have_engines else (checked.plan, None)
        unplanned = (
            storages([saved.state, saved.masters, saved.unnamed_masters]) if plan.rest is not None else []
        )
        reads = checked.reads if plan is checked.plan else reads_of(plan.copies)
        from_peers = from_store and files.context.options.mode == "job"
        checking = Checking(session, stages, reader, from_store, from_peers)
        checks = deal_checks(checking, reads, files.name_at, verify=verify, direct=files.context.direct)
        shared = weights.reads if weights is not None else {}
        parts = restore_parts(files, reads, checks.shares, checks.alone, shared, unplanned)
        if verify == "before":
            fetch_now(files.context, files.remote, parts.wanted, "fetch parts")
        verify_before(checks, checking, unplanned)
        with fetching(files, reader, parts, "fetch parts") as coming:
            coming.before_change()
            restoring.begins(session.channel, files.name)
            restored, work = _restore(plan, reader, restore, stages, coming, summed=verify == "during")
            notes = share_weights(weights, sharing, lambda wanted: fetch_storages(files, wanted))
            coming.settle()
            verify_after(
                checks, checking, partial(coming.again, partial(carry_out_again, work)), files.renewed
            )
        done = work.carried_out
        _finish(plan, files.name, stages)
        rng_states, derived = _complete_rng(request, saved, checked.rng, session, stages)
        report = _report(files, done, ignored, restored, derived, notes)
        # Before the ranks part: the last one that uses a cache folder removes it.
        about = _about(request, files, saved, done)
        everybody = session.channel.gather("receipt", [encode(report), _batch_of(request.state)])
        _compare_timestamps([batch for _, batch in everybody])
        receipt = join_reports([decode(RankReport, one) for one, _ in everybody], about)
    if session.topology.rank == 0:
        try:
            log_receipt(receipt, request.logger)
        except Exception as error:
            # All ranks have restored: a tracker that is down is no reason for one of them to fail alone.
            warn(f"the logger refused the receipt ({type(error).__name__}: {error})", stacklevel=4)
        _write_trace(request, receipt)
    step = saved.step_with(checked.extra)
    return LoadResult(rng_states, receipt, checked.extra, step, saved.epoch, saved.batch_size)


def _restore_options(request: LoadRequest, files: CheckpointFiles) -> RestoreOptions:
    return RestoreOptions(
        weights_only=request.weights_only,
        strict=request.strict,
        rename=request.options.rename,
        allow_missing_frozen=request.options.allow_missing_frozen,
        layout=request.options.layout,
        leave_out=frozenset(request.options.leave_out),
        exclude_algorithms=request.exclude_algorithms,
        algorithm_passes=request.algorithm_passes,
        logger=request.logger,
        hyperparameters=request.options.hyperparameters,
        safe_types=request.options.safe_types,
        file=files.name,
        comes_in_parts=files.remote.known.__contains__,
    )


def _leave_out(request: LoadRequest, saved: Saved, stages: Stages) -> tuple[Saved, Ignored]:
    """The checkpoint without what ``leave_out`` and ``ignore_keys`` name; warns of globs that match nothing."""
    with stages.announced("ignore"):
        tree = saved.as_tree()
        ignored = ignore(tree, request.ignore_keys)
        for glob in ignored.unmatched:
            warn(unmatched_glob(tree, glob, saved.name), stacklevel=5)
        kept, left_out = saved.with_tree(ignored.tree), request.options.leave_out
        paths = (*saved.paths_of(left_out), *ignored.paths)
        return kept.without(left_out), replace(ignored, paths=tuple(dict.fromkeys(paths)))


def _extra(request: LoadRequest, saved: Saved) -> dict[str, Any]:
    """The top-level entries of `saved` that `LoadResult.extra` gets.

    With ``load_weights_only`` those that cost nothing beside the weights: no tensors but small ones in files that were
    read, and no type that would have to be allowed, since the caller wants the weights and cannot be refused for
    anything else.
    """
    if not request.weights_only:
        return saved.extra
    allowed = SafeTypes(request.options.safe_types)
    return {
        key: value
        for key, value in saved.extra.items()
        if sum(storage.nbytes for storage in storages(value)) <= _SMALL_EXTRA_BYTES
        and all(isinstance(one.storage, StorageRef) for _, tensor in tensors(value) for one in tensor.pieces)
        and all(name in allowed for _, name in find_unknown(value))
    }


@dataclass(frozen=True)
class _Checked:
    """A load in which everything fits, before its first change."""

    plan: Plan
    reads: dict[StorageRef, StorageReads]
    """What the plan's copies read."""
    rng: list[RngState | None] | None
    """By saved rank, None at those that were ignored; None as a whole where the checkpoint has none, or with
    ``load_weights_only``."""
    extra: dict[str, Any]
    """Top-level entries that are no part of a `State`, as real values; with ``load_weights_only`` the cheap ones."""


def _check(
    request: LoadRequest,
    files: CheckpointFiles,
    target: Target,
    saved: Saved,
    ignored: Ignored,
    reader: TensorReader,
) -> _Checked:
    """Compares what will be restored with where it goes, and plans the restore; changes nothing that the user owns.

    Every rank must call. Raises, on all ranks alike, `UnsafeError` for a type that is neither known nor in
    ``safe_types``, `MismatchError` with every name, shape and dtype that does not fit, `FormatError` for a random state
    that no generator takes, and `LayoutError`, `CorruptError` or `OptionError` where planning or reading raises them.
    """
    safe_types = request.options.safe_types
    with files.context.stages.announced("check"):
        with files.suspected():
            plan = target.plan(saved)
            _refuse_unknown(plan, saved, request, files)
            plan.mismatch.raise_if_any(
                saved.name,
                strict=request.strict,
                allow_missing_frozen=request.options.allow_missing_frozen,
            )
        _warn_of_names(request, saved, plan)
        reads = reads_of(plan.copies)
        rng: list[RngState | None] | None = None
        if not request.weights_only and saved.rng is not None:
            rng, lost = _random_states(saved, ignored, reader, safe_types)
            plan = plan.joined(Plan(not_restored=lost))
            if lost and (saved.rng_per_rank or files.context.session.topology.rank == 0):
                warn(f"{saved.name}: random states that are not restored: {'; '.join(lost)}", stacklevel=5)
        extra = materialize(
            _extra(request, saved), reader=reader, safe_types=safe_types, file=saved.name, keep_unknown=True
        )
    return _Checked(plan, reads, rng, extra)


def _warn_of_names(request: LoadRequest, saved: Saved, plan: Plan) -> None:
    """Warns of entries of ``rename`` that fit no name, and of names that one more entry would make fit."""
    model = saved.whole.state.get("model")
    names = [name for name in model if isinstance(name, str)] if isinstance(model, Mapping) else []
    for key in unused_renames(names, request.options.rename):
        hint = "" if key.endswith(".") else f"; a prefix ends with a dot: {key + '.'!r}"
        warn(f"rename: {key!r} fits no name of the model in {saved.name}{hint}", stacklevel=6)
    for sentence in plan.mismatch.advice:
        warn(
            f"{saved.name} lacks {counted(len(plan.mismatch.missing), 'name')} of the model, and holds "
            f"{counted(len(plan.mismatch.unexpected), 'unexpected one')}. {sentence}",
            stacklevel=6,
        )


def _random_states(
    saved: Saved, ignored: Ignored, reader: TensorReader, safe_types: Sequence[str | type]
) -> tuple[list[RngState | None], tuple[str, ...]]:
    """The checked random states by saved rank, None where ignored or none is left, and what no generator here takes.

    Their lengths and positions are compared before any of them is read. Raises `FormatError` as `check_state`.
    """
    entries = list(saved.rng or ())
    for rank in _ignored_ranks(ignored):
        entries.insert(rank, None)
    places = [f"{saved.name}: rng/{rank}" for rank in range(len(entries))]
    forms = [
        ({}, ()) if entry is None else normal_form(entry, place)
        for entry, place in zip(entries, places, strict=True)
    ]
    real = materialize(
        [form for form, _ in forms], reader=reader, path="rng", safe_types=safe_types, file=saved.name
    )
    states = [check_state(state, place)[0] or None for state, place in zip(real, places, strict=True)]
    begin = f"{saved.name}: "
    return states, tuple(reason.removeprefix(begin) for _, left in forms for reason in left)


def _ignored_ranks(ignored: Ignored) -> list[int]:
    """The ranks whose random states were taken out of the list, which shifted those that follow."""
    found = (path.removeprefix("rng/") for path in ignored.paths if path.startswith("rng/"))
    return sorted(int(position) for position in found if position.isdigit())


def _refuse_unknown(plan: Plan, saved: Saved, request: LoadRequest, files: CheckpointFiles) -> None:
    """Raises as `require_safe` for what `plan` makes real. Parts that the job has no place for may hold anything."""
    trees = dict(plan.trees)
    if plan.rest is not None:
        # What algorithms bring is planned after the first change, which would be too late to refuse it.
        trees.update(
            {"state/model": saved.state.get("model")} if request.weights_only else {"state": saved.state}
        )
    file = files.file_of(list(trees.values()))
    require_safe(trees, safe_types=request.options.safe_types, file=file)


def _restore(
    plan: Plan,
    reader: TensorReader,
    options: RestoreOptions,
    stages: Stages,
    coming: Coming,
    *,
    summed: bool,
) -> tuple[list[str], Work]:
    """Carries out `plan`, which reads what is `coming`; the first change is here. `summed`: by ``verify="during"``.

    Returns what was restored, as the receipt names it, and what it was done with, which knows all that was planned:
    algorithms bring more.
    """
    with (
        # What was summed is compared by all ranks together, next.
        stages.announced("restore") if summed else stages.stage("restore"),
        # What the user's objects do in their own load_state_dict is not known here: they may wait for other ranks.
        watched_collectives(
            stages.channel,
            f"collectives that an object's own loading runs, in the load of {options.file}",
            anywhere=False,
        ),
    ):
        work = Work(reader, options, stages.channel.changes.note)
        restored = carry_out(plan, work)
        # Others of this node may still read: where this rank fetches for them, its failure must not wait for them.
        coming.fetched()
        return restored, work


def _finish(plan: Plan, name: str, stages: Stages) -> None:
    """Runs what all ranks do together at the end, once the restore has succeeded on every rank."""
    if plan.finish is None:
        return
    with (
        stages.stage("finish"),
        watched_collectives(stages.channel, f"DeepSpeed's collectives at the end of the load of {name}"),
    ):
        plan.finish()


def _compare_timestamps(batches: Sequence[int | None]) -> None:
    """Raises `TimestampError` unless all ranks have the same batch count, or none: `batches`, the same on all ranks."""
    known = [batch for batch in batches if batch is not None]
    if known and (min(known) != max(known) or len(known) != len(batches)):
        listed = ", ".join(f"rank {rank}: {batch}" for rank, batch in list(enumerate(batches))[:16])
        raise TimestampError(
            f"timestamp.batch differs between ranks after the restore ({listed}): they did not load the same "
            "checkpoint"
        )


def _batch_of(state: Any) -> int | None:
    """A state's batch count: Composer's ``timestamp.batch.value``, or a plain dict's ``batch``; None without one."""
    timestamp = getattr(state, "timestamp", None)
    batch = timestamp.get("batch") if isinstance(timestamp, Mapping) else getattr(timestamp, "batch", None)
    batch = getattr(batch, "value", batch)
    return int(batch) if isinstance(batch, int) else None


def _complete_rng(
    request: LoadRequest,
    saved: Saved,
    states: list[RngState | None] | None,
    session: Session,
    stages: Stages,
) -> tuple[list[RngState] | None, tuple[str, ...]]:
    """One random state for each rank of this world, and which of them were derived; None where there are none saved."""
    with stages.timed("rng"):
        if saved.rng_per_rank and not request.weights_only:
            # The file that this rank read has one saved rank's state, or all ranks' where the saving job gathered them.
            own = encode_own(states, session.topology.rank, single=saved.own_rng)
            states = decode_each(session.channel.gather_bytes("rng", own))
    if not states:
        return None, ()
    complete, derived = complete_states(states, session.topology.world_size, saved.rank_zero_seed)
    if not complete:
        return None, ()
    if derived and session.topology.rank == 0:
        warn(
            f"{saved.name} has RNG states of {counted(len(states) - states.count(None), 'rank')}, this world has "
            f"{session.topology.world_size}; derived: {', '.join(derived)}",
            stacklevel=5,
        )
    return complete, derived


def _report(
    files: CheckpointFiles,
    plan: Plan,
    ignored: Ignored,
    restored: list[str],
    derived: tuple[str, ...],
    notes: Sequence[str],
) -> RankReport:
    """What this rank did; `notes` are those of weights that came to its node once."""
    context, remote = files.context, files.remote
    return RankReport(
        node=context.session.topology.node_rank,
        host=context.session.channel.host,
        restored=tuple(restored),
        ignored=ignored.paths,
        missing=tuple(plan.mismatch.missing),
        unexpected=tuple(plan.mismatch.unexpected),
        derived=(*derived, *(f"{name} (zeros)" for name in plan.reset)),
        not_restored=plan.not_restored,
        renamed=plan.renamed,
        cast=plan.cast,
        notes=tuple(notes),
        streamed=tuple(remote.streamed),
        fetched_in_parts=remote.fetched_by_path(),
        timings=tuple(context.stages.timings),
        fetched_again=tuple(remote.fetched_again),
        cache_notes=context.cache.notes,
        files=tuple(_file_reports(files)),
        waits=context.store.outages.waits(),
    )


def _file_reports(files: CheckpointFiles) -> Iterator[FileReport]:
    """What this rank knows of each file that it used, and which checksums it compared with."""
    remote = files.remote
    for file in files.fetched:
        inside = f"{file.source}:"
        read = [
            index.verifiable
            for index in files.indexes
            if index.name == file.source or index.name.startswith(inside)
        ]
        by_records = bool(read) and all(read)
        whole = remote.compared(file.path) or NOTHING
        yield FileReport(
            file.source,
            file.path,
            max(0, file.size_bytes),
            file.fetched_bytes,
            remote.known.own_bytes(file.path),
            by_records or bool(file.compared_by),
            (*(("zip CRC-32",) * by_records), *file.compared_by, *whole.by),
            (*file.left_out, *whole.left_out),
        )


def _about(request: LoadRequest, files: CheckpointFiles, saved: Saved, plan: Plan) -> Receipt:
    """The receipt's fields that every rank knows."""
    topology = files.context.session.topology
    return Receipt(
        path=saved.name,
        kind=saved.kind,
        layout=saved.layout,
        saved_world_size=saved.world_size,
        world_size=topology.world_size,
        n_nodes=topology.n_nodes,
        weights_only=request.weights_only,
        verify=request.options.verify,
        cache_dir=files.cache_dir,
        notes=(*files.remote.checks.notes, *saved.notes, *plan.notes),
    )


def _write_trace(request: LoadRequest, receipt: Receipt) -> None:
    if request.options.trace is None:
        return
    try:
        write_trace(request.options.trace, trace_events(receipt.stages, receipt.hosts, receipt.nodes))
    except OSError as error:
        warn(f"the trace could not be written to {request.options.trace}: {error}", stacklevel=5)
