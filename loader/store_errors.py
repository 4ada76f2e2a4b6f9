"""The one boundary where backends' exceptions become rankload's, and secrets are taken out of messages.

An HTTP status becomes an error in ``http.answers.status_error``, a failure of a connection in
``http.exchange.network_error``; everything else in `store_error`.
"""

from __future__ import annotations

import errno

from .errors import AccessError, FormatError, NotFoundError, RankloadError
from .redaction import redact_text

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


ADVICE_CREDENTIALS = (
    "check the credentials, which come from the backend's own configuration and from storage_options"
)


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an SDK's exception carries, in any of the usual places."""
    for attribute in ("status", "status_code", "code"):
        value = getattr(error, attribute, None)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def store_error(error: BaseException, described: str, doing: str = "read") -> RankloadError:
    """`error`, met while `described` was read (or ``written``), as one of rankload's (returned, with its cause set).

    A cause whose own message holds a secret is left out, since tracebacks print causes.
    """
    mapped = error if isinstance(error, RankloadError) else _mapped(error, described, doing)
    if mapped is not error:
        text = str(error)
        mapped.__cause__ = error if redact_text(text) == text else None
        mapped.__suppress_context__ = True
    return mapped


def refused(described: str, reason: str) -> AccessError:
    """`AccessError` for what a store refuses to one who may ask: it may not be there, or the credentials do not do.

    ``details`` has it under ``refused``, from where `refusals_in` takes it.
    """
    error = AccessError(
        f"{described}: the store refused access ({reason}). Either it is not there, which some stores tell only those "
        f"who may list them, or the credentials do not suffice: check the path, and {ADVICE_CREDENTIALS}",
        path=described,
    )
    error.details["refused"] = {described: reason}
    return error


def refusals_in(error: RankloadError) -> dict[str, str]:
    """What a store refused, as `refused` made it: names, and why. Empty for any other error."""
    found = error.details.get("refused")
    return dict(found) if isinstance(found, dict) else {}


def no_credentials(described: str, reason: str) -> AccessError:
    """`AccessError` for credentials that are missing or wrong before a store was asked."""
    return AccessError(
        f"{described}: the store refused access ({reason}); {ADVICE_CREDENTIALS}", path=described
    )


def disk_full(path: str) -> AccessError:
    """`AccessError` for a cache folder whose disk has filled up."""
    return AccessError(
        f"{path}: no space left; set cache_dir to a folder with more, or cache_home to 'disk' where it lies in memory",
        path=path,
    )


def is_not_there(error: BaseException) -> bool:
    """Whether an error says that there is no such file. No file can have a name that is too long for its system."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or (
        isinstance(error, OSError) and error.errno in _NOT_THERE
    )


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FULL


def _mapped(error: BaseException, described: str, doing: str) -> RankloadError:
    status = http_status(error)
    kind = type(error).__name__
    message = redact_text(str(error)) or kind
    if is_not_there(error) or status in (404, 410):
        what = "not there" if doing == "read" else f"could not be {doing}: its folder or bucket is not there"
        return NotFoundError(f"{described}: {what}", path=described)
    if isinstance(error, IsADirectoryError):
        return FormatError(f"{described}: is a folder, expected a file", path=described)
    if is_disk_full(error) and doing == "read":
        return disk_full(described)
    reason = f"{kind}: {message}" if status is None else f"HTTP {status}"
    # gcsfs raises a plain OSError for 403.
    if isinstance(error, PermissionError) or status in (401, 403) or message.startswith("Forbidden: "):
        return refused(described, reason)
    if "Credentials" in kind or "Authentication" in kind:
        return no_credentials(described, reason)
    return AccessError(f"{described}: could not be {doing}: {kind}: {message}", path=described)
