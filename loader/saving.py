"""Saves a checkpoint from end to end: `save_checkpoint` writes what `load` restores, at any world size.

    arguments       request                each rank's arguments are checked, and compared over all ranks
    random states   rng                    every rank's, before anything else
    gather          state                  sharded tensors, one at a time, to rank 0; the others keep nothing of them
    write           writing.local          rank 0: the file and its manifest, summed on the way
                    writing.remote         the same, uploaded

A DeepSpeed engine writes its files itself, each rank its own (`_save_engine`):

    engine          engine.save_checkpoint into a tag of a temporary name, without ``latest``
    sums            writing.engine         every rank sums, and uploads, a share of the files
    manifest        stores.manifest        rank 0 writes ``SHA256SUMS``
    names, latest   writing.engine         the tag gets its name; ``latest`` comes last

Every stage ends in one agreement: all ranks go on, or all raise the same error. While collectives run, a
watchdog looks for a rank that died (`distributed.watchdog`).
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..distributed.channel import Channel
from ..distributed.session import Session, open_session
from ..distributed.watchdog import watched_collectives
from .errors import LayoutError, OptionError, TemplateError
from .opening import outages_of
from .options import LoadOptions
from .redaction import redact_path
from .request import LoadRequest, agree_on_arguments, check_same, settle_options
from .retries import Outages
from .rng import RngState, capture_rng, gather_states
from .sources.zero.model_states import OWN_KEYS
from .stages import Stages
from .state import PLAIN_PARTS, State, full_state_dict
from .stores.fsspec import FsspecStore
from .stores.local import LocalStore
from .stores.locate import LATEST, LATEST_LIMIT
from .stores.manifest import FOLDER_SUMS, manifest_of
from .stores.open import open_store
from .targets.deepspeed.ownership import engine_behind, is_part_of
from .template import expand_for_rank_zero, template_variables
from .torch_modes import default_modes
from .writing.engine import (
    Seen,
    deal_files,
    engine_bytes,
    list_files,
    remove_folder,
    remove_unfinished,
    take_name,
)
from .writing.local import (
    check_room,
    is_part_name,
    part_name,
    remove_parts,
    replace_file,
    replace_small,
    write_errors,
    write_small,
)
from .writing.remote import make_folder, remove_folders, upload_file
from .writing.summed import least_bytes, sum_file


def save_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    *,
    extra: Mapping[str, Any] | None = None,
    tag: str | None = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> str:
    """Saves `state`, every rank's random states and `extra` at `path`; `load` restores them, at any world size.

    Every rank of the job must call it, with the same arguments. What it promises of a save that is killed, and what
    not, is in ``docs/saving.md``.

    Args:
        path: a local path or an fsspec URI: of the file to write, which Composer, torch and `load` read, or with a
            DeepSpeed engine of the folder that has its tags. It may hold ``{run_name}``, and ``~`` is the home folder.
        state: what to save. FSDP2's shards are gathered into full tensors, one at a time, which rank 0 alone keeps. A
            DeepSpeed engine, by itself or by its module, saves itself, with its optimizer and scheduler.
        extra: further top-level entries, which a load returns as ``LoadResult.extra``: ``{"epoch": 3}``. Every rank
            passes the same keys; rank 0's values count.
        tag: with a DeepSpeed engine, the folder inside `path`; ``global_step<N>`` where not given.
        options: `LoadOptions`, or a mapping of its fields; ``storage_options`` and ``stall_timeout_s`` count.

    Returns:
        What was written, for `load`: the file, or the tag's folder.

    Raises:
        RankloadError: one of its subclasses, the same on every rank: `AccessError` where the path may not be written or
            its disk is full, `LayoutError` for parts that one file or DeepSpeed's folder cannot hold, `PeerError` where
            a rank died. The checkpoint before is as it was, perhaps without its manifest.
    """
    resolved, problem = settle_options(options)
    request = LoadRequest(path, state, resolved)  # type: ignore[arg-type]  # made text there
    with (
        default_modes(),
        open_session(stall_timeout_s=resolved.stall_timeout_s) as session,
        contextlib.ExitStack() as leaving,
    ):
        stages = Stages(session.channel)
        agree_on_arguments(request, problem, session, stages)
        with stages.stage("check"):
            save = _checked(request, extra, tag, stages, outages_of(session, resolved.stall_timeout_s))
            leaving.callback(save.store.close)
        session.channel.decide("same save", save.comparable(), check_same)
        rng = gather_states(session.channel, capture_rng())
        if save.engine is None:
            _save_state(state, save, rng, session, stages)
        else:
            _save_engine(save, rng, session, stages)
    return save.written


@dataclass(frozen=True)
class _Save:
    """One save, its arguments checked on this rank."""

    path: str = field(repr=False)
    """Without a template."""
    store: LocalStore | FsspecStore
    name: str
    """Of the file or the folder in `store`."""
    extra: Mapping[str, Any]
    engine: Any = None
    tag: str = ""
    """Of a DeepSpeed engine's folder."""

    @property
    def written(self) -> str:
        return posixpath.join(self.path, self.tag) if self.tag else self.path

    @property
    def described(self) -> str:
        return self.store.describe(self.name)

    def comparable(self) -> dict[str, str]:
        return {"extra's keys": ", ".join(sorted(self.extra)), "tag": self.tag}


