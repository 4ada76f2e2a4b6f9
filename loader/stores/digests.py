"""Checksums by name, of bytes that come one after the other: CRCs from packages that are there, hashes from hashlib.

A CRC's bytes are those of its number, the highest first, as stores tell it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from typing import Any, Protocol

from ..checksums import crc32

CRC_BYTES = {"crc32": 4, "crc32c": 4, "crc64nvme": 8}
HASH_BYTES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}
ALGORITHMS = (*CRC_BYTES, "sha1", "sha256", "sha512", "md5")
"""The fastest first."""
_Crc = Callable[[Any, int], int]


class Digest(Protocol):
    """One object's checksum, under way."""

    def update(self, data: memoryview) -> None:
        """Takes in what comes next."""

    def digest(self) -> bytes:
        """Of all that came."""


class _RunningCrc:
    def __init__(self, crc: _Crc, nbytes: int) -> None:
        self._crc = crc
        self._nbytes = nbytes
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = self._crc(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._nbytes, "big")


def digest_bytes(algorithm: str) -> int | None:
    """How long a checksum of this name is; None for one that is not known."""
    return CRC_BYTES.get(algorithm) or HASH_BYTES.get(algorithm)


def new_digest(algorithm: str) -> Digest | None:
    """None where no package that computes it is installed (`packages_of` names them)."""
    if algorithm in CRC_BYTES:
        crc = _crc_of(algorithm)
        return None if crc is None else _RunningCrc(crc, CRC_BYTES[algorithm])
    return hashlib.new(algorithm, usedforsecurity=False)


def packages_of(algorithm: str) -> tuple[str, ...]:
    """Distributions of which any one computes `algorithm`; none where the standard library does."""
    return tuple(package for package, _, _ in _PACKAGES.get(algorithm, ()))


def _crc_of(algorithm: str) -> _Crc | None:
    if algorithm == "crc32":
        return crc32
    for _, module, crc_in in _PACKAGES[algorithm]:
        try:
            return crc_in(importlib.import_module(module), algorithm)
        except (ImportError, AttributeError, KeyError):
            # Versions without this polynomial are as good as none.
            continue
    return None


def _in_awscrt(module: Any, algorithm: str) -> _Crc:
    crc: _Crc = getattr(module, algorithm)
    return crc


def _in_google(module: Any, algorithm: str) -> _Crc:
    extend = module.extend
    # It takes read-only bytes and nothing else.
    return lambda data, value: int(extend(value, bytes(data)))


def _in_anycrc(module: Any, algorithm: str) -> _Crc:
    calc = module.Model({"crc32c": "CRC32-ISCSI", "crc64nvme": "CRC64-NVME"}[algorithm]).calc
    return lambda data, value: int(calc(data, value))


_PACKAGES: dict[str, tuple[tuple[str, str, Callable[[Any, str], _Crc]], ...]] = {
    "crc32c": (
        ("awscrt", "awscrt.checksums", _in_awscrt),
        ("anycrc", "anycrc", _in_anycrc),
        ("google-crc32c", "google_crc32c", _in_google),
    ),
    "crc64nvme": (("awscrt", "awscrt.checksums", _in_awscrt), ("anycrc", "anycrc", _in_anycrc)),
}
