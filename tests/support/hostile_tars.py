"""Tars that are made of single members, and what hostile ones hold."""

from __future__ import annotations

import io
import tarfile


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_bytes(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


HOSTILE = {
    "absolute": [entry("/etc/passwd", b"x")],
    "dotdot": [entry("a/../../x", b"x")],
    "dotdot folder": [entry("..", type=tarfile.DIRTYPE)],
    "nameless file": [entry("./", b"x")],
    "symlink": [entry("l", type=tarfile.SYMTYPE, linkname="/etc"), entry("l/x", b"x")],
    "hard link": [entry("l", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "device": [entry("d", type=tarfile.CHRTYPE)],
    "block device": [entry("d", type=tarfile.BLKTYPE)],
    "pipe": [entry("p", type=tarfile.FIFOTYPE)],
    "twice": [entry("a", b"1"), entry("./a", b"2")],
    "file and folder": [entry("a", b"1"), entry("a/b", b"2")],
    "folder and file": [entry("a/b", b"1"), entry("a", b"2")],
    "backslash": [entry("a\\..\\b", b"x")],
    "drive": [entry("C:/x", b"x")],
    "long name": [entry("x" * 300, b"x")],
    "folder link": [entry("d", type=tarfile.SYMTYPE, linkname=".."), entry("d/x", b"x")],
    "link to a link": [
        entry("l", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("h", type=tarfile.LNKTYPE, linkname="l"),
        entry("h", b"x"),
    ],
    "dots between": [entry("a/./../../x", b"x")],
    "extended name": [entry("a", b"x", pax_headers={"path": "../x"})],
    "extended absolute name": [entry("a", b"x", pax_headers={"path": "/etc/x"})],
    "extended nul": [entry("a", b"x", pax_headers={"path": "a\0b"})],
    "extended size": [entry("a", b"x" * 9, pax_headers={"size": "99999999999"})],
    "extended negative size": [entry("a", b"x" * 9, pax_headers={"size": "-1"})],
    "extended link": [entry("a", type=tarfile.SYMTYPE, linkname="x", pax_headers={"linkpath": "/etc"})],
    "long name upward": [entry("../" * 60 + "x", b"x")],
    "part of a volume": [entry("m", b"x", type=b"M")],
    "volume": [entry("v", type=b"V")],
    "unknown type": [entry("u", b"x", type=b"Z")],
    "folder with contents": [entry("f", b"x", type=tarfile.DIRTYPE)],
    "old sparse": [entry("s", b"x", type=tarfile.GNUTYPE_SPARSE)],
    "sparse of no version": [
        entry("s", b"x", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "99999999999"})
    ],
    "deep": [entry("d/" * 1000 + "x", b"x")],
    "sparse": [entry("s", b"", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.name": "s"})],
}


def patched_header(data: bytes, at: int, field: slice, value: bytes) -> bytes:
    header = bytearray(data[at : at + 512])
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


SIZE, TYPE = slice(124, 136), slice(156, 157)
PLAIN = tar_bytes(entry("a", b"x" * 1000), entry("b", b"y" * 1000), form=tarfile.USTAR_FORMAT)
