"""Reads what fsspec's file systems say of objects: each has its own names for the same. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from .base import Entry, ObjectInfo

_VERSION_FIELDS = (
    "ETag", "etag", "e_tag", "version_id", "VersionId", "generation", "md5Hash", "content_md5", "checksum", "blob_id",
    "LastModified", "last_modified", "mtime", "modified", "created",
)  # fmt: skip
"""What file systems call an object's version; the first one that is set counts."""
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
"""What they call the time when it was last written."""


def object_of(name: str, info: Mapping[str, Any]) -> ObjectInfo:
    """What `info` says of the object `name`."""
    size = info.get("size")
    is_folder = info.get("type") == "directory"
    return ObjectInfo(
        name=name,
        size_bytes=size if isinstance(size, int) and not is_folder else None,
        version=next((str(info[key]) for key in _VERSION_FIELDS if info.get(key)), None),
        is_folder=is_folder,
    )


def is_inside(found: Mapping[str, Any], folder: str) -> bool:
    """Whether it lies in `folder`: some file systems list the folder itself, or a file of that name."""
    own = str(found.get("name", "")).rstrip("/")
    return own != folder and own != f"/{folder}" and own != folder.removeprefix("/")


def entry_of(found: Mapping[str, Any]) -> Entry:
    """What a listing says of one object or folder."""
    is_folder = found.get("type") == "directory"
    size = found.get("size")
    return Entry(
        str(found["name"]).rstrip("/").rpartition("/")[2],
        is_folder,
        size if isinstance(size, int) and not is_folder else None,
        _seconds(next((found[key] for key in _TIME_FIELDS if found.get(key)), None)),
    )


def _seconds(time: Any) -> float | None:
    """A time as file systems state it, in seconds of the epoch."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return None
    if isinstance(time, datetime):
        return time.timestamp()
    return float(time) if isinstance(time, int | float) else None
