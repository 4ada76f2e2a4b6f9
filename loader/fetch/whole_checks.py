"""Compares objects that came whole with the checksums that their store or a manifest has of them.

Those are checksums of whole objects. Where only parts of an object were fetched, `verify.checks` compares the CRC-32s
of its storages instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CorruptError, RankloadError
from ..stores.base import ObjectInfo, OnBytes, Store
from ..stores.digests import Digest, new_digest, packages_of
from ..stores.manifest import KnownSum, key_of
from ..stores.sums import StoredSum, fastest_first

_READ_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Compared:
    """The checksums that one file was compared with, and those that it could not be, as the receipt names them."""

    by: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def as_details(self) -> dict[str, Any]:
        """As JSON types, for the cache to keep with the file."""
        return {"by": list(self.by), "left_out": list(self.left_out)}


NOTHING = Compared()
"""Of a file that was compared with nothing."""


def from_details(details: Mapping[str, Any] | None) -> Compared:
    """What `Compared.as_details` made."""
    return NOTHING if not details else Compared(tuple(details["by"]), tuple(details["left_out"]))


@dataclass(frozen=True)
class WholeChecks:
    """How one load compares objects that come whole."""

    verify: str
    """``LoadOptions.verify``: ``before``, ``during`` or ``off``."""
    known: Mapping[str, KnownSum] = field(default_factory=dict)
    """What the manifests next to the checkpoint state, by `stores.manifest.key_of`."""
    notes: tuple[str, ...] = ()
    """What the receipt is to say of those manifests."""

    def compare(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> Compared:
        """Reads the whole object at `path` once, and compares it with the fastest checksum of its store and with the
        manifest's; `on_bytes` is called with 0 meanwhile.

        Nothing is read with ``verify="off"``, or where no checksum is known. Raises `CorruptError` where one differs.
        """
        if self.verify == "off":
            return NOTHING
        chosen, left_out = self.sums_of(store, info)
        if chosen:
            _compare(chosen, path, store.describe(info.name), on_bytes)
        return Compared(tuple(one.label for one in chosen), left_out)

    def sums_of(self, store: Store, info: ObjectInfo) -> tuple[list[StoredSum], tuple[str, ...]]:
        """What the whole object is to be compared with: the fastest checksum of its store, and the manifest's.

        Also those of the store's that cannot be computed, each with the reason, where there is no other of them.
        """
        stored = fastest_first(store.stored_sums(info))
        usable = [one for one in stored if _can_compute(one)]
        chosen = usable[:1]
        left_out = () if usable else tuple(f"{one.label} ({_why_not(one)})" for one in stored)
        listed = self._listed(store, info)
        if listed is not None:
            # Both are compared where the store's SHA-256 differs from the manifest's: one of them must be wrong.
            chosen = [one for one in chosen if (one.algorithm, one.value) != (listed.algorithm, listed.value)]
            chosen.append(listed)
        return chosen, left_out

    def compare_in_place(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> Compared:
        """As `compare`, for a file that is used where it lies; reads it with ``verify="before"`` only.

        Otherwise comparing would read the whole file even where little of it is restored.
        """
        if self.verify == "before":
            return self.compare(store, info, path, on_bytes)
        listed = self._listed(store, info)
        if self.verify == "off" or listed is None:
            return NOTHING
        return Compared(
            (), (f"{listed.label} (a file that is used in place is read whole with verify='before' only)",)
        )

    def is_done(self, store: Store, info: ObjectInfo, compared: Compared) -> bool:
        """Whether `compared`, from an earlier load, leaves nothing for this one to compare."""
        listed = self._listed(store, info)
        return self.verify == "off" or (
            compared != NOTHING and (listed is None or listed.label in compared.by)
        )

    def left_out_of_parts(self, store: Store, info: ObjectInfo) -> tuple[str, ...]:
        """The checksums that an object of which only parts have come cannot be compared with."""
        listed = self._listed(store, info)
        return (
            ()
            if listed is None or self.verify == "off"
            else (f"{listed.label} (only parts of the file came)",)
        )

    def _listed(self, store: Store, info: ObjectInfo) -> StoredSum | None:
        known = self.known.get(key_of(store, info.name)) if self.known else None
        return None if known is None else StoredSum("sha256", known.sha256, known.told_by)


def _can_compute(one: StoredSum) -> bool:
    return (not one.n_parts or bool(one.part_sizes)) and new_digest(one.algorithm) is not None


def _why_not(one: StoredSum) -> str:
    if one.n_parts and not one.part_sizes:
        return "the store does not tell where its parts end"
    return f"needs {' or '.join(packages_of(one.algorithm))}"


class RunningSum:
    """One checksum while bytes come: of the whole, or of the checksums of its parts (S3's multipart uploads)."""

    def __init__(self, stored: StoredSum) -> None:
        self.stored = stored
        self._algorithm = stored.algorithm
        self._left = list(stored.part_sizes)
        self._of_parts = bytearray()
        self._digest = self._new()

    def update(self, data: memoryview) -> None:
        while self.stored.n_parts and self._left and len(data) >= self._left[0]:
            n_last = self._left.pop(0)
            self._digest.update(data[:n_last])
            self._of_parts += self._digest.digest()
            self._digest = self._new()
            data = data[n_last:]
        if len(data):
            if self._left:
                self._left[0] -= len(data)
            self._digest.update(data)

    def value(self) -> bytes:
        if not self.stored.n_parts:
            return self._digest.digest()
        whole = self._new()
        whole.update(memoryview(self._of_parts))
        return whole.digest()

    def _new(self) -> Digest:
        digest = new_digest(self._algorithm)
        if digest is None:
            raise RankloadError(f"{self.stored.label}: {_why_not(self.stored)}")
        return digest


def _compare(chosen: list[StoredSum], path: str, described: str, on_bytes: OnBytes) -> None:
    running = [RunningSum(one) for one in chosen]
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            for one in running:
                one.update(buffer[:n_bytes])
            on_bytes(0)
    for one in running:
        got = one.value()
        if got != one.stored.value:
            raise CorruptError(
                f"{described}: its bytes are not those that were stored: {one.stored.label}: expected "
                f"{one.stored.value.hex()}, got {got.hex()}",
                path=described,
            )
