"""Reads the checksums of whole objects that stores keep: from their answers, and for S3 by a request (`ask_s3`).

    S3             x-amz-checksum-*, of the whole object or of its parts' checksums (COMPOSITE, ``...-N``)
    Google Cloud   x-goog-hash, crc32c and md5Hash: of the bytes as stored
    Azure Blob     x-ms-blob-content-md5, Content-MD5
    any server     Repr-Digest (RFC 9530), Digest (RFC 3230), Content-MD5
    Hub            X-Linked-ETag, ``lfs.sha256``: the SHA-256 of a large file

An ETag is not taken for an MD5: it is none for encrypted objects and for those that were uploaded in parts.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..plurals import counted
from .digests import ALGORITHMS, digest_bytes

STORE = "the store"
"""`StoredSum.told_by` of what a store states itself."""
_AMZ = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")
_DIGESTS = {"sha-256": "sha256", "sha-512": "sha512", "sha": "sha1", "md5": "md5"}
"""Algorithms by their names in ``Repr-Digest`` and ``Digest``."""
_SHA256 = re.compile(r'"?([0-9a-fA-F]{64})"?')
_COUNT = re.compile(r"[1-9][0-9]{0,8}")
"""Of an object's parts; S3 takes 10,000."""
_GCS = frozenset({"gs", "gcs"})
_AZURE = frozenset({"az", "abfs", "abfss", "adl", "wasb", "wasbs"})
_PARTS_PER_PAGE = 1000


@dataclass(frozen=True, slots=True)
class StoredSum:
    """A checksum of a whole object, as the store or a manifest states it."""

    algorithm: str
    """One of `digests.ALGORITHMS`."""
    value: bytes
    told_by: str = STORE
    """Who states it, for messages."""
    n_parts: int = 0
    """Above 0: `value` is the checksum of the checksums of so many parts, one after the other (S3's ``COMPOSITE``)."""
    part_sizes: tuple[int, ...] = ()
    """The bytes of each part, where they are known: without them, such a checksum cannot be computed."""

    @property
    def label(self) -> str:
        """What was compared, for receipts and messages."""
        parts = f" of {counted(self.n_parts, 'part')}" if self.n_parts else ""
        return f"{self.algorithm}{parts} of {self.told_by}"


def in_headers(headers: Any, *, whole: bool = True) -> tuple[StoredSum, ...]:
    """The checksums in the headers of an answer (http.client's, or a mapping).

    `whole` is False for an answer with a part of the object: then only fields that describe the whole one count. There
    are none where the object is sent otherwise than it is stored (``Content-Encoding``).
    """
    for name in ("Content-Encoding", "x-goog-stored-content-encoding"):
        if headers.get(name, "identity").strip().lower() not in ("identity", "", "aws-chunked"):
            return ()
    found = [*_google(headers), *_azure(headers), *_digest_fields(headers)]
    if whole:
        found += _amazon(headers)
        found += _from_base64("md5", headers.get("Content-MD5"))
    return tuple(dict.fromkeys(found))


def in_linked(headers: Any) -> tuple[StoredSum, ...]:
    """The SHA-256 in the headers of the Hub's own answer, of the file that it redirects to."""
    match = _SHA256.fullmatch(headers.get("X-Linked-ETag", "").strip())
    return () if match is None else (StoredSum("sha256", bytes.fromhex(match[1])),)


def in_info(protocols: Iterable[str], info: Mapping[str, Any]) -> tuple[StoredSum, ...]:
    """The checksums in what one of fsspec's file systems, of these `protocols`, says of an object."""
    names = set(protocols)
    if names & _GCS and (info.get("contentEncoding") or "identity") == "identity":
        return (*_from_base64("crc32c", info.get("crc32c")), *_from_base64("md5", info.get("md5Hash")))
    if names & _AZURE:
        settings = info.get("content_settings") or {}
        value = settings.get("content_md5") if isinstance(settings, Mapping) else settings.content_md5
        return _exactly("md5", bytes(value)) if isinstance(value, bytes | bytearray) else ()
    if "hf" in names and isinstance(info.get("lfs"), Mapping):
        match = _SHA256.fullmatch(str(info["lfs"].get("sha256")))
        return () if match is None else (StoredSum("sha256", bytes.fromhex(match[1])),)
    return ()


def in_s3(answer: Mapping[str, Any]) -> tuple[StoredSum, ...]:
    """The checksums in `answer`, to ``HeadObject`` with ``ChecksumMode``, in botocore's names."""
    headers = {f"x-amz-checksum-{name}": answer.get(f"Checksum{name.upper()}") or "" for name in _AMZ}
    return tuple(_amazon({**headers, "x-amz-checksum-type": answer.get("ChecksumType") or ""}))


