"""A number of things and of ranks in words, and of bytes in units, for messages."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 file`` or ``1,200 files``; `plural` where it is not `noun` and an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def ranks_text(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 1``, as messages say it."""
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"


def in_units(nbytes: int) -> str:
    """``17 bytes``, ``1.2 KB`` or ``71.3 GB``: powers of 1000, to three digits."""
    size = float(nbytes)
    if size < 1000:
        return counted(nbytes, "byte")
    for unit in ("KB", "MB", "GB", "TB", "PB"):
        size /= 1000
        if size < 999.5 or unit == "PB":
            break
    return f"{size:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f} {unit}"
