"""Markdown tables, and the place in a page that they are written to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_between_markers(page: str, name: str, text: str) -> None:
    """Replaces what lies between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in `page` (from the repository's root)."""
    path = REPOSITORY / page
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} has no {begin} ... {end} to write between")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
