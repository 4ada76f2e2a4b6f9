"""Says what a load did: the receipt, its lines and figures for loggers, and the trace of its stages.

`join_reports` makes one `Receipt` of every rank's `RankReport`, `log_receipt` hands it to a logger, and `write_trace`
writes its stages as a file for Perfetto or ``chrome://tracing``: a row for each rank, a bar for each stage.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..distributed.printable import Lines, package_logger, printable
from .fetch.tally import FetchedAgain
from .plurals import counted
from .retries import Wait, waited_s
from .stages import Timing

SCHEMA_VERSION = 1
"""Of `Receipt.as_dict`: raised when a key goes or changes its meaning, not when one is added."""


_TOLD_S = 0.1
"""Waits for a store from so many seconds on are told."""
_WAITS_NAMED = 8
"""Ranks whose waits `Receipt.notes` tells of."""
_NAMED = 20
"""Names of one kind that `Receipt.__str__` shows."""


@dataclass(frozen=True)
class FileReport:
    """One file that the load used, as one rank knows it."""

    name: str
    """Path or URI, without secrets."""
    path: str
    """On this rank's node."""
    size_bytes: int
    fetched_bytes: int
    """Bytes that this rank's node fetched of it, where it came whole."""
    own_bytes: int
    """Bytes that this rank fetched of it directly."""
    verified: bool
    """Whether every byte that this rank restored was compared with a checksum."""
    verified_by: tuple[str, ...]
    not_compared: tuple[str, ...]


