"""The one boundary where backends' exceptions become rankload's, and secrets are taken out of messages.

An HTTP status becomes an error in ``http.answers.status_error``, a failure of a connection in
``http.exchange.network_error``; everything else in `store_error`. Whether it is one that may pass, `outage_in` says.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from .errors import AccessError, FormatError, NotFoundError, RankloadError
from .redaction import redact_text

AnyError = TypeVar("AnyError", bound=RankloadError)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
WORTH_RETRYING = frozenset({408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
"""Statuses after which the same request may succeed."""
_BROKEN_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
_BROKEN = (errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE)
_NO_WAY = (
    errno.ECONNREFUSED,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.ENETDOWN,
)
_BROKEN_OFF = frozenset(
    {
        "ServerDisconnectedError", "ClientPayloadError", "ConnectionClosedError", "ResponseStreamingError",
        "IncompleteReadError", "ChunkedEncodingError", "RemoteProtocolError", "ReadError", "ServiceResponseError",
        "ObjectStoreTransientError",
    }
)  # fmt: skip
"""SDKs' errors for what a server broke off, by their names: no SDK is imported."""
_UNREACHED = frozenset(
    {
        "ClientConnectionError", "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError",
        "ProxyConnectionError", "NewConnectionError", "ConnectionError", "ConnectTimeout", "ReadTimeout",
        "ProtocolError", "TransportError", "ServiceRequestError", "NoValidConnectionsError", "SSHException",
    }
)  # fmt: skip
"""Those for a server that was not reached, or did not answer."""
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
"""S3's codes for credentials that were good before."""
_MOST_CAUSES = 8


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


@dataclass(frozen=True)
class Outage:
    """A failure of a store that may pass."""

    is_there: bool
    """Whether it shows that the store is there: it answered, or broke off a connection that it had accepted."""
    throttled: bool = False


def outage_in(error: BaseException) -> Outage | None:
    """The outage that a backend's exception tells of, itself or by what it was raised from; None where it is none."""
    chain = list(_chain(error))
    if any(map(_lasts, chain)):
        return None
    for known in chain:
        if isinstance(known, RankloadError):
            return None
        found = _outage(known)
        if found is not None or http_status(known) is not None:
            return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what it was raised from."""
    known: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if known is None:
            return
        yield known
        known = known.__cause__ or (None if known.__suppress_context__ else known.__context__)


def _lasts(error: BaseException) -> bool:
    """Whether it tells of a certificate or a login, which do not get better by themselves."""
    if isinstance(error, _BROKEN_TLS):
        return False
    names = {one.__name__ for one in type(error).__mro__}
    return "SSLError" in names or any("Certificate" in name or "Authentication" in name for name in names)


def is_expired(error: BaseException) -> bool:
    """Whether a backend's exception says that credentials have expired, itself or by what it was raised from."""
    for known in _chain(error):
        response = getattr(known, "response", None)
        told = response.get("Error") if isinstance(response, dict) else None
        if isinstance(told, dict) and told.get("Code") in _EXPIRED:
            return True
    return False


def _outage(error: BaseException) -> Outage | None:
    status = http_status(error)
    if status is not None:
        return Outage(True, status in (429, 503)) if status in WORTH_RETRYING else None
    names = {one.__name__ for one in type(error).__mro__}
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, (EOFError, *_BROKEN_TLS)) or names & _BROKEN_OFF or number in _BROKEN:
        return Outage(True)
    if isinstance(error, ConnectionResetError | BrokenPipeError | ConnectionAbortedError):
        return Outage(True)
    # s3fs says EBUSY for 503, and EREMOTEIO for 500; their causes have the status.
    if isinstance(error, ConnectionError | TimeoutError) or names & _UNREACHED or number in _NO_WAY:
        return Outage(False)
    return None


def store_error(
    error: BaseException, described: str, doing: str = "read", secrets: Iterable[str] = ()
) -> RankloadError:
    """`error`, met while `described` was read (or ``written``), as one of rankload's (returned, with its cause set).

    `secrets` are values that no message may hold (`redaction.secrets_in`). See `caused_by` for the cause.
    """
    if isinstance(error, RankloadError):
        return error
    return caused_by(_mapped(error, described, doing, tuple(secrets)), error, secrets)


def caused_by(ours: AnyError, error: BaseException, secrets: Iterable[str] = ()) -> AnyError:
    """`ours`, with `error` as its cause, unless that or what it was raised from quotes a secret: tracebacks print them.

    To be raised as ``raise ours from ours.__cause__``.
    """
    quotable = all(_is_quotable(one, tuple(secrets)) for one in _chain(error))
    ours.__cause__ = error if quotable else None
    ours.__suppress_context__ = True
    return ours


def _is_quotable(error: BaseException, secrets: tuple[str, ...]) -> bool:
    texts = [str(one) for one in (error, *getattr(error, "__notes__", ()), *getattr(error, "exceptions", ()))]
    return all(redact_text(text, secrets) == text for text in texts)


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


def _mapped(error: BaseException, described: str, doing: str, secrets: tuple[str, ...]) -> RankloadError:
    if is_not_there(error) and outage_in(error) is not None:
        # fsspec's http says "not found" of what it could not ask for.
        error = error.__cause__ or error.__context__ or error
    status = http_status(error)
    kind = type(error).__name__
    message = redact_text(str(error), secrets) or kind
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
