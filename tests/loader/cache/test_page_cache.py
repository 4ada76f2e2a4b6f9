"""The page cache has what was just read, and not what was dropped from it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from rankload.loader.cache.page_cache import is_cached

NBYTES = 1 << 20


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(NBYTES))
    with path.open("rb+") as file:
        os.fsync(file)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_file_that_was_read_and_one_that_was_dropped(written: Path) -> None:
    written.read_bytes()
    if not is_cached(str(written), 0, NBYTES):
        pytest.skip("this file system does not tell")
    assert is_cached(str(written), NBYTES - 1, NBYTES)
    with written.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if is_cached(str(written), 0, NBYTES):
            pytest.skip("this file system keeps what it was told to drop")
        file.read(8192)
    assert not is_cached(str(written), 0, NBYTES)


def test_what_is_not_there_is_not_cached(written: Path) -> None:
    assert not is_cached(str(written), 0, NBYTES + 1)
    assert not is_cached(str(written.parent / "none"), 0, 1)
    assert not is_cached(str(written.parent), 0, 1)
