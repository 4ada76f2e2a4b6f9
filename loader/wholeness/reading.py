"""Reads a file once, in order, and compares it with what `units` found; memory stays bounded whatever its size."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import BinaryIO

from ..byte_ranges import ByteRange
from ..checksums import crc32
from ..completeness import reason_of
from ..errors import CorruptError, FormatError, NotFoundError, UnsafeError
from ..fetch.decompress import Expanded
from ..fetch.whole_checks import RunningSum
from ..http.connections import Connections
from ..ranges.objects import ObjectBytes, open_bytes, open_local
from ..stores.base import ObjectInfo, OnBytes, Store
from ..stores.digests import Digest
from ..stores.sums import StoredSum
from .units import SMALL_ZIP_BYTES, ZIP, Contents, Unit, records_of, tensors_in
from .values import Damage, FileState, FileVerdict

BLOCK_BYTES = 16 << 20
"""What is read at once; two such blocks are held for each file that is read."""
WHOLE_BYTES = 256 << 20
"""A file of a store that gives whole objects only is fetched into a temporary folder up to this size."""
_GAP_BYTES = 256 << 10
"""So much between two wanted ranges is read with them."""
_EXPANDED_BYTES = 1 << 20
TOO_LARGE = (
    f"its store gives whole objects only, and it is larger than {WHOLE_BYTES:,} bytes: fetch it, and verify "
    "the copy"
)

INDEX_ERRORS = (CorruptError, FormatError, UnsafeError)
"""What shows that a file is not one that was written so."""


@dataclass(frozen=True)
class FilePlan:
    """How one file is compared."""

    shown: str
    """What messages call it."""
    info: ObjectInfo
    size: int
    contents: Contents = field(default_factory=Contents)
    sums: tuple[StoredSum, ...] = ()
    """What all of it is compared with."""
    left_out: tuple[str, ...] = ()
    chosen: tuple[Unit, ...] = ()
    """The units that are compared."""
    whole: bool = False
    """Whether checksums of all of it are compared, and a compressed file is expanded."""
    with_sha256: bool = False

    @property
    def can_be_compared(self) -> bool:
        return bool(self.contents.units or self.contents.compressed or self.sums)

    @property
    def nbytes(self) -> int:
        """How many bytes are read."""
        if (self.whole and (self.sums or self.contents.compressed)) or self.with_sha256:
            return self.size * (1 + bool(self.contents.compressed and (self.sums or self.with_sha256)))
        return sum(span.length for span in _spans(self.chosen))


@contextlib.contextmanager
def bytes_of(
    store: Store, info: ObjectInfo, connections: Connections, on_bytes: OnBytes = lambda n_bytes: None
) -> Iterator[ObjectBytes | None]:
    """The object's bytes; None where its store gives whole objects only and it is too large to be fetched for this.

    Raises as `open_bytes` and ``store.download``.
    """
    with open_bytes(store, info, connections) as data:
        if data is not None:
            yield data
            return
    if info.size_bytes is None or info.size_bytes > WHOLE_BYTES:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="rankload-verify-") as folder:
        path = os.path.join(folder, "object")
        store.download(info.name, path, on_bytes, info)
        with open_local(path) as data:
            yield data


def compare(store: Store, plan: FilePlan, connections: Connections, on_bytes: OnBytes) -> FileVerdict:
    """Reads what `plan` says of the file, and compares it. `on_bytes` hears of what was read, and may raise.

    Raises `AccessError` where the store refuses or fails; what is wrong with the file is in the verdict.
    """
    try:
        with bytes_of(store, plan.info, connections) as data:
            if data is None:
                return _verdict(plan, "nothing to compare with", reason=TOO_LARGE)
            return _compared(data, plan, store, on_bytes)
    except NotFoundError:
        return _verdict(plan, "missing", reason="is not there any more")
    except INDEX_ERRORS as error:
        return _verdict(plan, "damaged", reason=reason_of(error, plan.shown))


def _compared(data: ObjectBytes, plan: FilePlan, store: Store, on_bytes: OnBytes) -> FileVerdict:
    sums = [RunningSum(one) for one in plan.sums] if plan.whole else []
    sha256 = hashlib.sha256() if plan.with_sha256 else None
    damages: list[Damage] = []
    expanded = plan.whole and plan.contents.compressed
    if expanded:
        damages += _expand(data, plan, on_bytes)
    units, unsummed = _records(data, plan, local=store.is_local)
    found, unsummed_zips = _read(data, plan, units, sums, sha256, on_bytes)
    unsummed += unsummed_zips
    differ = [one for one in sums if one.value() != one.stored.value]
    at_first = ""
    if (found or differ) and not store.is_local:
        # A bit may have flipped on the way: what differs is fetched once more, and that counts.
        at_first = found[0][0].what if found else differ[0].stored.label
        units = [
            unit for unit in units if any(one.start < unit.stop and unit.first < one.stop for one, _ in found)
        ]
        if differ or sha256 is not None:
            sums = [RunningSum(one.stored) for one in sums]
            sha256 = hashlib.sha256() if sha256 is not None else None
            found, _ = _read(data, plan, units, sums, sha256, on_bytes)
        else:
            found, _ = _read(data, plan, units, (), None, on_bytes)
    damages += (
        one if one.tensors or unit is None else replace(one, tensors=tensors_in(data, unit, plan.shown))
        for one, unit in found
    )
    for one in sums:
        if one.value() != one.stored.value:
            what = f"the whole file, by {one.stored.label}"
            damages.append(Damage(what, 0, plan.size, one.stored.value.hex(), one.value().hex()))
    by = [ZIP] * (len(plan.chosen) > len(unsummed))
    by += [f"{plan.contents.compressed}'s own checksum"] if expanded else []
    by += [one.stored.label for one in sums]
    compared = sum(one.nbytes for one in plan.chosen) - sum(one.nbytes for one in unsummed)
    state = _state(plan, bool(damages), by, bool(unsummed))
    why = _why(plan, state, bool(unsummed))
    if at_first and not damages:
        why = f"{at_first} differed when it came first, and not when it was fetched again" + (
            f"; {why}" if why else ""
        )
    return replace(
        _verdict(plan, state, reason=why, by=tuple(by)),
        compared_bytes=plan.size if sums or expanded else compared,
        damages=tuple(damages),
        sha256=sha256.hexdigest() if sha256 is not None else None,
    )


def _read(
    data: ObjectBytes,
    plan: FilePlan,
    units: Sequence[Unit],
    sums: Sequence[RunningSum],
    sha256: Digest | None,
    on_bytes: OnBytes,
) -> tuple[list[tuple[Damage, Unit | None]], list[Unit]]:
    """Reads `units`, or for `sums` and `sha256` all of the file; what differs, each with its unit, and zips without
    checksums."""
    running = _Units(units, plan.shown)
    everything = bool(sums or sha256 is not None)
    for start, view in _blocks(data, [ByteRange(0, plan.size)] if everything else _spans(units), on_bytes):
        running.take(start, view)
        for one in sums:
            one.update(view)
        if sha256 is not None:
            sha256.update(view)
    return running.finish(), running.unsummed


def _state(plan: FilePlan, damaged: bool, by: Sequence[str], lacking: bool) -> FileState:
    if damaged:
        return "damaged"
    if not by:
        return (
            "not chosen"
            if plan.can_be_compared and not plan.chosen and not plan.whole
            else "nothing to compare with"
        )
    if plan.sums and plan.whole:
        return "whole"
    all_units = len(plan.chosen) == len(plan.contents.units)
    return "whole" if all_units and not plan.contents.unsummed and not lacking else "in part"


def _why(plan: FilePlan, state: FileState, lacking: bool) -> str:
    if state not in ("in part", "nothing to compare with"):
        return ""
    if len(plan.chosen) < len(plan.contents.units):
        return ""
    if lacking:
        return "torch was told to write no checksums"
    return plan.contents.unsummed


def _verdict(plan: FilePlan, state: FileState, *, reason: str = "", by: tuple[str, ...] = ()) -> FileVerdict:
    return FileVerdict(plan.shown, state, plan.size, 0, by, reason, left_out=plan.left_out)


def _records(data: ObjectBytes, plan: FilePlan, *, local: bool) -> tuple[list[Unit], list[Unit]]:
    """The chosen units, large zips as their records; and those of these zips that have no checksums."""
    found: list[Unit] = []
    unsummed: list[Unit] = []
    for unit in plan.chosen:
        if unit.crc32 is not None or unit.nbytes <= SMALL_ZIP_BYTES:
            found.append(unit)
            continue
        records, verifiable = records_of(data, unit, plan.shown, local=local)
        found += records
        if not verifiable:
            unsummed.append(unit)
    return sorted(found, key=lambda one: one.first), unsummed


class _Units:
    """The sums of units, from a file's bytes in order."""

    def __init__(self, units: Sequence[Unit], shown: str) -> None:
        self._units = units
        self._shown = shown
        self._sums = [0] * len(units)
        self._headers: dict[int, bytearray] = {}
        self._zips: dict[int, bytearray] = {}
        self._low = 0
        self._damages: list[tuple[Damage, Unit | None]] = []
        self.unsummed: list[Unit] = []
        """Zips that turned out to have no checksums."""

    def take(self, start: int, view: memoryview) -> None:
        """The file's bytes from `start` on; what came before lies before them."""
        stop = start + len(view)
        at = self._low
        while at < len(self._units) and self._units[at].first < stop:
            self._take(at, start, stop, view)
            at += 1
        while self._low < len(self._units) and self._units[self._low].stop <= stop:
            self._low += 1

    def finish(self) -> list[tuple[Damage, Unit | None]]:
        """What differs, each with the unit whose tensors it is in."""
        for at, unit in enumerate(self._units):
            if unit.check_header is not None:
                self._check_header(unit, bytes(self._headers.pop(at, b"")))
            if unit.crc32 is None:
                continue
            if self._sums[at] != unit.crc32:
                self._add(unit, f"CRC-32 {unit.crc32:08x}", f"{self._sums[at]:08x}")
        return self._damages

    def _take(self, at: int, start: int, stop: int, view: memoryview) -> None:
        unit = self._units[at]
        if unit.check_header is not None and start < unit.start:
            begin, end = max(start, unit.header), min(stop, unit.start)
            self._headers.setdefault(at, bytearray()).extend(view[begin - start : max(begin, end) - start])
        begin, end = max(start, unit.start), min(stop, unit.stop)
        if begin >= end:
            return
        part = view[begin - start : end - start]
        if unit.crc32 is not None:
            self._sums[at] = crc32(part, self._sums[at])
            return
        held = self._zips.setdefault(at, bytearray())
        held.extend(part)
        if end == unit.stop:
            self._check_zip(unit, self._zips.pop(at))

    def _check_zip(self, unit: Unit, held: bytearray) -> None:
        def fill(start: int, view: memoryview) -> None:
            part = held[start - unit.start : start - unit.start + len(view)]
            if len(part) != len(view):
                raise CorruptError(f"{self._shown}: ends early", path=self._shown)
            view[:] = part

        data = ObjectBytes(self._shown, unit.stop, fill)
        try:
            records, verifiable = records_of(data, unit, f"{self._shown}: {unit.what}", local=True)
        except INDEX_ERRORS as error:
            self._add(unit, "a torch file", reason_of(error, f"{self._shown}: {unit.what}"))
            return
        if not verifiable:
            self.unsummed.append(unit)
        for record in records:
            got_sum = crc32(data.read(record.start, record.stop))
            if got_sum != record.crc32:
                self._add(record, f"CRC-32 {record.crc32:08x}", f"{got_sum:08x}")

    def _check_header(self, unit: Unit, header: bytes) -> None:
        try:
            if unit.check_header is not None:
                unit.check_header(header)
        except CorruptError:
            where = replace(unit, start=unit.header, stop=unit.start)
            self._add(where, "the header that the zip's directory tells of", "another", what="header of ")

    def _add(self, unit: Unit, expected: str, got: str, what: str = "") -> None:
        tensors = (unit.tensor,) if unit.tensor else ()
        one = Damage(f"{what}{unit.what}", unit.start, unit.stop, expected, got, tensors)
        self._damages.append((one, unit if unit.record.startswith("data/") else None))


