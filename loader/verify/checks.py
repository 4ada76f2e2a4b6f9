"""Compares what the ranks restore with the files' checksums, each storage on one rank or on several together.

`deal_checks` decides before the restore which ranks sum which bytes; `verify_before` or `verify_after` compares the
sums. When ranks read different parts of a storage, `joint` combines their partial CRCs into the stored one. A storage
that is small, or that a rank reads whole when sharing would gain nothing, is compared by each rank that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...distributed.session import Session
from ..byte_ranges import ByteRange
from ..errors import after_first_change
from ..materialize.tensors import TensorReader
from ..options import Verify
from ..saved.copies import StorageReads
from ..saved.tensor import StorageId, StorageRef
from ..stages import Stages
from ..wire import decode, encode
from .joint import JointCheck, StorageRead, split_reads


@dataclass(frozen=True)
class Verification:
    """How this rank's storages are compared with their checksums."""

    verify: Verify
    name: str
    """What messages call the checkpoint."""
    alone: tuple[StorageRef, ...] = ()
    """Storages that this rank sums whole, by itself."""
    shared: Mapping[StorageId, StorageRef] = field(default_factory=dict)
    """Storages that it sums together with other ranks."""
    shares: Mapping[StorageRef, Sequence[ByteRange]] = field(default_factory=dict)
    """The bytes of those storages that this rank sums."""
    judge: JointCheck | None = None
    """On rank 0; None on the others."""


@dataclass(frozen=True)
class Checking:
    """What the checks of one load are made with."""

    session: Session
    stages: Stages
    reader: TensorReader
    """The one reader of the load, which sums what it reads."""


def deal_checks(
    checking: Checking,
    reads: Mapping[StorageRef, StorageReads],
    name_at: Callable[[str], str],
    *,
    verify: Verify,
    name: str,
    direct: bool,
) -> Verification:
    """Decides what each rank has to sum while it reads, and prepares its reader for that. Every rank must call.

    Args:
        reads: what the restore reads on this rank.
        name_at: gives the name, the same on all ranks, of the file at a local path.
        name: what messages call the checkpoint.
        direct: whether ranges may be fetched directly, and so arrive in any order.

    Raises `CorruptError` on all ranks where files of one name differ between them.
    """
    if verify == "off":
        return Verification(verify, name)
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
    return Verification(verify, name, alone, shared, shares, judges[0] if judges else None)


def verify_before(
    verification: Verification, checking: Checking, unplanned: Iterable[StorageRef] = ()
) -> None:
    """With ``verify="before"``, compares everything that will be read, before anything is changed.

    `unplanned` are storages of which it is not known yet what will be read. Every rank must call. Raises `CorruptError`
    on all of them where a checksum differs. Does nothing otherwise.
    """
    if verification.verify != "before":
        return
    with checking.stages.stage("verify"):
        checking.reader.verify(unplanned)
        checking.reader.verify(verification.alone)
    _judge(verification, checking)


def verify_after(verification: Verification, checking: Checking) -> None:
    """With ``verify="during"``, compares what the ranks have summed while they restored.

    Every rank must call. Raises `PartialRestoreError` on all of them where a checksum differs. Does nothing otherwise.
    """
    if verification.verify != "during":
        return
    with after_first_change(verification.name, ["all parts"]):
        _judge(verification, checking)


def _judge(verification: Verification, checking: Checking) -> None:
    with checking.stages.stage("checksums"):
        sums = checking.reader.finish_shares()
    own = {name: tuple(sums.get(storage, ())) for name, storage in verification.shared.items()}

    def compare(records: Sequence[Any]) -> None:
        if verification.judge is not None:
            verification.judge.compare([decode(dict[StorageId, tuple[int, ...]], each) for each in records])

    checking.session.channel.decide("checksums agree", encode(own), compare)
