"""What commands print: facts, tables and trees, drawn by rich on a terminal and as plain lines anywhere else.

A block is a value, and knows neither where it goes nor rich. `show` prints blocks: without colours, box drawings or
cut lines unless standard output is a terminal. Names in blocks are shown as they are: nothing in them is markup, and
control characters, which could change what a terminal shows, are escaped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...distributed.printable import printable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Line:
    """One line of text; empty for a blank line."""

    text: str = ""
    strong: bool = False
    """Whether a terminal shows it bold: a heading, or a verdict."""


@dataclass(frozen=True)
class Facts:
    """Names and values, one a line; a pair whose value is None is left out."""

    pairs: Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Table:
    """Rows under headings."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    """Columns that are aligned to the right: numbers."""


@dataclass
class Branch:
    """A tree: a label, what stands behind it in columns, and branches."""

    label: str
    columns: tuple[str, ...] = ()
    branches: list[Branch] = field(default_factory=list)


Block = Line | Facts | Table | Branch


def show(blocks: Sequence[Block]) -> None:
    """Prints `blocks` to standard output, one under the other."""
    if sys.stdout.isatty():
        _draw(blocks)
    else:
        for block in blocks:
            for line in plain(block):
                print(line)


def plain(block: Block) -> Iterator[str]:
    """The lines of `block` without colours and box drawings."""
    if isinstance(block, Line):
        yield printable(block.text)
    elif isinstance(block, Facts):
        pairs = [(name, value) for name, value in block.pairs if value is not None]
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            yield f"{name:<{width}}  {printable(value)}".rstrip()
    elif isinstance(block, Table):
        rows = [[printable(cell) for cell in row] for row in (block.headings, *block.rows)]
        yield from _aligned(rows, block.right)
    else:
        yield from _aligned([(f"{'  ' * depth}{label}", *columns) for depth, label, columns in _walk(block)])


def _walk(tree: Branch) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Depth, label and columns of each branch of `tree`, itself first."""
    pending = [(0, tree)]
    while pending:
        depth, branch = pending.pop()
        yield depth, printable(branch.label), tuple(map(printable, branch.columns))
        pending += ((depth + 1, one) for one in reversed(branch.branches))


def _with_guides(tree: Branch) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """As `_walk`, with the lines that lead to each branch in place of its depth."""
    pending = [("", "", tree)]
    while pending:
        guide, below, branch = pending.pop()
        yield guide, printable(branch.label), tuple(map(printable, branch.columns))
        last = len(branch.branches) - 1
        pending += reversed(
            [
                (f"{below}└── ", f"{below}    ", one)
                if index == last
                else (f"{below}├── ", f"{below}│   ", one)
                for index, one in enumerate(branch.branches)
            ]
        )


def _aligned(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> Iterator[str]:
    """`rows` as lines, their cells under each other."""
    widths = _widths(rows)
    for row in rows:
        cells = (
            f"{cell:>{widths[column]}}" if column in right else f"{cell:<{widths[column]}}"
            for column, cell in enumerate(row)
        )
        yield "  ".join(cells).rstrip()


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Characters of each column; a cell that is a row by itself may be longer."""
    widths: list[int] = []
    for row in rows:
        widths += [0] * (len(row) - len(widths))
        for column, cell in enumerate(row if len(row) > 1 else ()):
            widths[column] = max(widths[column], len(cell))
    return widths


def _draw(blocks: Sequence[Block]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for block in blocks:
        _draw_one(console, block)


def _draw_one(console: Console, block: Block) -> None:
    from rich import box, table, text

    if isinstance(block, Line):
        console.print(text.Text(printable(block.text), style="bold" if block.strong else ""))
    elif isinstance(block, Facts):
        grid = table.Table.grid(padding=(0, 2))
        grid.add_column(style="cyan")
        for name, value in block.pairs:
            if value is not None:
                grid.add_row(name, text.Text(printable(value), overflow="fold"))
        console.print(grid)
    elif isinstance(block, Table):
        drawn = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, heading in enumerate(block.headings):
            drawn.add_column(heading, justify="right" if column in block.right else "left", overflow="fold")
        for row in block.rows:
            drawn.add_row(*(text.Text(printable(cell)) for cell in row))
        console.print(drawn)
    else:
        rows = list(_with_guides(block))
        widths = _widths([(guide + label, *columns) for guide, label, columns in rows])
        for guide, label, columns in rows:
            line = text.Text(guide, style="dim")
            line.append(f"{label:<{widths[0] - len(guide)}}", style="not dim" if columns else "not dim cyan")
            for cell, width in zip(columns, widths[1:], strict=False):
                line.append(f"  {cell:<{width}}", style="not dim")
            line.rstrip()
            console.print(line, soft_wrap=True)
