from __future__ import annotations

from rankload.loader.plurals import counted, in_units


def test_one_is_told_in_the_singular() -> None:
    told = [counted(count, "byte") for count in (0, 1, 2, 1200)]
    assert told == ["0 bytes", "1 byte", "2 bytes", "1,200 bytes"]
    assert [counted(count, "entry", "entries") for count in (1, 3)] == ["1 entry", "3 entries"]


def test_bytes_have_three_digits_and_a_unit() -> None:
    told = [
        in_units(size) for size in (0, 1, 999, 1000, 1234, 99_949, 999_499, 999_500, 71_300_000_000, 10**16)
    ]
    assert told == [
        *(
            "0 bytes",
            "1 byte",
            "999 bytes",
            "1.00 KB",
            "1.23 KB",
            "99.9 KB",
            "999 KB",
            "1.00 MB",
            "71.3 GB",
            "10.0 PB",
        ),
    ]
