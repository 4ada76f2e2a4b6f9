"""Compares a checkpoint with all checksums that there are of it: `check_whole`, from its path to the result."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..alone import EVERYTHING, OUTLINE, OpenCheckpoint, open_alone
from ..collector import collect_young
from ..completeness import Fault, ask_all, faults_of, listed_files, reason_of, stat_surely
from ..errors import (
    CorruptError,
    FormatError,
    LayoutError,
    NotFoundError,
    OptionError,
    UnsafeError,
)
from ..fetch.whole_checks import WholeChecks
from ..http.connections import Connections
from ..options import LoadOptions, Options, resolve_options
from ..request import as_path
from ..retries import Outages
from ..stores.base import ONE_CONNECTION, Store
from ..stores.locate import locate
from ..stores.manifest import key_of
from ..stores.open import open_store
from ..template import expand_for_rank_zero
from ..workers import Stop, run_jobs
from .manifests import require_writable, write_manifests
from .reading import INDEX_ERRORS, TOO_LARGE, FilePlan, bytes_of, compare
from .subset import Subset, choose, parse_subset
from .units import Item, contents_of, items_of
from .values import FileVerdict, Wholeness

FILES_AT_ONCE = 4
"""How many files are read at a time."""
_SEEDS = 1 << 31


@dataclass(frozen=True)
class Watch:
    """Hears how far it is. May be called from several threads; what it raises ends the work."""

    begin: Callable[[int, int], None] = lambda nbytes, n_files: None
    """With how many bytes will be read, of how many files."""
    on_bytes: Callable[[int], None] = lambda nbytes: None
    on_file: Callable[[FileVerdict], None] = lambda verdict: None


def check_whole(
    path: str | os.PathLike[str],
    *,
    subset: str | None = None,
    seed: int | None = None,
    write_manifest: bool = False,
    object_store: Any = None,
    options: Options | LoadOptions | Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Wholeness:
    """Tells whether the checkpoint at `path` is complete, and whether its bytes are those that were written.

    Every file is asked for, its index read, and its bytes compared with each checksum that is known of them. Files of
    a remote store are read in ranges and not kept. Memory stays below 300 MB; so does the disk, where the store gives
    whole objects only.

    Args:
        path: as `load` takes it.
        subset: ``5%`` (a random share of the bytes), ``10GB`` (so many, at random) or ``2/7`` (the second of seven
            equal parts, which together are all); None compares all. Checksums of whole files are compared with those
            alone that have no others.
        seed: of a random subset; None takes one at random, which the result says.
        write_manifest: whether manifests with SHA-256s are written beside the checkpoint, once all of it was compared
            and nothing was wrong.
        object_store: as `load` takes it.
        options: `LoadOptions`, or a mapping of its fields.
        watch: hears how far it is.

    Raises:
        RankloadError: `NotFoundError` where there is no checkpoint, `AccessError` where the store refuses or fails,
            `OptionError` for a subset that is none, or where no manifest can be written. What is wrong with the
            checkpoint is in the result, and not raised.
    """
    wanted = None if subset is None else parse_subset(subset)
    if wanted is not None and write_manifest:
        raise OptionError("a manifest is of all bytes: leave out either the subset or the manifest")
    if wanted is not None and wanted.is_random and seed is None:
        seed = random.SystemRandom().randrange(_SEEDS)
    resolved = options if isinstance(options, Options) else resolve_options(options)
    # Manifests are looked for, but nothing is summed while the checkpoint is opened.
    resolved = replace(resolved, verify="during", mode="node")
    asked = _Asked(as_path(path), object_store, resolved, wanted, seed, write_manifest, watch or Watch())
    try:
        with open_alone(path, OUTLINE, object_store=object_store, options=resolved) as opened:
            if write_manifest:
                require_writable(opened.files.context.store, opened.saved.name)
            found = _checked(asked, opened)
    except (CorruptError, NotFoundError, UnsafeError) as error:
        if isinstance(error, NotFoundError):
            _require_located(asked)
        shown = error.path or asked.path
        state = "missing" if isinstance(error, NotFoundError) else "damaged"
        reason = reason_of(error, shown)
        note = "the checkpoint could not be opened, so its other files were not looked at"
        broken = FileVerdict(shown, state, reason=reason)  # type: ignore[arg-type]
        return Wholeness(shown, None, None, None, (broken,), notes=(note,), subset=subset, seed=seed)
    return found


@dataclass(frozen=True)
class _Asked:
    path: str = field(repr=False)
    object_store: Any
    options: Options
    subset: Subset | None
    seed: int | None
    write_manifest: bool
    watch: Watch


def _require_located(asked: _Asked) -> None:
    """Raises `NotFoundError` where there is no checkpoint at the path, rather than one that lacks a file."""
    first = expand_for_rank_zero(asked.path, run_name=None)
    outages = Outages(asked.options.stall_timeout_s)
    store, name = open_store(first, asked.object_store, asked.options.storage_options, outages=outages)
    with contextlib.closing(store):
        locate(store, name)


def _checked(asked: _Asked, opened: OpenCheckpoint) -> Wholeness:
    files, saved = opened.files, opened.saved
    store = files.context.store
    faults = {one.file: one for one in faults_of(opened)}
    names = [files.object_of(one) for one in saved.files]
    known = {key_of(store, name) for name in names}
    names += [name for name in listed_files(opened) if key_of(store, name) not in known]
    items = {store.join(files.located.name, name): found for name, found in items_of(files).items()}
    with contextlib.closing(Connections()) as connections:
        examine = _Examination(asked, store, files.remote.checks, connections, items)
        looked_at = ask_all(
            store,
            lambda name: examine.plan(name, faults.get(store.describe(name))),
            list(dict.fromkeys(names)),
        )
        plans = [one for one in looked_at if isinstance(one, FilePlan)]
        total = sum(_units_bytes(one) for one in plans)
        plans = _choose(plans, asked)
        verdicts = dict(zip([one.shown for one in plans], examine.run(plans), strict=True))
    told = tuple(verdicts[one.shown] if isinstance(one, FilePlan) else one for one in looked_at)
    found = Wholeness(
        saved.name,
        saved.kind,
        saved.step,
        saved.world_size,
        told,
        saved.unfinished,
        (*files.remote.checks.notes, *saved.notes),
        None if asked.subset is None else asked.subset.text,
        asked.seed if asked.subset is not None and asked.subset.is_random else None,
        total,
    )
    if found.is_sound:
        found = _of_one_save(asked, found, store, plans)
    if asked.write_manifest and found.is_sound:
        by_name = {one.shown: one.info.name for one in plans}
        sums = {by_name[one.file]: one.sha256 for one in told if one.sha256 is not None}
        found = replace(found, written=write_manifests(store, files.located, sums))
    return found


class _Examination:
    """Looks at files one by one; several threads may."""

    def __init__(
        self,
        asked: _Asked,
        store: Store,
        checks: WholeChecks,
        connections: Connections,
        items: Mapping[str, Sequence[Item]],
    ) -> None:
        self._asked = asked
        self._store = store
        self._checks = checks
        self._connections = connections
        self._items = items
        self._lock = threading.Lock()

    def plan(self, name: str, fault: Fault | None) -> FilePlan | FileVerdict:
        """How the object `name` will be compared; a verdict where it is wrong already."""
        store, shown = self._store, self._store.describe(name)
        if fault is not None:
            return self._tell(FileVerdict(shown, fault.state, reason=fault.reason))
        info = stat_surely(store, name)
        if info is None:
            return self._tell(FileVerdict(shown, "missing", reason="is not there"))
        try:
            with bytes_of(store, info, self._connections) as data:
                if data is None:
                    reason = TOO_LARGE
                    return self._tell(
                        FileVerdict(shown, "nothing to compare with", info.size_bytes, reason=reason)
                    )
                contents = contents_of(data, shown, self._items.get(name), local=store.is_local)
                size = data.size_bytes
        except INDEX_ERRORS as error:
            reason = reason_of(error, shown)
            return self._tell(FileVerdict(shown, "damaged", info.size_bytes, reason=reason))
        sums, left_out = self._checks.sums_of(store, info)
        return FilePlan(
            shown, info, size, contents, tuple(sums), left_out, with_sha256=self._asked.write_manifest
        )

    def run(self, plans: Sequence[FilePlan]) -> list[FileVerdict]:
        """Compares the files, some at a time; in the order of `plans`. Raises the first error that ends it."""
        watch = self._asked.watch
        watch.begin(sum(one.nbytes for one in plans), len(plans))
        found: list[FileVerdict | None] = [None] * len(plans)

        def job(number: int) -> Callable[[Stop], None]:
            def work(stop: Stop) -> None:
                def on_bytes(count: int) -> None:
                    stop.check()
                    if count:
                        with self._lock:
                            watch.on_bytes(count)

                found[number] = self._tell(compare(self._store, plans[number], self._connections, on_bytes))

            return work

        alone = getattr(self._store, "protocol", "") in ONE_CONNECTION
        run_jobs(
            [job(number) for number in range(len(plans))],
            collect_young,  # what reads ranges is in cycles
            n_threads=1 if alone else FILES_AT_ONCE,
        )
        return [one for one in found if one is not None]

    def _tell(self, verdict: FileVerdict) -> FileVerdict:
        with self._lock:
            self._asked.watch.on_file(verdict)
        return verdict


def _units_bytes(plan: FilePlan) -> int:
    """How many bytes of a file have a checksum."""
    if plan.sums or plan.contents.compressed:
        return plan.size
    return sum(unit.nbytes for unit in plan.contents.units)


def _choose(plans: Sequence[FilePlan], asked: _Asked) -> list[FilePlan]:
    """The plans with what is compared of each."""
    if asked.subset is None:
        return [replace(one, chosen=one.contents.units, whole=True) for one in plans]
    places: list[tuple[int, int]] = []
    """Of each unit its file and its number there; -1 for a file that has checksums of the whole alone."""
    sizes: list[int] = []
    for number, plan in sorted(enumerate(plans), key=lambda one: one[1].shown):
        units = plan.contents.units
        places += ((number, at) for at in range(len(units)))
        sizes += (unit.nbytes for unit in units)
        if not units and plan.can_be_compared:
            places.append((number, -1))
            sizes.append(plan.size)
    chosen: dict[int, list[int]] = {}
    for position in choose(sizes, asked.subset, asked.seed or 0):
        number, at = places[position]
        chosen.setdefault(number, []).append(at)
    return [_chosen(plan, chosen.get(number, ())) for number, plan in enumerate(plans)]


def _chosen(plan: FilePlan, units: Sequence[int]) -> FilePlan:
    left_out = plan.left_out
    if plan.contents.units:
        left_out = (*left_out, *(f"{one.label} (only parts of the file were read)" for one in plan.sums))
    return replace(
        plan,
        chosen=tuple(plan.contents.units[at] for at in units if at >= 0),
        whole=-1 in units,
        left_out=left_out,
    )


def _of_one_save(asked: _Asked, found: Wholeness, store: Store, plans: Sequence[FilePlan]) -> Wholeness:
    """`found`, and whether its files fit together: shapes, steps and world sizes, as all of their indexes say."""
    if len(plans) < 2:
        return found
    if not store.is_local and any(one.contents.compressed for one in plans):
        note = (
            "whether its files fit together was not looked at: compressed ones would have to be fetched whole"
        )
        return replace(found, notes=(*found.notes, note))
    try:
        with open_alone(
            asked.path, EVERYTHING, object_store=asked.object_store, options=asked.options
        ) as opened:
            return replace(found, problems=opened.saved.unfinished)
    except (CorruptError, NotFoundError, UnsafeError) as error:
        return replace(found, problems=(*found.problems, error.message))
    except (LayoutError, FormatError) as error:
        note = f"whether its files fit together was not looked at: {error.message}"
        return replace(found, notes=(*found.notes, note))
