"""Checks that an HTTP answer has the range, size and version that were asked for. Pure.

`status_error` makes an error of any other status, and decides after which of them another attempt may succeed.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message

from ..errors import AccessError, CorruptError, NotFoundError, RankloadError
from ..plurals import counted
from ..retries import TryAgainError
from ..store_errors import WORTH_RETRYING, refused

Arrived = Callable[[int], None]
"""Called in the reading thread with the number of bytes that have just been placed, before any more are; with 0 about
twice a second while nothing comes, or a connection is made. What it raises ends the read."""
Headers = Message | Mapping[str, str]
_THROTTLED = frozenset({429, 503})
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.IGNORECASE | re.ASCII)
_CODE = re.compile(rb"<Code>([A-Za-z]{1,64})</Code>")
_MAX_RETRY_AFTER_S = 3600.0


@dataclass(frozen=True)
class Pin:
    """One version of an object, as its first answer stated it."""

    size_bytes: int | None = None
    etag: str | None = None
    modified: str | None = None

    @property
    def strong(self) -> str | None:
        """The ETag, where it is a strong one, which may be sent as If-Match."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def version(self) -> str | None:
        """The ETag without its mark, else Last-Modified; None where the answer had neither."""
        return bare_tag(self.etag) if self.etag is not None else self.modified


def pin_of(headers: Headers, size_bytes: int | None) -> Pin:
    """The version that the `headers` of an answer state, of an object of `size_bytes`."""
    return Pin(size_bytes, headers.get("ETag"), headers.get("Last-Modified"))


def check_partial_answer(headers: Headers, start: int, stop: int, pin: Pin, described: str) -> int:
    """How many bytes from `start` on a 206 answer carries: ``stop - start``, or fewer but one at least.

    Raises `CorruptError` where the object is not the one that `pin` fixes, `AccessError` where the answer is of
    another range, contradicts itself or is compressed.
    """
    got_start, got_stop, total = content_range(headers)
    asked = f"bytes {start}-{stop - 1} of {pin.size_bytes}"
    stated = headers.get("Content-Range") or "no Content-Range"
    if total is not None and pin.size_bytes is not None and total != pin.size_bytes:
        raise _changed(described, counted(pin.size_bytes, "byte"), f"{total}")
    check_unchanged(headers, pin, described)
    _check_identity(headers, described)
    if got_start != start or got_stop is None or not start < got_stop <= stop:
        raise AccessError(
            f"{described}: the server answered another range: expected {asked}, got {stated}", path=described
        )
    length = content_length(headers)
    if length is not None and length != got_stop - start:
        raise AccessError(
            f"{described}: the answer contradicts itself: {stated}, but Content-Length {length}",
            path=described,
        )
    return got_stop - start


def check_whole_answer(headers: Headers, pin: Pin, described: str) -> None:
    """Raises `CorruptError` where a 200 answer is not the object that `pin` fixes, `AccessError` if compressed."""
    check_unchanged(headers, pin, described)
    _check_identity(headers, described)
    length = content_length(headers)
    if length is not None and pin.size_bytes is not None and length != pin.size_bytes:
        raise _changed(described, counted(pin.size_bytes, "byte"), f"{length}")


def check_expected(pin: Pin, size_bytes: int | None, version: str | None, described: str) -> None:
    """Raises `CorruptError` where `pin`, of an answer, is not the object of `size_bytes` and `version`.

    Those are what an earlier answer stated, as `Pin.version` puts it; what either lacks is not compared.
    """
    if size_bytes is not None and pin.size_bytes is not None and pin.size_bytes != size_bytes:
        raise _changed(described, counted(size_bytes, "byte"), f"{pin.size_bytes}")
    if version and pin.version and pin.version != version:
        raise _changed(described, f"version {version}", pin.version)


