"""Tables that are kept in a document, each between markers of its own."""

from __future__ import annotations

from pathlib import Path


def publish(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of `name` in the document at `path`.

    Raises `SystemExit` where the markers are not there once each, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    whole = path.read_text()
    before, found, rest = whole.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended or begin in rest:
        raise SystemExit(f"{path} has no place for the table: {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
