"""Comparing what is restored with its checksums, by all ranks together: dealt before the restore, judged after it.

See `joint_checks` for how the work is shared. Storages that are small, or that one rank reads whole and nobody gains
by sharing, are compared by each rank that reads them.
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
from ..stages import Stopwatch
from .joint import JointCheck, StorageId, StorageRead, decode_readings, encode_readings
from .wanted_reads import WantedReads, wanted_reads

ALONE_BYTES = 64 << 10
"""A storage up to this size is read whole by each rank that needs any of it: telling the others would cost more."""
SHARED_FROM_BYTES = 4 << 20
"""A storage that is read whole is worth summing together from this size on."""


@dataclass
class Verification:
    """How this load's checksums are compared."""

    verify: str
    wanted: dict[StorageRef, WantedReads]
    """What the restore reads on this rank."""
    alone: tuple[StorageRef, ...] = ()
    """What this rank reads and checks by itself."""
    shared: dict[StorageId, StorageRef] = field(default_factory=dict)
    """What it checks together with others."""
    shares: dict[StorageRef, list[ByteRange]] = field(default_factory=dict)
    """Of those, what this rank is to sum."""
    judge: list[JointCheck] = field(default_factory=list)
    """On rank 0: who was dealt what."""


def deal_checks(
    checkpoint: Checkpoint, checked: Checked, session: Session, watch: Stopwatch, *, verify: str
) -> Verification:
    """Tells all ranks what they have to sum up while they read. Every rank must call.

    Raises `CorruptError` on all of them where their files of one name differ.
    """
    with watch.stage("plan"):
        wanted = wanted_reads(checked.prepared)
    if verify == "off":
        return Verification(verify, wanted)
    # A rank that is alone reads and sums a storage in one pass, but not where parts of it come in any order.
    together_pays = session.topology.world_size > 1 or checkpoint.opening.direct
    summed = {storage: one for storage, one in wanted.items() if storage.crc32 is not None}
    together = {
        storage: one for storage, one in summed.items() if together_pays and _worth_sharing(storage, one)
    }
    name_of = {index.path: index.name for index in checkpoint.indexes}
    shared = {(name_of[storage.file], storage.key): storage for storage in together}
    readings = {name: _reading(storage, together[storage]) for name, storage in shared.items()}
    alone = tuple(storage for storage in summed if storage not in together)
    result = Verification(verify, wanted, alone, shared)

    def deal(told: Sequence[Any]) -> list[Any]:
        judge = JointCheck([decode_readings(one["reads"]) for one in told], [one["node"] for one in told])
        result.judge.append(judge)
        return [[[*name, ranges] for name, ranges in share.items()] for share in judge.shares()]

    record = {"node": session.topology.node_rank, "reads": encode_readings(readings)}
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


def _reading(storage: StorageRef, wanted: WantedReads) -> StorageRead:
    crc = storage.crc32 if storage.crc32 is not None else 0
    return StorageRead(storage.nbytes, crc, tuple(wanted.ranges), wanted.names)


def verify_before(
    verification: Verification, checkpoint: Checkpoint, checked: Checked, session: Session, watch: Stopwatch
) -> None:
    """With ``verify="before"``, compares everything that will be read, before anything is changed.

    Every rank must call. Raises `CorruptError` on all of them.
    """
    if verification.verify != "before":
        return
    with watch.stage("verify"):
        if checked.prepared.algorithms:
            # What is read of the model will be known once they have changed it.
            checked.reader.verify(checkpoint.storages({"state": checked.contents.state}))
        checked.reader.verify(verification.alone)
    _judge(verification, checked, session, watch)


def verify_after(
    verification: Verification, checkpoint: Checkpoint, checked: Checked, session: Session, watch: Stopwatch
) -> None:
    """With ``verify="during"``, compares what the ranks have summed while they restored. Every rank must call.

    Raises `PartialRestoreError` on all of them where a checksum differs.
    """
    if verification.verify != "during":
        return
    with after_first_change(checkpoint.name, ["all parts"]):
        _judge(verification, checked, session, watch)


def _judge(verification: Verification, checked: Checked, session: Session, watch: Stopwatch) -> None:
    with watch.stage("checksums"):
        sums = checked.reader.finish_shares()
    told = [[*name, sums.get(storage, [])] for name, storage in verification.shared.items()]

    def compare(told: Sequence[Any]) -> None:
        verification.judge[0].compare([{(file, key): one for file, key, one in each} for each in told])

    session.channel.decide("checksums agree", told, compare)
