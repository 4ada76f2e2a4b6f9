"""Comparing objects that came whole with what is known of them: the store's own checksums, and a manifest's.

Of an object that comes in parts nothing is known that these could be compared with, unless all of it has come; the
CRC-32s of its records are compared instead (`verification`).
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
    """With what one file was compared, and with what it could not be."""

    by: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def as_details(self) -> dict[str, Any]:
        return {"by": list(self.by), "left_out": list(self.left_out)}


NOTHING = Compared()


def from_details(details: Mapping[str, Any] | None) -> Compared:
    """What `Compared.as_details` made."""
    return NOTHING if not details else Compared(tuple(details["by"]), tuple(details["left_out"]))


@dataclass(frozen=True)
class WholeChecks:
    """How this load compares objects that come whole."""

    verify: str
    known: Mapping[str, KnownSum] = field(default_factory=dict)
    """What the manifests beside the checkpoint tell, by `manifest_find.key_of`."""
    notes: tuple[str, ...] = ()
    """What the receipt is to say of them."""

    def compare(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> Compared:
        """Compares the whole object at `path` in one pass; `on_bytes` is told 0 as it goes on.

        With ``verify="off"``, and of what nothing is known, nothing is read. Raises `CorruptError`.
        """
        if self.verify == "off":
            return NOTHING
        told = fastest_first(store.stored_sums(info))
        usable = [one for one in told if _can_compute(one)]
        chosen = usable[:1]
        left_out = () if usable else tuple(f"{one.label} ({_why_not(one)})" for one in told)
        listed = self._listed(store, info)
        if listed is not None:
            # The store's own SHA-256 may be another one: then one of the two is wrong, and is found out here.
            chosen = [one for one in chosen if (one.algorithm, one.value) != (listed.algorithm, listed.value)]
            chosen.append(listed)
        if chosen:
            _compare(chosen, path, store.describe(info.name), on_bytes)
        return Compared(tuple(one.label for one in chosen), left_out)

    def compare_in_place(self, store: Store, info: ObjectInfo, path: str, on_bytes: OnBytes) -> Compared:
        """As `compare`, of a file that is used where it lies: with ``verify="before"`` only.

        It would be read to its end otherwise, whatever is restored of it.
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
        """Whether what an earlier load compared is all that this one would."""
        listed = self._listed(store, info)
        return self.verify == "off" or (
            compared != NOTHING and (listed is None or listed.label in compared.by)
        )

    def left_out_of_parts(self, store: Store, info: ObjectInfo) -> tuple[str, ...]:
        """What is not compared of an object of which only parts have come."""
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


class _Running:
    """One checksum, over the whole or over parts whose checksums are summed in turn."""

    def __init__(self, told: StoredSum) -> None:
        self.told = told
        self._algorithm = told.algorithm
        self._left = list(told.part_sizes)
        self._of_parts = bytearray()
        self._digest = self._new()

    def update(self, data: memoryview) -> None:
        while self.told.n_parts and self._left and len(data) >= self._left[0]:
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
        if not self.told.n_parts:
            return self._digest.digest()
        whole = self._new()
        whole.update(memoryview(self._of_parts))
        return whole.digest()

    def _new(self) -> Digest:
        digest = new_digest(self._algorithm)
        if digest is None:
            raise RankloadError(f"{self.told.label}: {_why_not(self.told)}")
        return digest


def _compare(chosen: list[StoredSum], path: str, described: str, on_bytes: OnBytes) -> None:
    running = [_Running(one) for one in chosen]
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            for one in running:
                one.update(buffer[:n_bytes])
            on_bytes(0)
    for one in running:
        got = one.value()
        if got != one.told.value:
            raise CorruptError(
                f"{described}: its bytes are not those that were stored: {one.told.label}: expected "
                f"{one.told.value.hex()}, got {got.hex()}",
                path=described,
            )
