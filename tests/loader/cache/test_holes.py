"""Files that come in parts: what a process that was killed had landed is found again, if it is still right."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.byte_ranges import ByteRange
from rankload.loader.cache.holes import (
    Landed,
    PartialFile,
    fetching_again,
    record_landed,
    replace_bytes,
)
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


def test_what_another_process_lands_is_not_missing(tmp_path: Path) -> None:
    """That process does not hold the file; whoever does hears of it by the record, and so does the next load."""
    path = str(tmp_path / "object")
    file, seen = PartialFile(path, len(DATA)), Landed(path)
    land(file, 0, 100)
    with open(path, "r+b") as other:
        other.seek(100)
        other.write(DATA[100:300])
    record_landed(path, 100, 300, crc32(DATA[100:300]))
    assert whole(file) == (ByteRange(300, 5000),)
    assert seen.has(0, 300)
    assert file.landed_bytes == 100
    file.forget([ByteRange(50, 150)])
    assert whole(file) == (ByteRange(50, 150), ByteRange(300, 5000))
    record_landed(path, 50, 150, crc32(DATA[50:150]))
    assert whole(file) == (ByteRange(300, 5000),)
    file.close()
    again = PartialFile(path, len(DATA))
    assert again.resumed_bytes == 300
    again.close()


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


@given(st.integers(0, 4999), st.integers(1, 3000), st.lists(st.integers(0, 4999), max_size=2, unique=True))
def test_what_was_put_in_the_place_of_damage_counts_and_so_does_what_lies_beside_it(
    start: int, length: int, damaged: list[int]
) -> None:
    """Bytes that were damaged since they landed count as missing, unless they were replaced."""
    import tempfile

    span = ByteRange(start, min(5000, start + length))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "object")
        file = PartialFile(path, len(DATA))
        for first in range(0, 5000, 1000):
            land(file, first, first + 1000)
        file.close()
        with open(path, "r+b") as raw:
            for position in damaged:
                raw.seek(position)
                raw.write(bytes([DATA[position] ^ 1]))
            raw.flush()
            with replace_bytes(path, [span]):
                raw.seek(span.start)
                raw.write(DATA[span.start : span.stop])
                raw.flush()
        landed = Landed(path)
        assert landed.has(0, 5000)
        again = PartialFile(path, len(DATA))
        # Where all damage of a record was replaced, its bytes are what was recorded again.
        lost = {position // 1000 for position in damaged if not span.start <= position < span.stop}
        outside = [one for one in range(5000) if one // 1000 in lost and not span.start <= one < span.stop]
        kept = 5000 - len(outside)
        assert again.resumed_bytes == kept
        assert again.damaged_bytes == 5000 - kept
        for gap in whole(again):
            assert any(position // 1000 == gap.start // 1000 for position in damaged)
        again.close()


def test_each_load_fetches_each_byte_again_once(tmp_path: Path) -> None:
    path = str(tmp_path / "object")
    for load_id in ("a", "b"):
        with fetching_again(path, load_id, lambda: None) as done:
            assert done.left([ByteRange(0, 100)]) == (ByteRange(0, 100),)
            done.note([ByteRange(20, 30)])
        with fetching_again(path, load_id, lambda: None) as done:
            assert done.left([ByteRange(20, 40)]) == (ByteRange(30, 40),)


def test_one_process_at_a_time_fetches_again(tmp_path: Path) -> None:
    path = str(tmp_path / "object")

    class TooLongError(Exception):
        pass

    def wait() -> None:
        raise TooLongError

    with fetching_again(path, "a", wait), pytest.raises(TooLongError), fetching_again(path, "a", wait):
        raise AssertionError("two at once")
    with fetching_again(path, "a", wait):
        pass
