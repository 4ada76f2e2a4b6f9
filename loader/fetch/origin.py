"""Where a file that comes in parts comes from, told between ranks. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """An object at one version, or a part of it, for other ranks to open, too."""

    object_name: str
    size_bytes: int
    """Of the whole object."""
    told_version: str | None
    """As the store tells it (`store.ObjectInfo`)."""
    version: str | None
    """As its range source does."""
    base: int = 0
    """Where the file begins in the object: an archive's member."""
    nbytes: int | None = None
    """Of the file; None where it is the whole object."""
