"""What each rank of ``rankload run`` writes of its start and its end: one small file a process, in one folder a node.

A rank that is killed writes no end: the record of its start says which process to look for. Writing is best effort: a
full disk, or a folder that this node does not see, never ends a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from ..distributed.errors import PeerError, RankloadError, StalledError
from ..distributed.liveness import ProcessIdentity, this_process

MESSAGE_LIMIT = 4000
"""Characters of an error's message that are kept."""
_OF_A_PEER = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"})
_SAYS_A_PEER = re.compile(
    r"(closed|reset) by peer|gloo|NCCL|Broken pipe|Connection (was )?(closed|reset|refused)|Socket Timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """One process of one rank; times are seconds since the epoch."""

    rank: int
    local_rank: int
    process: ProcessIdentity
    began_s: float
    ended_s: float | None = None
    """None: it runs, or ended without a word."""
    error: str | None = None
    """``ValueError: x``, where it ended by an exception; None where it ended well."""
    where: str | None = None
    """Of the exception: file, line and function."""
    follows: bool = False
    """Whether the exception says that another rank failed, or a connection to it."""
    met_by: int | None = None
    """The rank that met the error first, where rankload's error names one."""
    met_on: str | None = None
    """That rank's host."""


def write_start(folder: str, *, rank: int, local_rank: int) -> RankRecord:
    """Records that this process begins as `rank`."""
    record = RankRecord(rank=rank, local_rank=local_rank, process=this_process(), began_s=time.time())
    _write(folder, record)
    return record


def write_end(folder: str, record: RankRecord, error: BaseException | None = None) -> None:
    """Records that the process of `record` ends now: well, or by `error`."""
    ended = replace(record, ended_s=time.time())
    if error is not None:
        rankloads = error if isinstance(error, RankloadError) else None
        ended = replace(
            ended,
            error=described(error),
            where=place_of(error.__traceback__),
            follows=any(map(tells_of_a_peer, chain(error))),
            met_by=None if rankloads is None else rankloads.rank,
            met_on=None if rankloads is None else rankloads.host,
        )
    if not _write(folder, ended) and ended.error is not None:
        # Another node's folder: at least the output of this rank says which it is.
        where = f"rank {ended.rank} (host {ended.process.host}, pid {ended.process.pid})"
        print(f"rankload run: {where} failed: {ended.error}", file=sys.stderr, flush=True)


def read_records(folder: Path) -> list[RankRecord]:
    """All records in `folder`, the earliest start first."""
    found = [record for path in record_paths(folder) if (record := read_record(path)) is not None]
    return sorted(found, key=lambda one: (one.began_s, one.rank))


def record_paths(folder: Path) -> Iterator[Path]:
    """The files of all records in `folder`."""
    return folder.glob("rank*.json")


def read_record(path: Path) -> RankRecord | None:
    """The record in `path`; None where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        fields = json.loads(path.read_text())
        return RankRecord(**{**fields, "process": ProcessIdentity(**fields["process"])})
    return None


def described(error: BaseException) -> str:
    """Type and message of `error`, in one line as far as its message is one."""
    if isinstance(error, SystemExit):
        return f"SystemExit: {error.code}"
    message = error.message if isinstance(error, RankloadError) else str(error)
    message = message.strip()[:MESSAGE_LIMIT]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def place_of(trace: TracebackType | None) -> str | None:
    """File, line and function of the innermost frame that is no installed package's; None without a traceback."""
    own = None
    for frame in traceback.extract_tb(trace):
        if "site-packages" not in frame.filename and not _is_pythons(frame.filename):
            own = f"{frame.filename}:{frame.lineno} in {frame.name}"
    return own


def chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it was raised from, or while."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def tells_of_a_peer(error: BaseException) -> bool:
    """Whether `error` is how a rank notices that another one has failed."""
    if isinstance(error, RankloadError):
        return isinstance(error, PeerError | StalledError)
    if isinstance(error, ConnectionError) or type(error).__name__ in _OF_A_PEER:
        return True
    return isinstance(error, RuntimeError) and _SAYS_A_PEER.search(str(error)) is not None


def _is_pythons(name: str) -> bool:
    return name.startswith(("<", os.path.dirname(os.__file__))) or name == __file__


def _write(folder: str, record: RankRecord) -> bool:
    path = os.path.join(folder, f"rank{record.rank}-{record.process.pid}.json")
    try:
        with open(f"{path}.part", "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
        os.replace(f"{path}.part", path)
    except OSError:
        return False
    return True
