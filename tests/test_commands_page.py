"""docs/commands.md shows what the commands really print: all but the long ones are run again, and compared."""

from __future__ import annotations

import re

import pytest
from commands_page import BEGIN, END, EXAMPLES, PAGE, head, on_page, page, section
from rankload.launch.cli import COMMANDS


def plain(text: str) -> str:
    """`text` without numbers that other versions or machines would change, and without the width of columns."""
    text = re.sub(r"\d[\d,.]* (bytes|[KMGTP]B|s)\b|\b\d[\d,]{3,}\b", "N", text)
    return re.sub(r"\s+", " ", text).strip()


def test_the_page_has_every_example_and_no_other() -> None:
    shown = on_page()
    assert list(shown) == [head(one) for one in EXAMPLES], "run make docs-commands"
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert text.strip() == page(shown).strip()


def test_every_command_has_an_example() -> None:
    assert {one.command for one in EXAMPLES} == set(COMMANDS)


COMPARED = [one for one in EXAMPLES if one.compared]


@pytest.mark.parametrize("example", COMPARED, ids=[one.line for one in COMPARED])
def test_the_page_shows_what_the_command_prints(example) -> None:
    assert plain(section(example)) == plain(on_page()[head(example)]), "run make docs-commands"
