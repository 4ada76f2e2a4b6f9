"""A number of things in words, for messages."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 file`` or ``1,200 files``; `plural` where it is not `noun` and an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