@dataclass(frozen=True)
class RankReport:
    """What a load did on one rank; the fields that a `Receipt` has too mean the same."""

    node: int
    host: str
    restored: tuple[str, ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    derived: tuple[str, ...]
    not_restored: tuple[str, ...]
    renamed: Mapping[str, str]
    cast: Mapping[str, str]
    notes: tuple[str, ...]
    streamed: tuple[str, ...]
    """Objects that came as one stream, because their server does no ranges."""
    fetched_in_parts: Mapping[str, int]
    """Bytes that this rank fetched for its node of each file that came in parts, by its path there."""
    timings: tuple[Timing, ...]
    files: tuple[FileReport, ...]
    fetched_again: tuple[FetchedAgain, ...] = ()
    """By this rank."""
    cache_notes: tuple[str, ...] = ()
    """Sentences on the folders that this rank put files into."""
    waits: tuple[Wait, ...] = ()
    """When this rank waited for a store, or for another node's rank, that gave nothing."""


@dataclass(frozen=True)
class FileRecord:
    """One file that the load used."""

    name: str
    """Path or URI, without secrets."""
    size_bytes: int
    fetched_bytes: int
    """Bytes that the store sent for this file, to all nodes together; 0 where it was used in place."""
    verified: bool
    """Whether every byte that was restored was compared with a checksum."""
    verified_by: tuple[str, ...] = ()
    """Which checksums: ``zip CRC-32``, of the bytes that were restored, or those of the whole file, such as
    ``crc32c of the store`` and ``sha256 of SHA256SUMS``."""
    not_compared: tuple[str, ...] = ()
    """Known checksums of the file that were not compared, each with the reason."""


@dataclass(frozen=True)
class StageRecord:
    """What one stage took on one rank."""

    rank: int
    stage: str
    seconds: float
    bytes: int
    begin_s: float = 0.0
    """When it began, in seconds since 1970, by the clock of the rank's machine."""


@dataclass(frozen=True)
class Receipt:
    """What a load did: the same on every rank, but for `cache_dir`, which is this node's.

    `restored` lists rank 0's parts. The parts are the same on all ranks; of sharded state, the bytes that it states are
    rank 0's alone. What was ignored, missing, unexpected, renamed, cast, derived or not restored is what any rank
    reported (see `join_reports`).
    """

    path: str
    kind: str
    """``monolithic``, ``sharded``, ``slices``, ``rank-shards``, ``dcp``, ``composer-zero`` or ``deepspeed``."""
    layout: str
    saved_world_size: int | None
    world_size: int
    n_nodes: int
    weights_only: bool
    verify: str
    cache_dir: str | None = None
    """Where this node kept what was fetched or unpacked, while it was read: one folder, or two with a comma between
    them. None where nothing was."""
    restored: tuple[str, ...] = ()
    """Parts, such as ``model (12 tensors, 4,096 bytes)`` or ``scheduler StepLR``."""
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)
    """Tensors whose dtype changed: ``float32 -> bfloat16``."""
    derived: tuple[str, ...] = ()
    """What the checkpoint lacks and the load made instead, the same in every load: random states, zeros."""
    unverified: tuple[str, ...] = ()
    """Files compared with no checksum: there is none that could be, or ``verify`` is ``off``."""
    not_restored: tuple[str, ...] = ()
    """Parts that the checkpoint holds and this job has no place for."""
    notes: tuple[str, ...] = ()
    """Sentences on anything else, such as where weights of another precision came from."""
    files: tuple[FileRecord, ...] = ()
    fetched_again: tuple[FetchedAgain, ...] = ()
    """What did not match its checksum, on its way here or in the cache, and was fetched a second time: by each node, or
    rank, that did. The bytes are among the `fetched_bytes` of the files."""
    stages: tuple[StageRecord, ...] = ()
    hosts: tuple[str, ...] = ()
    """Each rank's machine, by rank."""
    nodes: tuple[int, ...] = ()
    """Each rank's node, by rank."""
    waited_s: float = 0.0
    """Seconds in which any rank waited for a store that failed or gave nothing; `notes` say who, and why."""

    def as_dict(self) -> dict[str, Any]:
        """The receipt as JSON types, with `SCHEMA_VERSION` under ``schema_version``."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {**plain, "schema_version": SCHEMA_VERSION}

    @property
    def fetched_bytes(self) -> int:
        return sum(file.fetched_bytes for file in self.files)

    @property
    def seconds(self) -> float:
        """The slowest rank's time over all stages."""
        per_rank: dict[int, float] = {}
        for record in self.stages:
            per_rank[record.rank] = per_rank.get(record.rank, 0.0) + record.seconds
        return max(per_rank.values(), default=0.0)

    def metrics(self) -> dict[str, float]:
        """Figures for a metrics logger."""
        figures = {
            "rankload/seconds": self.seconds,
            "rankload/files": float(len(self.files)),
            "rankload/size_bytes": float(sum(file.size_bytes for file in self.files)),
            "rankload/fetched_bytes": float(self.fetched_bytes),
            "rankload/fetched_again_bytes": float(sum(one.nbytes for one in self.fetched_again)),
            "rankload/waited_seconds": self.waited_s,
            "rankload/ignored": float(len(self.ignored)),
            "rankload/missing": float(len(self.missing)),
            "rankload/unexpected": float(len(self.unexpected)),
        }
        for record in self.stages:
            key = f"rankload/seconds/{record.stage}"
            figures[key] = max(figures.get(key, 0.0), record.seconds)
        return figures

    def lines(self) -> tuple[str, str, str]:
        """The receipt for a person, in three lines."""
        saved = (
            "" if self.saved_world_size is None else f", saved by {counted(self.saved_world_size, 'rank')}"
        )
        what = "weights only, " if self.weights_only else ""
        first = (
            f"restored {self.path} ({self.kind}, {self.layout}{saved}; {what}"
            f"on {counted(self.world_size, 'rank')}, {counted(self.n_nodes, 'node')}): "
            f"{', '.join(self.restored) or 'nothing'}"
        )
        size = sum(file.size_bytes for file in self.files)
        unmoved = "used in place" if self.cache_dir is None else "nothing fetched"
        fetched = f"{counted(self.fetched_bytes, 'byte')} fetched" if self.fetched_bytes else unmoved
        if self.fetched_again:
            again = sum(one.nbytes for one in self.fetched_again)
            fetched += f", of these {again:,} a second time, because they were damaged"
        slowest = sorted(_slowest_by_stage(self.stages).items(), key=lambda item: -item[1])[:3]
        timing = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in slowest)
        second = (
            f"{counted(len(self.files), 'file')}, {counted(size, 'byte')}, {fetched}; "
            f"{self.seconds:.2f} s" + (f" ({timing})" if timing else "")
        )
        if self.waited_s >= _TOLD_S:
            second += f"; waited {self.waited_s:.1f} s for the store"
        parts = [
            f"{len(value)} {label}"
            for label, value in (
                ("ignored", self.ignored),
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("renamed", self.renamed),
                ("cast", self.cast),
                ("derived", self.derived),
                ("not restored", self.not_restored),
            )
            if value
        ]
        checked = (
            "not verified: " + ", ".join(self.unverified)
            if self.unverified
            else ("every byte compared with its checksum" if self.files else "no files")
        )
        third = f"{', '.join(parts) or 'nothing ignored, missing, unexpected or derived'}; {checked}"
        return first, second, third

    def __str__(self) -> str:
        """`lines`, and the names of what they count: what was not restored first."""
        named = [
            f"{label}: {_names(list(values))}"
            for label, values in (
                ("not restored", self.not_restored),
                ("missing in the checkpoint", self.missing),
                ("unexpected in the checkpoint", self.unexpected),
                ("ignored", self.ignored),
                ("derived", self.derived),
                (
                    "fetched again",
                    [f"{one.name} ({one.nbytes:,} bytes: {one.why})" for one in self.fetched_again],
                ),
                ("cast", [f"{name} ({how})" for name, how in self.cast.items()]),
                ("note", self.notes),
            )
            if values
        ]
        return Lines([*self.lines(), *named])


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _slowest_by_stage(stages: tuple[StageRecord, ...]) -> dict[str, float]:
    slowest: dict[str, float] = {}
    for record in stages:
        slowest[record.stage] = max(slowest.get(record.stage, 0.0), record.seconds)
    return slowest


