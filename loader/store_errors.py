"""The one boundary where backends' exceptions become rankload's, and secrets are taken out of messages.

An HTTP status becomes an error in ``http.answers.status_error``, a failure of a connection in
``http.exchange.network_error``; everything else in `store_error`.
"""

from __future__ import annotations

import errno

from .errors import AccessError, FormatError, NotFoundError, RankloadError
from .redaction import redact_text

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an SDK's exception carries, in any of the usual places."""
    for attribute in ("status", "status_code", "code"):
        value = getattr(error, attribute, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    return None


def store_error(error: BaseException, described: str) -> RankloadError:
    """`error`, met while `described` was read, as one of rankload's (returned, with its cause set).

    A cause whose own message holds a secret is left out, since tracebacks print causes.
    """
    mapped = error if isinstance(error, RankloadError) else _mapped(error, described)
    if mapped is not error:
        text = str(error)
        mapped.__cause__ = error if redact_text(text) == text else None
        mapped.__suppress_context__ = True
    return mapped


def refused(described: str, reason: str) -> AccessError:
    """`AccessError` for credentials that are missing or do not suffice."""
    return AccessError(
        f"{described}: the store refused access ({reason}); check the credentials, which come from the "
        "backend's own configuration and from storage_options",
        path=described,
    )


def disk_full(path: str) -> AccessError:
    """`AccessError` for a cache folder whose disk has filled up."""
    return AccessError(
        f"{path}: no space left; set cache_dir to a folder with more, or cache_home to 'disk' where it lies in memory",
        path=path,
    )


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def _mapped(error: BaseException, described: str) -> RankloadError:
    status = http_status(error)
    kind = type(error).__name__
    message = redact_text(str(error)) or kind
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return NotFoundError(f"{described}: not there", path=described)
    if isinstance(error, IsADirectoryError):
        return FormatError(f"{described}: is a folder, expected a file", path=described)
    if is_disk_full(error):
        return disk_full(described)
    if (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or "Credentials" in kind
        or "Authentication" in kind
    ):
        return refused(described, f"{kind}: {message}" if status is None else f"HTTP {status}")
    return AccessError(f"{described}: could not be read: {kind}: {message}", path=described)