def _spans(units: Sequence[Unit]) -> list[ByteRange]:
    """The ranges that hold all bytes of `units`, in order, with small gaps between them."""
    found: list[ByteRange] = []
    for unit in sorted(units, key=lambda one: one.first):
        if found and unit.first <= found[-1].stop + _GAP_BYTES:
            found[-1] = ByteRange(found[-1].start, max(found[-1].stop, unit.stop))
        else:
            found.append(ByteRange(unit.first, unit.stop))
    return found


def _blocks(
    data: ObjectBytes, spans: Sequence[ByteRange], on_bytes: OnBytes
) -> Iterator[tuple[int, memoryview]]:
    """The bytes of `spans` in order, in blocks that hold until the next one is asked for; one is read ahead."""
    cuts = [
        (start, min(span.stop, start + BLOCK_BYTES))
        for span in spans
        for start in range(span.start, span.stop, BLOCK_BYTES)
    ]
    if not cuts:
        return
    largest = max(stop - start for start, stop in cuts)
    buffers = [memoryview(bytearray(largest)) for _ in cuts[:2]]

    def read(number: int) -> memoryview:
        start, stop = cuts[number]
        view = buffers[number % 2][: stop - start]
        data.read_much(start, view, on_bytes)
        return view

    with ThreadPoolExecutor(1, thread_name_prefix="rankload-verify") as ahead:
        following = ahead.submit(read, 0)
        for number, (start, _) in enumerate(cuts):
            view = following.result()
            if number + 1 < len(cuts):
                following = ahead.submit(read, number + 1)
            yield start, view


def _expand(data: ObjectBytes, plan: FilePlan, on_bytes: OnBytes) -> list[Damage]:
    """Expands a compressed file, which compares its contents with the checksums in it."""
    kind = plan.contents.compressed

    def open_file(_: str) -> BinaryIO:
        return _counted(data, on_bytes)

    try:
        with Expanded(data.described, kind, plan.shown, 1 << 62, open_file) as contents:
            while contents.read(_EXPANDED_BYTES):
                pass
    except (CorruptError, UnsafeError) as error:
        got = reason_of(error, plan.shown)
        return [Damage(f"{kind} data", 0, plan.size, "data that expand to what their checksum says", got)]
    return []


def _counted(data: ObjectBytes, on_bytes: OnBytes) -> BinaryIO:
    def fill(start: int, view: memoryview) -> None:
        data.read_much(start, view, on_bytes)

    return ObjectBytes(data.described, data.size_bytes, fill).as_file(BLOCK_BYTES // 2)
