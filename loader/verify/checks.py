"""Compares what the ranks restore with the files' checksums, each storage on one rank or on several together.

`deal_checks` decides before the restore which ranks sum which bytes; `verify_before` or `verify_after` compares the
sums. When ranks read different parts of a storage, `joint` combines their partial CRCs into the stored one. A storage
that is small, or that a rank reads whole when sharing would gain nothing, is compared by each rank that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...distributed.session import Session
from ..byte_ranges import ByteRange
from ..errors import fetched_twice
from ..materialize.tensors import TensorReader
from ..options import Verify
from ..saved.copies import StorageReads
from ..saved.tensor import StorageId, StorageRef
from ..stages import Stages
from ..wire import decode, encode
from .joint import JointCheck, StorageRead, split_reads

_RENEWED = "a node found that its copy does not match the manifest's checksum"


@dataclass(frozen=True)
class Verification:
    """How this rank's storages are compared with their checksums."""

    verify: Verify
    alone: tuple[StorageRef, ...] = ()
    """Storages that this rank sums whole, by itself."""
    shared: Mapping[StorageId, StorageRef] = field(default_factory=dict)
    """Storages that it sums together with other ranks."""
    shares: Mapping[StorageRef, Sequence[ByteRange]] = field(default_factory=dict)
    """The bytes of those storages that this rank sums."""
    judge: JointCheck | None = None
    """On rank 0; None on the others."""
    reads: tuple[StorageRef, ...] = ()
    """All that this rank reads."""
    name_at: Callable[[str], str] = str
    """The name, the same on all ranks, of the file at a local path."""


@dataclass(frozen=True)
class Checking:
    """What the checks of one load are made with."""

    session: Session
    stages: Stages
    reader: TensorReader
    """The one reader of the load, which sums what it reads, and fetches again what is damaged."""
    from_store: bool = False
    """Whether the files are from a store, so that there is something to fetch again."""
    from_peers: bool = False
    """Whether nodes take bytes of each other, so that what one has fetched again may be damaged on others."""


def deal_checks(
    checking: Checking,
    reads: Mapping[StorageRef, StorageReads],
    name_at: Callable[[str], str],
    *,
    verify: Verify,
    direct: bool,
) -> Verification:
    """Decides what each rank has to sum while it reads, and prepares its reader for that. Every rank must call.

    Args:
        reads: what the restore reads on this rank.
        name_at: gives the name, the same on all ranks, of the file at a local path.
        direct: whether ranges may be fetched directly, and so arrive in any order.

    Raises `CorruptError` on all ranks where files of one name differ between them.
    """
    if verify == "off":
        return Verification(verify)
    session = checking.session
    together, alone = split_reads(reads, world_size=session.topology.world_size, direct=direct)
    shared = {(name_at(storage.file), storage.key): storage for storage in together}
    wanted = {name: together[storage] for name, storage in shared.items()}
    judges: list[JointCheck] = []

    def deal(records: Sequence[Any]) -> list[Any]:
        asked = [decode(dict[StorageId, StorageRead], one) for _, one in records]
        judges.append(JointCheck(asked, [node for node, _ in records]))
        return [encode(share) for share in judges[0].shares()]

    dealt = session.channel.deal("checksums", [session.topology.node_rank, encode(wanted)], deal)
    own = decode(dict[StorageId, tuple[ByteRange, ...]], dealt)
    shares = {storage: own.get(storage_id, ()) for storage_id, storage in shared.items()}
    checking.reader.share(shares)
    judge = judges[0] if judges else None
    return Verification(verify, alone, shared, shares, judge, tuple(reads), name_at)


def verify_before(
    verification: Verification, checking: Checking, unplanned: Iterable[StorageRef] = ()
) -> None:
    """With ``verify="before"``, compares everything that will be read, before anything is changed.

    `unplanned` are storages of which it is not known yet what will be read. What differs is fetched once more, where it
    is from a store, and compared again. Every rank must call. Raises `CorruptError` on all of them where a checksum
    differs still. Does nothing otherwise.
    """
    if verification.verify != "before":
        return
    with checking.stages.stage("verify"):
        checking.reader.verify(unplanned)
        checking.reader.verify(verification.alone)
    _settle(verification, checking, None)


def verify_after(
    verification: Verification,
    checking: Checking,
    read_again: Callable[[Mapping[StorageRef, str]], None],
    renewed: Collection[str] = (),
) -> None:
    """With ``verify="during"``, compares what the ranks have summed while they restored.

    What differs is fetched once more, where it is from a store; `read_again` then has to read these storages, each
    given with what was wrong, into the same places. So it has to read those of the files in `renewed`, by the names of
    `deal_checks`: all of such a file was fetched again, while it may have been read. Every rank must call. Raises
    `CorruptError` on all of them where a checksum differs still. Does nothing otherwise.
    """
    if verification.verify == "during":
        _settle(verification, checking, read_again, renewed)


def _settle(
    verification: Verification,
    checking: Checking,
    read_again: Callable[[Mapping[StorageRef, str]], None] | None,
    renewed: Collection[str] = (),
) -> None:
    judged = _judge(verification, checking, renewed)
    if not judged.damaged and not judged.renewed:
        return
    damaged = [(name, verification.shared.get((name, key)), why) for name, key, why in judged.damaged]
    own = [(storage, why) for _, storage, why in damaged if storage is not None]
    files = set(judged.renewed)
    renewed_here = [one for one in verification.reads if verification.name_at(one.file) in files]
    with checking.stages.stage("fetch again"):
        fetched = [checking.reader.fetch_again(storage, why, None) for storage, why in own]
        for storage in renewed_here if checking.from_peers else ():
            checking.reader.fetch_again(storage, _RENEWED, None)
    checking.reader.share({storage: verification.shares[storage] for storage, _ in own})
    if read_again is not None:
        with checking.stages.stage("read again"):
            read_again({**dict.fromkeys(renewed_here, _RENEWED), **dict(own)})
    _judge(verification, checking, (), last=True, again=any(fetched))


@dataclass(frozen=True)
class _Judged:
    """What all ranks together found."""

    damaged: tuple[tuple[str, str, str], ...] = ()
    """Storages: the file's name, the key, and what is wrong."""
    renewed: tuple[str, ...] = ()
    """Names of files all of which some node has fetched again."""


def _judge(
    verification: Verification,
    checking: Checking,
    renewed: Collection[str],
    *,
    last: bool = False,
    again: bool = False,
) -> _Judged:
    """Compares what the ranks have summed. Raises the first error where it is the `last` time; `again`: whether this
    rank has fetched what was damaged once more."""
    with checking.stages.announced("checksums"):
        sums = checking.reader.finish_shares()
    own = {name: tuple(sums[storage]) for name, storage in verification.shared.items() if storage in sums}

    def compare(records: Sequence[Any]) -> Any:
        if verification.judge is None:
            return encode(_Judged())
        of_ranks = [decode(dict[StorageId, tuple[int, ...]], each) for each, _, _ in records]
        found = verification.judge.compare(of_ranks)
        for error in found.values() if last or not checking.from_store else ():
            raise fetched_twice(error) if any(once_more for _, _, once_more in records) else error
        return encode(
            _Judged(
                tuple(
                    (*storage, error.message.removeprefix(f"{storage[0]}: "))
                    for storage, error in found.items()
                ),
                tuple(dict.fromkeys(name for _, names, _ in records for name in names)),
            )
        )

    record = [encode(own), list(renewed), again]
    return decode(_Judged, checking.session.channel.decide("checksums agree", record, compare))