def check_unchanged(headers: Headers, pin: Pin, described: str) -> None:
    """Raises `CorruptError` where the answer is of another version than `pin`, or states none to compare.

    Equal strong ETags mean equal bytes, whatever else differs: servers behind one name may set different times.
    """
    etag, modified = headers.get("ETag"), headers.get("Last-Modified")
    if pin.etag is not None and etag is not None:
        if bare_tag(etag) != bare_tag(pin.etag):
            raise _changed(described, f"ETag {pin.etag}", etag)
        if pin.strong == etag:
            return
    if pin.modified is not None and modified is not None and modified != pin.modified:
        raise _changed(described, f"Last-Modified {pin.modified}", modified)
    if (pin.etag or pin.modified) and not (pin.etag and etag) and not (pin.modified and modified):
        raise _changed(described, f"version {pin.version}", "none")


def status_error(
    status: int, headers: Headers, body: bytes, described: str, credentials: str
) -> RankloadError | TryAgainError:
    """The error for an answer that carries no data: a `TryAgainError` where the same request may succeed later.

    `credentials` says in the message where those that were sent came from; `body` may hold S3's error code.
    """
    code = _CODE.search(body)
    reason = f"HTTP {status}" + (f" {code[1].decode()}" if code else "")
    if status in (404, 410):
        return NotFoundError(f"{described}: not there ({reason})", path=described)
    if status in (401, 403):
        return refused(described, f"{reason}; sent: {credentials}")
    if status == 407:
        return AccessError(f"{described}: the proxy wants credentials ({reason})", path=described)
    if status == 412:
        return _changed(described, "the version that was opened", reason)
    if status == 416:
        return _changed(described, "the size that was opened", headers.get("Content-Range") or reason)
    error = AccessError(f"{described}: the server answered {reason}", path=described)
    if status in WORTH_RETRYING or (code is not None and code[1] in (b"SlowDown", b"RequestTimeout")):
        return TryAgainError(error, after_s=retry_after_s(headers), throttled=status in _THROTTLED)
    return error


def retry_after_s(headers: Headers, now: float | None = None) -> float | None:
    """Seconds that ``Retry-After`` (RFC 9110) asks for, an hour at most; None where it is missing.

    `now` is in seconds since the epoch.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), _MAX_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, min(until - (time.time() if now is None else now), _MAX_RETRY_AFTER_S))


def cut_short(described: str, start: int, expected: int | None, got: int) -> TryAgainError:
    """The error for a body, from byte `start` of the object on, that ended after `got` of `expected` bytes.

    `expected` is None where the server told no length.
    """
    wanted = "more" if expected is None else counted(expected, "byte")
    place = f" from {start} on" if start else ""
    return TryAgainError(
        CorruptError(
            f"{described}: the body ended early: expected {wanted}{place}, got {counted(got, 'byte')}",
            path=described,
        ),
        # One that ends before its first byte may be an outage.
        ends_at=start + got or None,
    )


def content_range(headers: Headers) -> tuple[int | None, int | None, int | None]:
    """First byte, end (exclusive) and whole size in ``Content-Range`` (RFC 9110); None for each that is missing."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if match is None:
        return None, None, None
    first, last, total = match.groups()
    size = None if total == "*" else int(total)
    if first is None:
        return None, None, size
    return int(first), int(last) + 1, size


def content_length(headers: Headers) -> int | None:
    """The bytes of the body that ``Content-Length`` states; None where it is missing or no number."""
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def bare_tag(tag: str) -> str:
    """`tag` without the mark ``W/`` of a weak one: servers mark the same tag in one answer and not in another."""
    return tag.removeprefix("W/")


def _check_identity(headers: Headers, described: str) -> None:
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "aws-chunked"):
        raise AccessError(
            f"{described}: the server sends it encoded as {encoding}, though identity was asked for",
            path=described,
        )


def _changed(described: str, expected: str, got: str) -> CorruptError:
    return CorruptError(
        f"{described}: changed while it was loaded: expected {expected}, got {got}", path=described
    )