def _checked(request: LoadRequest, extra: Any, tag: Any, stages: Stages, outages: Outages) -> _Save:
    """Raises as `save_checkpoint` where an argument does not fit; asks no store. `stages` hear how it answers later."""
    state = request.state
    if not isinstance(state, State):
        raise OptionError(
            f"state is a {type(state).__name__}: expected a rankload.State; what loads itself, saves itself too"
        )
    others = sorted(template_variables(request.path) - {"run_name"})
    if others:
        raise TemplateError(
            f"{redact_path(request.path)!r}: a save writes one checkpoint for all ranks, so that {{{others[0]}}} has "
            "no value; only {run_name} has",
            path=redact_path(request.path),
        )
    path = expand_for_rank_zero(request.path, run_name=request.run_name)
    store, name = open_store(path, None, request.options.storage_options, stages.heard, outages)
    if not isinstance(store, LocalStore | FsspecStore):
        raise OptionError(
            f"{redact_path(path)}: http(s) is not written to; pass a local path or an fsspec URI such as s3://"
        )
    engine = engine_behind(state.model, state.optimizers)
    if engine is None:
        if tag is not None:
            raise OptionError(
                "tag names a folder of a DeepSpeed engine, and this state has none: leave it out"
            )
        if not any(map(_is_set, vars(state).values())):
            raise OptionError("state has no part that could be saved: every field of it is empty")
        return _Save(path, store, name, _entries(extra, {"state", "rng"}))
    _refuse_parts(state, engine)
    return _Save(
        path, store, name.rstrip("/") or name, _entries(extra, OWN_KEYS | {"rng"}), engine, _tag(tag, engine)
    )


def _entries(extra: Any, taken: frozenset[str] | set[str]) -> Mapping[str, Any]:
    """`extra`, which can be pickled and fits beside the keys that are `taken`."""
    if extra is None:
        return {}
    if not isinstance(extra, Mapping) or not all(isinstance(key, str) for key in extra):
        raise OptionError(
            f"extra is a {type(extra).__name__}: expected a mapping of names to values, or None"
        )
    clash = sorted(taken & extra.keys())
    if clash:
        raise OptionError(
            f"extra has {clash[0]!r}, which the checkpoint has itself: give the entry another name"
        )
    nowhere: Any = _Nowhere()
    for key, value in extra.items():
        try:
            torch.save(value, nowhere)
        except Exception as error:
            raise OptionError(
                f"extra[{key!r}] cannot be saved ({type(error).__name__}: {error}): pass numbers, text, "
                "lists, dicts and tensors"
            ) from error
    return extra


