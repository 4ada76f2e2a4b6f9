"""Files of checksums beside a checkpoint, in the format that ``sha256sum`` writes and checks. Pure.

    <64 hex digits>  name        two blanks, or a blank and ``*`` for binary
    \\<64 hex digits>  na\\nme     a name with ``\\\\``, ``\\n`` or ``\\r`` in it
    SHA256 (name) = <64 hex digits>

Blank lines and lines that begin with ``#`` are left out.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FormatError

NAMES = ("MANIFEST", "MANIFEST.sha256", "SHA256SUMS", "sha256sum.txt", "checksums.sha256")
"""What is looked for in a checkpoint's folder, in this order; and ``NAME.sha256`` beside a single file ``NAME``."""
LIMIT_BYTES = 4 << 20
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_TAGGED = re.compile(r"(\\?)SHA256 \((.+)\) = ([0-9a-fA-F]{64})", re.DOTALL)
_ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


@dataclass(frozen=True)
class Manifest:
    """SHA-256s by file name, relative to the folder that it lies in."""

    described: str
    """Itself, for messages."""
    sums: Mapping[str, bytes]


def is_manifest(data: bytes) -> bool:
    """Whether the first line that says anything is one of a manifest's: any other kind of file may be so named."""
    first = next((line for line in _lines(data.decode("utf-8", "replace"))), "")
    return _parse(first) is not None


def parse_manifest(data: bytes, described: str) -> Manifest:
    """Raises `FormatError` where a line is none of the format's, or two differ about one file.

    Names that lead out of the folder are left out.
    """
    sums: dict[str, bytes] = {}
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{described}: expected lines as sha256sum writes them, got {error}", path=described
        ) from None
    for line in _lines(text):
        parsed = _parse(line)
        if parsed is None:
            raise FormatError(
                f"{described}: expected lines as sha256sum writes them (64 hex digits, two blanks, a name), got "
                f"{line[:80]!r}; mend it, take it away, or load with verify='off'",
                path=described,
            )
        name, value = parsed
        plain = posixpath.normpath(name)
        if plain.startswith(("/", "../")) or plain in (".", ".."):
            continue
        if sums.setdefault(plain, value) != value:
            raise FormatError(f"{described}: has two different checksums of {plain!r}", path=described)
    return Manifest(described, sums)


def _lines(text: str) -> list[str]:
    lines = (line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n"))
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _parse(line: str) -> tuple[str, bytes] | None:
    match = _LINE.fullmatch(line)
    if match is not None:
        escaped, value, name = match.groups()
    else:
        match = _TAGGED.fullmatch(line)
        if match is None:
            return None
        escaped, name, value = match.groups()
    if escaped:
        name = re.sub(r"\\[\\nr]", lambda found: _ESCAPES[found[0]], name)
    return name, bytes.fromhex(value)
