"""Asking an S3 server for its checksums of one object, and where those of several parts begin and end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .sums import StoredSum, in_s3

_PARTS_PER_PAGE = 1000


def ask_s3(files: Any, name: str, version: str | None) -> tuple[StoredSum, ...]:
    """Of the object `name` in `files` (s3fs), where its ETag is still `version`; none where the server tells none.

    One request; others where the only checksum is of parts. Servers that do not know how to answer tell nothing.
    """
    bucket, key, version_id = files.split_path(name)
    place = {
        "Bucket": bucket,
        "Key": key,
        **({"VersionId": version_id} if version_id else {}),
        **files.req_kw,
    }
    try:
        told = files.call_s3("head_object", **place, ChecksumMode="ENABLED")
    except Exception:
        # What it means that the object can't be had, the download itself tells.
        return ()
    if version is not None and told.get("ETag") != version:
        return ()
    sums = in_s3(told)
    if not sums or any(not one.n_parts for one in sums):
        return sums
    sizes = _part_sizes(files, place)
    fits = sum(sizes) == told.get("ContentLength")
    return tuple(
        replace(one, part_sizes=sizes) if fits and len(sizes) == one.n_parts else one for one in sums
    )


def _part_sizes(files: Any, place: dict[str, Any]) -> tuple[int, ...]:
    """None where the server does not tell, or not of all."""
    found: list[tuple[int, int]] = []
    marker = 0
    while True:
        try:
            told = files.call_s3(
                "get_object_attributes",
                **place,
                ObjectAttributes=["ObjectParts"],
                MaxParts=_PARTS_PER_PAGE,
                PartNumberMarker=marker,
            )
            page = _numbered(told.get("ObjectParts", {}).get("Parts", []))
        except Exception:
            return ()
        found += page
        following = told.get("ObjectParts", {}).get("NextPartNumberMarker") or 0
        if not page or not told["ObjectParts"].get("IsTruncated") or following <= marker:
            return tuple(size for _, size in sorted(found))
        marker = int(following)


def _numbered(parts: Sequence[Any]) -> list[tuple[int, int]]:
    return [(int(one["PartNumber"]), int(one["Size"])) for one in parts]
