"""Names a checkpoint's file on this node, and a part of one. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class NodeFile:
    """One file on this node: all of it, or its index alone where it is remote and comes in parts."""

    name: str = field(repr=False)  # may have a signature in it
    """As it was asked for."""
    source: str
    """The object it came from, after links were followed, without secrets."""
    path: str
    """What to read: the file, expanded where it was compressed; of an archive, its folder."""
    kind: Literal["file", "archive"]
    members: tuple[str, ...] = ()
    """An archive's regular files, relative to `path`."""
    modified_s: float | None = None
    """When it was last written, in seconds of the epoch; None where it is not used in place."""


@dataclass(frozen=True, slots=True)
class ItemSpan:
    """Where a torch file lies inside a larger file: its bytes ``[start, stop)``."""

    start: int
    stop: int
    zstd: bool = False
    """Whether its bytes are compressed by zstd."""
    whole: bool = False
    """Whether this rank reads all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class FileItem:
    """One torch file inside a larger file."""

    file: NodeFile
    span: ItemSpan
    key: str
    """What it holds, for messages; its own among the items of the file."""
