"""docs/errors.md shows what the commonest mistakes are really answered with: all are made again, and compared."""

from __future__ import annotations

import re

import pytest
from mistakes import BEGIN, END, MISTAKES, PAGE, section

PAGES = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip("\n").split("\n### ")
SHOWN = {f"### {text.removeprefix('### ')}".partition("\n")[0]: text for text in PAGES}


def plain(text: str) -> str:
    """`text` without numbers that other versions of torch would change: sizes and checksums."""
    return re.sub(r"CRC-32 \w{8}|says \w{8}|[\d,]{3,} bytes", "N", text).strip()


def test_there_are_forty_or_more_and_each_has_a_place_on_the_page() -> None:
    assert len(MISTAKES) >= 40
    assert list(SHOWN) == [f"### {one.heading}" for one in MISTAKES]
    assert all(one.remedy for one in MISTAKES)


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=[one.heading for one in MISTAKES])
def test_the_page_shows_what_the_mistake_is_answered_with(index: int) -> None:
    shown = SHOWN[f"### {MISTAKES[index].heading}"]
    made = section(index)
    assert plain(made.removeprefix("### ")) == plain(shown.removeprefix("### ")), "run make docs-errors"