def ask_s3(files: Any, name: str) -> tuple[str | None, tuple[StoredSum, ...]]:
    """The ETag of the object `name` in `files` (s3fs), and its checksums.

    Sends one request, and others for the parts' sizes where the only checksum is of parts. None where they fail.
    """
    bucket, key, version_id = files.split_path(name)
    place = {
        "Bucket": bucket,
        "Key": key,
        **({"VersionId": version_id} if version_id else {}),
        **files.req_kw,
    }
    try:
        answer = files.call_s3("head_object", **place, ChecksumMode="ENABLED")
    except Exception:
        # The download itself raises where the object cannot be had.
        return None, ()
    etag, sums = answer.get("ETag"), in_s3(answer)
    if not sums or any(not one.n_parts for one in sums):
        return etag, sums
    sizes = _part_sizes(files, place)
    fits = sum(sizes) == answer.get("ContentLength")
    return etag, tuple(
        replace(one, part_sizes=sizes) if fits and len(sizes) == one.n_parts else one for one in sums
    )


def fastest_first(sums: Iterable[StoredSum]) -> list[StoredSum]:
    """`sums`, the fastest to compute first, and those that lack their parts' sizes last."""
    return sorted(
        sums, key=lambda one: (one.n_parts > 0 and not one.part_sizes, ALGORITHMS.index(one.algorithm))
    )


def _part_sizes(files: Any, place: dict[str, Any]) -> tuple[int, ...]:
    """The bytes of each part, in order; empty where the server does not state all of them."""
    found: list[tuple[int, int]] = []
    marker = 0
    while True:
        try:
            answer = files.call_s3(
                "get_object_attributes",
                **place,
                ObjectAttributes=["ObjectParts"],
                MaxParts=_PARTS_PER_PAGE,
                PartNumberMarker=marker,
            )
            page = _numbered(answer.get("ObjectParts", {}).get("Parts", []))
        except Exception:
            return ()
        found += page
        following = answer.get("ObjectParts", {}).get("NextPartNumberMarker") or 0
        if not page or not answer["ObjectParts"].get("IsTruncated") or following <= marker:
            return tuple(size for _, size in sorted(found))
        marker = int(following)


def _numbered(parts: Sequence[Any]) -> list[tuple[int, int]]:
    return [(int(one["PartNumber"]), int(one["Size"])) for one in parts]


def _amazon(headers: Any) -> Iterator[StoredSum]:
    composite = headers.get("x-amz-checksum-type", "").upper() == "COMPOSITE"
    for algorithm in _AMZ:
        text, dash, count = headers.get(f"x-amz-checksum-{algorithm}", "").strip().partition("-")
        for one in _from_base64(algorithm, text):
            if not dash and not composite:
                yield one
            elif _COUNT.fullmatch(count):
                yield StoredSum(algorithm, one.value, n_parts=int(count))


def _google(headers: Any) -> Iterator[StoredSum]:
    for item in _items(headers, "x-goog-hash"):
        name, _, value = item.partition("=")
        if name.strip() in ("crc32c", "md5"):
            yield from _from_base64(name.strip(), value)


def _azure(headers: Any) -> Iterator[StoredSum]:
    # The MD5 of an append or page blob may be from before its last change.
    if headers.get("x-ms-blob-type", "") == "BlockBlob":
        yield from _from_base64("md5", headers.get("x-ms-blob-content-md5"))


def _digest_fields(headers: Any) -> Iterator[StoredSum]:
    for field in ("Repr-Digest", "Digest"):
        for item in _items(headers, field):
            name, _, value = item.partition("=")
            value = value.strip()
            if field == "Repr-Digest":
                value = value[1:-1] if value.startswith(":") and value.endswith(":") else ""
            algorithm = _DIGESTS.get(name.strip().lower())
            if algorithm is not None:
                yield from _from_base64(algorithm, value)


def _items(headers: Any, name: str) -> Iterator[str]:
    """The items of a comma-separated list, which may be spread over several fields of one name."""
    many = getattr(headers, "get_all", None)
    fields = many(name, []) if many is not None else [headers.get(name, "")]
    for one in fields:
        yield from (item.strip() for item in str(one).split(",") if item.strip())


def _from_base64(algorithm: str, text: str | None) -> tuple[StoredSum, ...]:
    try:
        value = base64.b64decode(text or "", validate=True)
    except (binascii.Error, ValueError):
        return ()
    return _exactly(algorithm, value)


def _exactly(algorithm: str, value: bytes) -> tuple[StoredSum, ...]:
    return (StoredSum(algorithm, value),) if len(value) == digest_bytes(algorithm) else ()
