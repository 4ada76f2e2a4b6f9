"""Reads storages' bytes once and in order, and compares them with their checksums. Free of torch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .errors import AccessError, CorruptError, NotFoundError
from .options import Verify
from .values import StorageRef

STAGING_BYTES = 8 << 20
"""Bytes read at a time, and the size of the one buffer for what cannot be read straight into its place."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a storage that are wanted; ``start`` counts from the storage's first byte.

    They are read into ``view`` or, where that is None, into the staging buffer (at most ``STAGING_BYTES`` of
    them), for ``use`` to take from there.
    """

    start: int
    nbytes: int
    view: memoryview | None = None
    use: Callable[[], None] | None = None


class StorageReader:
    """Reads pieces of storages, and checks each storage that it reads as ``verify`` says.

    ``before`` and ``during`` differ only in when `check` is called: a storage that it found to be right is
    not summed again. ``on_bytes`` is told of bytes as they are read.
    """

    def __init__(self, verify: Verify, on_bytes: Callable[[int], None] | None) -> None:
        self.verify = verify
        self.on_bytes = on_bytes
        self.staging = bytearray(STAGING_BYTES)
        self._checked: set[StorageRef] = set()

    def check(self, storage: StorageRef) -> None:
        """Reads all of `storage` and raises `CorruptError` where it does not match its checksum."""
        if storage.crc32 is not None and storage not in self._checked:
            _Pass(self, storage, (), summed=True).run(())

    def read(self, storage: StorageRef, pieces: Iterable[Piece], names: Sequence[str]) -> None:
        """Reads `pieces`, each into its place; ``names`` says for messages whose they are.

        Raises `CorruptError` where the file ends first, or the checksum differs: some pieces have been
        written by then.
        """
        summed = self.verify != "off" and storage.crc32 is not None and storage not in self._checked
        _Pass(self, storage, names, summed=summed).run(sorted(pieces, key=lambda piece: piece.start))

    def passed(self, storage: StorageRef) -> None:
        """Notes that `storage` matched its checksum."""
        self._checked.add(storage)


class _Pass:
    """One run over a storage, from its first wanted byte to its last; over all of it where it is summed."""

    def __init__(
        self, reader: StorageReader, storage: StorageRef, names: Sequence[str], *, summed: bool
    ) -> None:
        self.reader = reader
        self.storage = storage
        self.names = names
        self.summed = summed
        self.crc = 0
        self.frontier = 0
        self.staging = memoryview(reader.staging)
        self.file = -1

    def run(self, pieces: Sequence[Piece]) -> None:
        self.file = self._open()
        try:
            for piece in pieces:
                self._pass_over(piece.start)
                if piece.view is not None:
                    for begin in range(0, piece.nbytes, STAGING_BYTES):
                        self._fill(piece.start + begin, piece.view[begin : begin + STAGING_BYTES])
                else:
                    self._fill(piece.start, self.staging[: piece.nbytes])
                    if piece.use is not None:
                        piece.use()
            self._pass_over(self.storage.nbytes)
        finally:
            os.close(self.file)
        if self.summed:
            if self.crc != self.storage.crc32:
                raise self._corrupt(
                    f"has CRC-32 {self.crc:08x}; the file's directory says {self.storage.crc32:08x}. The "
                    "file is damaged"
                )
            self.reader.passed(self.storage)

    def _open(self) -> int:
        path = self.storage.file
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFoundError(f"{path} is gone since its index was read", path=path) from None
        except OSError as error:
            raise AccessError(f"{path} cannot be opened ({error.strerror})", path=path) from error

    def _pass_over(self, position: int) -> None:
        """Sums what lies between the bytes that are wanted."""
        while self.summed and self.frontier < position:
            self._fill(self.frontier, self.staging[: min(STAGING_BYTES, position - self.frontier)])

    def _fill(self, start: int, view: memoryview) -> None:
        """Reads the storage's bytes from ``start`` into all of ``view``."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.file, [view[done:]], self.storage.offset + start + done)
            except OSError as error:
                raise self._corrupt(f"cannot be read at byte {start + done:,} ({error.strerror})") from error
            if count == 0:
                raise self._corrupt(
                    f"ends after {start + done:,} of {self.storage.nbytes:,} bytes: the file was truncated "
                    "since its index was read"
                )
            done += count
        stop = start + done
        if self.summed and stop > self.frontier:
            self.crc = zlib.crc32(view[self.frontier - start :], self.crc)
            self.frontier = stop
        if self.reader.on_bytes is not None:
            self.reader.on_bytes(done)

    def _corrupt(self, text: str) -> CorruptError:
        used = f", used by {', '.join(self.names[:3])}" if self.names else ""
        more = f" and {len(self.names) - 3} more" if len(self.names) > 3 else ""
        return CorruptError(
            f"{self.storage.file}: storage {self.storage.key}{used}{more}, {text}; fetch the file again.",
            path=self.storage.file,
        )
