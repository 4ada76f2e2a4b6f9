"""Expands gzip, bzip2, xz and zstd files as streams, and refuses those that expand without measure."""

from __future__ import annotations

import bz2
import lzma
import os
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from ..errors import CorruptError, OptionError, UnsafeError
from ..formats.torch_zip import OpenFile, open_local
from ..plurals import counted

COMPRESSED = frozenset({"gzip", "bzip2", "xz", "zstd"})
"""The kinds of `formats.sniff.sniff` that `Expanded` reads."""
MAX_EXPANSION = 1000
"""A file that expands to more than this times its size is taken for a decompression bomb. Deflate's limit is 1032: two
bits for at most 258 bytes."""
SMALL = 16 << 20
"""A file may expand to this many bytes whatever its own size: short files of zeros shrink further."""

_CHUNK = 256 << 10
_ZSTD_CHUNK = 4 << 10
"""zstd's decompressor returns all that a chunk expands to at once, so that its chunks have to be small."""
_LZMA_MEMORY = 512 << 20


class _Decoder(Protocol):
    """What decodes one compressed stream; a file may hold several, one after another."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class Expanded:
    """The contents of the compressed file at `path`, read forward; a context manager.

    Raises `CorruptError` where the file is damaged or ends early, `UnsafeError` where it expands beyond `limit` bytes
    or `MAX_EXPANSION` times its size, and `OptionError` where it is zstd and the package is missing.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        described: str,
        limit: int,
        open_file: OpenFile = open_local,
    ) -> None:
        """`kind` is one of `COMPRESSED`; `described` is what messages call the file, which `open_file` opens."""
        self._described = described
        self._kind = kind
        self._make = _decoder(kind, described)
        self._file = open_file(path)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        self._limit = min(limit, max(SMALL, size * MAX_EXPANSION))
        self._decoder: _Decoder | None = self._make()
        self._pending = b""
        self._ready = b""
        self.total = 0
        """Bytes expanded so far."""

    def __enter__(self) -> Expanded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer at the end only."""
        parts = []
        while size > 0:
            part = self._ready[:size] or self._some(size)
            if not part:
                break
            if self._ready:
                self._ready = self._ready[len(part) :]
            elif len(part) > size:
                part, self._ready = part[:size], part[size:]
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _some(self, size: int) -> bytes:
        while self._decoder is not None:
            try:
                data = self._decode(self._decoder, size)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                raise CorruptError(
                    f"{self._described}: damaged {self._kind} data after {counted(self.total, 'byte')}: {error}",
                    path=self._described,
                ) from error
            if not data:
                continue
            self.total += len(data)
            if self.total > self._limit:
                raise UnsafeError(
                    f"{self._described}: expands beyond {self._limit} bytes; refused as a decompression "
                    "bomb, or for lack of disk space",
                    path=self._described,
                )
            return data
        return b""

    def _decode(self, decoder: _Decoder, size: int) -> bytes:
        if decoder.eof:
            rest = decoder.unused_data or self._next_chunk()
            # Some tools pad with zeros after the last stream.
            self._decoder = self._make() if rest.strip(b"\0") else None
            self._pending = rest
            return b""
        data = b""
        if decoder.needs_input:
            data, self._pending = self._pending or self._next_chunk(), b""
        out = decoder.decompress(data, min(size, _CHUNK))
        if not data and not out and not decoder.eof:
            raise EOFError("the file ends early")
        return out

    def _next_chunk(self) -> bytes:
        return self._file.read(_ZSTD_CHUNK if self._kind == "zstd" else _CHUNK)


class _Gzip:
    """Keeps the input that zlib returns unused, as the other decoders do by themselves."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Zstd:
    """Raises `ValueError` for zstandard's own error, which can only be named once that is imported."""

    needs_input = True

    def __init__(self, zstandard: Any) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=1 << 28).decompressobj()
        self._error: type[Exception] = zstandard.ZstdError

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        try:
            return bytes(self._inner.decompress(data))
        except self._error as error:
            raise ValueError(str(error)) from error


def _decoder(kind: str, described: str) -> Callable[[], _Decoder]:
    if kind == "gzip":
        return _Gzip
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    try:
        import zstandard
    except ImportError as error:
        raise OptionError(
            f"{described}: compressed with zstd, which needs a package that is missing; "
            "pip install 'rankload[zstd]'",
            path=described,
        ) from error
    return lambda: _Zstd(zstandard)
