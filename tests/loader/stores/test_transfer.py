"""How much of a transfer has arrived, where the backend does not say."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fsspec.implementations.memory import MemoryFileSystem
from rankload.loader.stores.fsspec import FsspecStore
from rankload.loader.stores.transfer import bytes_arrived, bytes_on_disk

ODD, HOLE = 8141, 1 << 20


def test_what_has_arrived_is_no_more_than_a_files_size_and_no_hole(tmp_path: Path) -> None:
    for name, body, size in (("odd", b"x" * ODD, ODD), ("hole", b"x" * 4096, HOLE)):
        with open(tmp_path / name, "wb") as file:
            file.write(body)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    assert bytes_on_disk(str(tmp_path / "odd")) > ODD
    assert bytes_arrived(str(tmp_path / "odd")) == ODD
    assert bytes_arrived(str(tmp_path / "hole")) < HOLE
    assert ODD < bytes_arrived(str(tmp_path)) < ODD + HOLE
    assert bytes_arrived(str(tmp_path / "missing")) == 0


class Silent(MemoryFileSystem):
    """Never calls back, and returns long after the file is there."""

    def get_file(self, rpath: str, lpath: str, **more: object) -> None:  # type: ignore[override]
        Path(lpath).write_bytes(self.cat_file(rpath))
        with open(lpath, "rb+") as file:
            os.fsync(file.fileno())
        time.sleep(0.5)


def test_a_backend_that_says_nothing_is_told_to_the_byte(tmp_path: Path) -> None:
    filesystem = Silent()
    filesystem.pipe_file("/transfer/odd", b"x" * ODD)
    told: list[int] = []
    try:
        FsspecStore(filesystem).download("/transfer/odd", str(tmp_path / "odd"), told.append)
    finally:
        filesystem.rm_file("/transfer/odd")
    assert sum(told) == ODD