def join_reports(reports: Sequence[RankReport], about: Receipt) -> Receipt:
    """The receipt of all ranks, from their `reports` by rank.

    `about` has what every rank knows of the load; what the reports tell is filled in. What was ignored, missing and the
    like becomes the union in the order of ranks, every entry once; where ranks map a name differently, the lowest
    rank's entry is kept. ``restored`` is rank 0's.
    """
    files = _join_files(reports, verify=about.verify)
    streamed = _union([one.streamed for one in reports])
    return replace(
        about,
        restored=reports[0].restored,
        ignored=_union([one.ignored for one in reports]),
        missing=_union([one.missing for one in reports]),
        unexpected=_union([one.unexpected for one in reports]),
        derived=_union([one.derived for one in reports]),
        not_restored=_union([one.not_restored for one in reports]),
        renamed=_first_of_each([one.renamed for one in reports]),
        cast=_first_of_each([one.cast for one in reports]),
        unverified=tuple(file.name for file in files if about.verify == "off" or not file.verified),
        notes=(
            *about.notes,
            *reports[0].notes,
            *_union([tuple(f"{note} [{one.host}]" for note in one.cache_notes) for one in reports]),
            *(f"server without ranges: {name} was read as one stream" for name in streamed),
            *_told_waits(reports),
        ),
        waited_s=waited_s([wait for one in reports for wait in one.waits]),
        files=files,
        fetched_again=tuple(each for one in reports for each in one.fetched_again),
        hosts=tuple(one.host for one in reports),
        nodes=tuple(one.node for one in reports),
        stages=tuple(
            StageRecord(rank, each.stage, each.seconds, each.bytes, each.begin_s)
            for rank, one in enumerate(reports)
            for each in one.timings
        ),
    )