class _Nowhere:
    def write(self, data: Any) -> int:
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Has nothing to do."""


def _tag(tag: Any, engine: Any) -> str:
    if tag is None:
        return f"global_step{engine.global_steps}"
    parts = tag.split("/") if isinstance(tag, str) else [""]
    if any(part in ("", ".", "..") for part in parts) or "\\" in tag or not tag.isprintable():
        raise OptionError(f"tag is {tag!r}: expected the name of a folder inside the path, such as 'step3'")
    if tag != tag.strip() or len(tag.encode()) > LATEST_LIMIT or tag == LATEST or is_part_name(tag):
        # A load could not find it by latest, or a save would take it for what a killed one left.
        raise OptionError(
            f"tag is {tag[:80]!r}: expected a name without blanks at its ends, of at most {LATEST_LIMIT:,} bytes, "
            f"which is not {LATEST!r} and does not end as temporary names do"
        )
    return str(tag)


def _refuse_parts(state: State, engine: Any) -> None:
    """Raises `LayoutError` for parts of which DeepSpeed's files keep nothing."""
    found = [
        f"optimizers ({type(one).__name__})" for one in state.optimizers if not is_part_of(engine, one)
    ] + [f"schedulers ({type(one).__name__})" for one in state.schedulers if one is not engine.lr_scheduler]
    found += [
        part
        for part in ("scaler", "algorithms", "callbacks", "timestamp", *PLAIN_PARTS)
        if part != "run_name" and _is_set(getattr(state, part))
    ]
    if found:
        raise LayoutError(
            f"the state has {', '.join(found)} beside a DeepSpeed engine, whose folder has no place for them: pass "
            "State(model=engine), and what is to be saved of them in extra, which a load returns as LoadResult.extra"
        )
    decoupled = getattr(getattr(engine, "checkpoint_engine", None), "is_decoupled", None)
    if callable(decoupled) and decoupled():
        raise LayoutError(
            f"the engine's {type(engine.checkpoint_engine).__name__} still writes when engine.save_checkpoint returns, "
            "so that the files cannot be summed: take 'checkpoint_engine' and 'nebula' out of its configuration"
        )


def _is_set(part: Any) -> bool:
    return part is not None and not (isinstance(part, list) and not part)


def _save_state(state: State, save: _Save, rng: list[RngState], session: Session, stages: Stages) -> None:
    channel, writes = session.channel, session.topology.rank == 0
    with (
        stages.stage("gather"),
        watched_collectives(channel, f"the gathering of shards for {save.described}"),
    ):
        parts = full_state_dict(state, channel, keep=writes)
    with stages.stage("write"):
        if not writes:
            return
        whole = {"state": parts, "rng": rng, **save.extra}

        def write(file: Any) -> None:
            torch.save(whole, file)

        needed = least_bytes(whole)
        if isinstance(save.store, LocalStore):
            replace_file(save.name, write, needed_bytes=needed, on_bytes=stages.count)
        else:
            upload_file(save.store, save.name, write, needed_bytes=needed, on_bytes=stages.count)


def _save_engine(save: _Save, rng: list[RngState], session: Session, stages: Stages) -> None:
    channel, store, rank = session.channel, save.store, session.topology.rank
    with _folder_of_node(save, session, stages) as folder:
        part_tag = channel.decide("tag", None, lambda _: part_name(save.tag))
        part = os.path.join(folder, part_tag)
        try:
            _write_engine(save, folder, part_tag, rng, channel, stages)
            mine = _deal(part, channel, stages)
            target = store.join(save.name, save.tag)
            if isinstance(store, FsspecStore):
                with stages.stage("old manifest"):
                    if rank == 0:
                        store.remove(store.join(target, FOLDER_SUMS))
            with stages.stage("sums"):
                sums = _sum_files(save, part, mine, stages)
            sums_of_ranks = channel.gather("sums of ranks", sums)
            with stages.stage("manifest"):
                if rank == 0:
                    _write_manifest(save, part, sums_of_ranks)
            if isinstance(store, LocalStore):
                with stages.stage("manifests"):
                    if session.topology.local_rank == 0 and rank != 0:
                        _write_own_manifest(save, part, sums_of_ranks, session)
                # Nodes with disks of their own each rename their own folder; elsewhere rank 0 has renamed the one.
                for first in (rank == 0, rank != 0 and session.topology.local_rank == 0):
                    with stages.stage("names"), write_errors(target):
                        if first and os.path.isdir(part):
                            take_name(part, target)
            with stages.stage("latest"):
                if rank == 0:
                    _write_latest(save)
        except BaseException:
            if session.topology.local_rank == 0:
                remove_folder(part)
            raise


