"""What was begun of a remote object that comes in parts, as the rest of its node is told. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..ranges.base import RangeSource
from ..ranges.window import WindowSource
from ..stores.base import ObjectInfo
from .origin import Origin


@dataclass(frozen=True)
class Begun:
    """An object that comes in parts."""

    path: str
    """On this node: its file, or an archive's folder."""
    kind: Literal["file", "archive"]
    size_bytes: int
    fetched_bytes: int
    """So far, by this load."""
    members: tuple[str, ...] = ()
    """An archive's regular files, relative to `path`."""
    parts: Mapping[str, Origin] = field(default_factory=dict)
    """Where those of them come from that come in parts; of a file that does, itself, under ``""``."""


def origin_of(info: ObjectInfo, source: RangeSource) -> Origin:
    """Where a source's bytes come from, for other ranks."""
    if not isinstance(source, WindowSource):
        return Origin(info.name, source.size_bytes, info.version, source.version)
    whole = source.whole
    return Origin(info.name, whole.size_bytes, info.version, whole.version, source.base, source.size_bytes)