def _join_files(reports: Sequence[RankReport], *, verify: str) -> tuple[FileRecord, ...]:
    """Each file once, with the bytes that all nodes and ranks fetched of it.

    All ranks of a node report the same bytes of a file fetched whole; of one that came in parts, the counts of the rank
    that fetched it are the right ones.
    """
    in_parts = {(one.node, path): count for one in reports for path, count in one.fetched_in_parts.items()}
    by_node: dict[str, dict[int, int]] = {}
    direct: dict[str, int] = {}
    files: dict[str, FileRecord] = {}
    for one in reports:
        for file in one.files:
            direct[file.name] = direct.get(file.name, 0) + file.own_bytes
            cost = by_node.setdefault(file.name, {})
            fetched = in_parts.get((one.node, file.path), file.fetched_bytes)
            cost[one.node] = max(fetched, cost.get(one.node, 0))
            known = files.get(file.name)
            files[file.name] = FileRecord(
                file.name,
                file.size_bytes,
                sum(cost.values()) + direct[file.name],
                file.verified and (not known or known.verified),
                _union([known.verified_by if known else (), file.verified_by]) if verify != "off" else (),
                _union([known.not_compared if known else (), file.not_compared]),
            )
    return tuple(files.values())


def _told_waits(reports: Sequence[RankReport]) -> Iterator[str]:
    """A sentence on how long each rank waited for a store; of many ranks, those that waited longest."""
    seconds = {rank: waited_s(one.waits) for rank, one in enumerate(reports)}
    told = sorted(
        (rank for rank, each in seconds.items() if each >= _TOLD_S), key=lambda rank: -seconds[rank]
    )
    for rank in sorted(told[:_WAITS_NAMED]):
        longest = max(reports[rank].waits, key=lambda wait: wait.seconds)
        yield f"rank {rank} waited {seconds[rank]:.1f} s for the store: {longest.why}"
    if len(told) > _WAITS_NAMED:
        more = counted(len(told) - _WAITS_NAMED, "more rank")
        yield f"{more} waited for the store, for {seconds[told[_WAITS_NAMED]]:.1f} s at most"


def _union(many: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry for one in many for entry in one))


def _first_of_each(many: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in many:
        for name, value in one.items():
            found.setdefault(name, value)
    return found


def log_receipt(receipt: Receipt, logger: Any) -> None:
    """Gives `logger` the receipt; raises what the logger raises. Call it on one rank.

    A ``logging.Logger`` gets three lines; an object with ``log_metrics(dict)`` or ``log_hyperparameters(dict)``
    gets the figures, and the package's own logger the lines; None means the package's own logger.
    """
    lines_to = logger if isinstance(logger, logging.Logger) else package_logger()
    for line in receipt.lines():
        lines_to.info("%s", printable(line))
    if logger is None or isinstance(logger, logging.Logger):
        return
    if callable(getattr(logger, "log_metrics", None)):
        logger.log_metrics(receipt.metrics())
    elif callable(getattr(logger, "log_hyperparameters", None)):
        logger.log_hyperparameters(receipt.metrics())


def trace_events(
    stages: Sequence[StageRecord], hosts: Sequence[str], nodes: Sequence[int]
) -> list[dict[str, object]]:
    """The stages as events of Chrome's trace format: a row for each rank, under its node, and a bar for each stage.

    `hosts` and `nodes` are by rank. Times are in microseconds since the first stage of any rank began, by each
    machine's own clock: rows of different machines may be shifted against each other.
    """
    first = min((record.begin_s for record in stages), default=0.0)
    events: list[dict[str, object]] = []
    for rank, (host, node) in enumerate(zip(hosts, nodes, strict=True)):
        events.append(_named("process_name", node, rank, f"node {node} on {host}"))
        events.append(_named("thread_name", node, rank, f"rank {rank}"))
    for record in stages:
        events.append(
            {
                "name": record.stage,
                "ph": "X",
                "ts": round((record.begin_s - first) * 1e6),
                "dur": round(record.seconds * 1e6),
                "pid": nodes[record.rank],
                "tid": record.rank,
                "args": {"bytes": record.bytes},
            }
        )
    return events


def _named(kind: str, node: int, rank: int, name: str) -> dict[str, object]:
    return {"name": kind, "ph": "M", "pid": node, "tid": rank, "args": {"name": name}}


def write_trace(path: str, events: Sequence[dict[str, object]]) -> None:
    """Writes `events` to `path` as a JSON file, whole or not at all. Raises `OSError`."""
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "x", encoding="utf-8") as file:
            json.dump({"traceEvents": list(events), "displayTimeUnit": "ms"}, file)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
