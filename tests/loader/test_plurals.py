from __future__ import annotations

from rankload.loader.plurals import counted


def test_one_is_told_in_the_singular() -> None:
    told = [counted(count, "byte") for count in (0, 1, 2, 1200)]
    assert told == ["0 bytes", "1 byte", "2 bytes", "1,200 bytes"]
    assert [counted(count, "entry", "entries") for count in (1, 3)] == ["1 entry", "3 entries"]
