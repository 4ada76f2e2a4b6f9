"""Markdown tables, and the place in a page that they are written to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def publish(page: str | Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of `name` in `page`, a path from the repository's root.

    Raises `SystemExit` where the markers are not there once each, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    path = REPOSITORY / page
    whole = path.read_text()
    before, found, rest = whole.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in rest:
        raise SystemExit(f"{path} has no place for the table: {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
