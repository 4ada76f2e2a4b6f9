"""Files that come in parts: what a process that was killed had landed is found again, if it is still right."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.cache.holes import PartialFile
from rankload.loader.checksums import crc32

DATA = random.Random(3).randbytes(5000)


def land(file: PartialFile, start: int, stop: int) -> None:
    file.write(start, memoryview(DATA)[start:stop])
    file.land(start, stop, crc32(DATA[start:stop]))


def whole(file: PartialFile) -> tuple[ByteRange, ...]:
    return file.missing([ByteRange(0, len(DATA))])


def test_what_landed_is_there_for_the_next_process(tmp_path: Path) -> None:
    path = str(tmp_path / "object")
    first = PartialFile(path, len(DATA))
    assert whole(first) == (ByteRange(0, 5000),)
    land(first, 100, 300)
    first.write(1000, memoryview(DATA)[1000:1500])  # written, and killed before it was noted
    land(first, 4000, 5000)
    assert first.landed_bytes == 1200
    with pytest.raises(BlockingIOError):
        PartialFile(path, len(DATA))
    first.close()
    second = PartialFile(path, len(DATA))
    assert (second.resumed_bytes, second.landed_bytes) == (1200, 0)
    assert whole(second) == (ByteRange(0, 100), ByteRange(300, 4000))
    for gap in whole(second):
        land(second, *gap)
    assert whole(second) == ()
    second.close()
    assert Path(path).read_bytes() == DATA


@given(st.integers(0, 23), st.integers(0, 4999), st.booleans())
def test_damage_of_the_record_or_the_bytes_is_noticed(cut: int, position: int, flip: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "object")
        file = PartialFile(path, len(DATA))
        for start in range(0, 5000, 1000):
            land(file, start, start + 1000)
        file.close()
        if flip:
            with open(path, "r+b") as raw:
                raw.seek(position)
                raw.write(bytes([DATA[position] ^ 1]))
            expected = 5000 - 1000
        else:
            # The last record was cut short.
            os.truncate(f"{path}.landed", 5 * 24 - (24 - cut))
            expected = 4000
        file = PartialFile(path, len(DATA))
        assert file.resumed_bytes == expected
        for gap in whole(file):
            land(file, *gap)
        file.close()
        again = PartialFile(path, len(DATA))
        assert again.resumed_bytes == 5000
        assert Path(path).read_bytes() == DATA
        again.close()