@contextlib.contextmanager
def _folder_of_node(save: _Save, session: Session, stages: Stages) -> Iterator[str]:
    """The folder on this node that the engine saves into: the one of the path, or a temporary one to upload from."""
    channel, topology, store = session.channel, session.topology, save.store
    ranks = topology.ranks_by_node[topology.node_rank]
    first = topology.rank == ranks[0]
    needed = channel.gather("bytes", engine_bytes(save.engine))
    needed_here = sum(needed[rank] for rank in ranks)
    if isinstance(store, LocalStore):
        with stages.stage("folder"), write_errors(save.described):
            if first:
                os.makedirs(save.name, exist_ok=True)
                remove_unfinished(os.path.dirname(os.path.join(save.name, save.tag)))
                remove_parts(save.name, (LATEST,))
                check_room(save.name, needed_here, save.described)
        yield save.name
        return
    made = ""
    try:
        with stages.stage("clean"):
            # Before any is made: two nodes may be one machine.
            if first:
                remove_folders(save.described)
        with stages.stage("folder"):
            if first:
                made = make_folder(save.described, needed_here)
        yield str(channel.gather("folders", made)[ranks[0]])
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def _write_engine(
    save: _Save, folder: str, part_tag: str, rng: list[RngState], channel: Channel, stages: Stages
) -> None:
    """Has the engine write its files. DeepSpeed's collectives wait for a rank that failed for ever."""
    with (
        stages.stage("engine"),
        watched_collectives(channel, f"DeepSpeed's collectives of the save of {save.described}"),
        write_errors(save.described),
    ):
        save.engine.save_checkpoint(
            folder, part_tag, client_state={"rng": rng, **save.extra}, save_latest=False
        )


def _deal(part: str, channel: Channel, stages: Stages) -> list[str]:
    """The files that this rank sums."""
    with stages.stage("list"), write_errors(part):
        found = list_files(part)

    def deal(seen: list[Seen]) -> list[list[str]]:
        if not any(seen):
            raise LayoutError(f"engine.save_checkpoint wrote no file to {part}", path=part)
        return deal_files(seen)

    return list(channel.deal("files", found, deal))


def _sum_files(save: _Save, part: str, names: list[str], stages: Stages) -> dict[str, str]:
    """Sums, and uploads where the path is remote, this rank's share of the files."""
    sums, store = {}, save.store
    for name in names:
        path = os.path.join(part, name)
        with write_errors(path):
            sums[name] = sum_file(path, stages.count)
        if isinstance(store, FsspecStore):
            store.upload(path, store.join(save.name, f"{save.tag}/{name}"), stages.count)
    return sums


def _write_manifest(save: _Save, part: str, sums: list[dict[str, str]]) -> None:
    data = manifest_of({name: value for one in sums for name, value in one.items()})
    if isinstance(save.store, FsspecStore):
        save.store.write_small(save.store.join(save.name, f"{save.tag}/{FOLDER_SUMS}"), data)
        return
    with write_errors(part):
        write_small(os.path.join(part, FOLDER_SUMS), data)


def _write_own_manifest(save: _Save, part: str, sums: list[dict[str, str]], session: Session) -> None:
    """On a node with a disk of its own: the manifest of the files there, by which the next save knows a whole folder.

    Where nodes share the folder, rank 0 has written it.
    """
    topology = session.topology
    if os.path.isdir(part) and not os.path.exists(os.path.join(part, FOLDER_SUMS)):
        _write_manifest(save, part, [sums[rank] for rank in topology.ranks_by_node[topology.node_rank]])


def _write_latest(save: _Save) -> None:
    latest, data = save.store.join(save.name, LATEST), save.tag.encode()
    if isinstance(save.store, FsspecStore):
        save.store.write_small(latest, data)
        return
    with write_errors(latest):
        replace_small(latest, data)
