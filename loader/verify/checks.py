"""Compares what the ranks restore with the files' checksums, each storage on one rank or on several together.

`deal_checks` decides before the restore which ranks sum which bytes; `verify_before` or `verify_after` compares the
sums. When ranks read different parts of a storage, `joint` combines their partial CRCs into the stored one. A storage
that is small, or that a rank reads whole when sharing would gain nothing, is compared by each rank that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...distributed.session import Session
from ..byte_ranges import ByteRange
from ..check import Checked
from ..checkpoint import Checkpoint
from ..errors import after_first_change
from ..saved.values import StorageRef
from ..stages import Stages
from .joint import JointCheck, StorageId, StorageRead, decode_reads, encode_reads
from .wanted_reads import WantedReads, wanted_reads

ALONE_BYTES = 64 << 10
"""Each rank that needs any of a storage up to this size reads and sums all of it: to share the work would cost more."""
SHARED_FROM_BYTES = 4 << 20
"""From this size on, ranks that each read a whole storage share the summing of it."""


@dataclass
class Verification:
    """How this rank's storages are compared with their checksums."""

    verify: str
    """``LoadOptions.verify``: ``before``, ``during`` or ``off``."""
    wanted: dict[StorageRef, WantedReads]
    """What the restore reads on this rank."""
    alone: tuple[StorageRef, ...] = ()
    """Storages that this rank sums whole, by itself."""
    shared: dict[StorageId, StorageRef] = field(default_factory=dict)
    """Storages that it sums together with other ranks."""
    shares: dict[StorageRef, list[ByteRange]] = field(default_factory=dict)
    """The bytes of those storages that this rank sums."""
    judge: list[JointCheck] = field(default_factory=list)
    """On rank 0 one `JointCheck`, on the others none."""


def deal_checks(
    checkpoint: Checkpoint, checked: Checked, session: Session, stages: Stages, *, verify: str
) -> Verification:
    """Decides what each rank has to sum while it reads, and prepares its `TensorReader` for that. Every rank must call.

    Raises `CorruptError` on all ranks where files of one name differ between them.
    """
    with stages.stage("plan"):
        wanted = wanted_reads(checked.prepared)
    if verify == "off":
        return Verification(verify, wanted)
    # A job of one rank sums a storage in one pass; only ranges that are fetched directly arrive in any order, as cells.
    together_pays = session.topology.world_size > 1 or checkpoint.opening.direct
    summed = {storage: one for storage, one in wanted.items() if storage.crc32 is not None}
    together = {
        storage: one for storage, one in summed.items() if together_pays and _worth_sharing(storage, one)
    }
    name_of = {index.path: index.name for index in checkpoint.indexes}
    shared = {(name_of[storage.file], storage.key): storage for storage in together}
    reads = {name: _storage_read(storage, together[storage]) for name, storage in shared.items()}
    alone = tuple(storage for storage in summed if storage not in together)
    result = Verification(verify, wanted, alone, shared)

    def deal(records: Sequence[Any]) -> list[Any]:
        judge = JointCheck([decode_reads(one["reads"]) for one in records], [one["node"] for one in records])
        result.judge.append(judge)
        return [[[*name, ranges] for name, ranges in share.items()] for share in judge.shares()]

    record = {"node": session.topology.node_rank, "reads": encode_reads(reads)}
    dealt = session.channel.deal("checksums", record, deal)
    shares: dict[StorageRef, list[ByteRange]] = {
        shared[file, key]: [ByteRange(*one) for one in ranges] for file, key, ranges in dealt
    }
    result.shares = {storage: shares.get(storage, []) for storage in shared.values()}
    checked.reader.share(result.shares)
    return result


def _worth_sharing(storage: StorageRef, wanted: WantedReads) -> bool:
    if storage.nbytes <= ALONE_BYTES:
        return False
    return wanted.nbytes < storage.nbytes or storage.nbytes >= SHARED_FROM_BYTES


def _storage_read(storage: StorageRef, wanted: WantedReads) -> StorageRead:
    crc = storage.crc32 if storage.crc32 is not None else 0
    return StorageRead(storage.nbytes, crc, tuple(wanted.ranges), wanted.names)


def verify_before(
    verification: Verification, checkpoint: Checkpoint, checked: Checked, session: Session, stages: Stages
) -> None:
    """With ``verify="before"``, compares everything that will be read, before anything is changed.

    Every rank must call. Raises `CorruptError` on all of them where a checksum differs. Does nothing otherwise.
    """
    if verification.verify != "before":
        return
    with stages.stage("verify"):
        if checked.prepared.algorithms:
            # Algorithms may change the model, and with it what is read of it.
            checked.reader.verify(checkpoint.storages({"state": checked.contents.state}))
        checked.reader.verify(verification.alone)
    _judge(verification, checked, session, stages)


def verify_after(
    verification: Verification, checkpoint: Checkpoint, checked: Checked, session: Session, stages: Stages
) -> None:
    """With ``verify="during"``, compares what the ranks have summed while they restored.

    Every rank must call. Raises `PartialRestoreError` on all of them where a checksum differs. Does nothing otherwise.
    """
    if verification.verify != "during":
        return
    with after_first_change(checkpoint.name, ["all parts"]):
        _judge(verification, checked, session, stages)


def _judge(verification: Verification, checked: Checked, session: Session, stages: Stages) -> None:
    with stages.stage("checksums"):
        sums = checked.reader.finish_shares()
    record = [[*name, sums.get(storage, [])] for name, storage in verification.shared.items()]

    def compare(records: Sequence[Any]) -> None:
        verification.judge[0].compare([{(file, key): one for file, key, one in each} for each in records])

    session.channel.decide("checksums agree", record, compare)
