"""Computes checksums by their S3 names, of bytes that come in order: CRCs by installed packages, hashes by hashlib.

``crc32`` is zlib's, ``crc32c`` Castagnoli's (RFC 3720), ``crc64nvme`` that of NVM Express. A CRC's bytes are those of
its number, the highest first, as stores state it.
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
"""The fastest to compute first."""
_Crc = Callable[[Any, int], int]


class Digest(Protocol):
    """A checksum that is being computed."""

    def update(self, data: memoryview) -> None:
        """Takes in the bytes that come next."""

    def digest(self) -> bytes:
        """The checksum of all bytes so far."""


def new_digest(algorithm: str) -> Digest | None:
    """A checksum of no bytes yet; None where no package that computes it is installed (`packages_of` names them)."""
    if algorithm in CRC_BYTES:
        crc = _crc_of(algorithm)
        return None if crc is None else _RunningCrc(crc, CRC_BYTES[algorithm])
    return hashlib.new(algorithm, usedforsecurity=False)


def digest_bytes(algorithm: str) -> int | None:
    """How many bytes a checksum of this name has; None for a name that is not known."""
    return CRC_BYTES.get(algorithm) or HASH_BYTES.get(algorithm)


def packages_of(algorithm: str) -> tuple[str, ...]:
    """Distributions of which any one computes `algorithm`; none where the standard library does."""
    return tuple(package for package, _, _ in _PACKAGES.get(algorithm, ()))


class _RunningCrc:
    def __init__(self, crc: _Crc, nbytes: int) -> None:
        self._crc = crc
        self._nbytes = nbytes
        self._value = 0

    def update(self, data: memoryview) -> None:
        self._value = self._crc(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._nbytes, "big")


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
    # google_crc32c takes bytes and no memoryview.
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
