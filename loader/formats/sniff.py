"""Recognises what kind of file it is from its first bytes. Free of torch."""

from __future__ import annotations

import os

HEAD_BYTES = 512
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a torch file before 1.6 (``torch.serialization.MAGIC_NUMBER``)."""
_LEGACY_MAGIC_BYTES = LEGACY_MAGIC.to_bytes(10, "little")

KINDS: dict[str, str] = {
    "torch-zip": "a zip file",
    "torch-legacy": "a torch file of the format before 1.6",
    "tar": "a tar archive",
    "gzip": "a gzip-compressed file",
    "bzip2": "a bzip2-compressed file",
    "xz": "an xz-compressed file",
    "zstd": "a zstd-compressed file",
    "safetensors": "a safetensors file",
    "html": "an HTML page, as servers answer when something is wrong",
    "xml": "an XML document, as object stores answer when something is wrong",
    "json": "a JSON document",
    "pickle": "a plain pickle",
    "hdf5": "an HDF5 file",
    "gguf": "a GGUF file",
    "lfs": "a pointer of Git LFS, not the file that it stands for",
    "empty": "empty",
    "text": "a text file",
    "unknown": "of an unknown kind",
}
"""Every kind of file, and how messages describe it."""


def sniff(source: str | os.PathLike[str] | bytes) -> str:
    """The kind of a file, one of the keys of `KINDS`, given its path or its first ``HEAD_BYTES`` bytes.

    Any zip is ``torch-zip``: only its directory shows whether torch wrote it. A compressed file is named by its
    compression. Raises OSError where the path cannot be read.
    """
    if isinstance(source, bytes):
        head = source[:HEAD_BYTES]
    else:
        with open(source, "rb") as file:
            head = file.read(HEAD_BYTES)
    if not head:
        return "empty"
    for magic, kind in (
        (b"PK\3\4", "torch-zip"),
        (b"PK\5\6", "torch-zip"),
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x89HDF\r\n", "hdf5"),
        (b"GGUF", "gguf"),
        (b"version https://git-lfs.github.com/spec/", "lfs"),
    ):
        if head.startswith(magic):
            return kind
    if _is_tar(head):
        return "tar"
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if _LEGACY_MAGIC_BYTES in head[:32] or str(LEGACY_MAGIC).encode() in head[:32]:
        return "torch-legacy"
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "pickle"
    return _text_kind(head)


def _is_tar(head: bytes) -> bool:
    if head[257:262] == b"ustar":
        return True
    # Before POSIX, tar had no magic: only the header's own checksum identifies it.
    if len(head) < 512 or not head[0]:
        return False
    digits = head[148:156].strip(b" \0")
    if not digits or any(digit not in b"01234567" for digit in digits):
        return False
    return sum(head[:148]) + 8 * 0x20 + sum(head[156:512]) == int(digits, 8)


def _text_kind(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "html"
    if start.startswith((b"<?xml", b"<error", b"<!--")):
        return "html" if b"<html" in start else "xml"
    if start.startswith((b"{", b"[")) and b"\0" not in head:
        return "json"
    if all(byte >= 0x20 or byte in b"\t\r\n\f" for byte in head):
        return "text"
    return "unknown"
