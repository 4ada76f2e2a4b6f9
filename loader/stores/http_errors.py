"""Maps the exceptions of aiohttp's client to rankload's, and says which of them another attempt may fix."""

from __future__ import annotations

import asyncio

from ..errors import AccessError, RankloadError
from ..store_errors import is_disk_full, store_error

SILENCE_TIMEOUT_S = 60
"""Without a byte for so long, a connection is given up and the transfer tried again. A slow one never is."""


def is_cut_short(error: Exception) -> bool:
    """Whether a body ended before its length, or its last chunk."""
    import aiohttp

    return isinstance(error, aiohttp.ClientPayloadError)


def is_transient(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    import aiohttp

    if is_disk_full(error):
        return False
    # A name that does not resolve, or a certificate that does not verify, stays so.
    if isinstance(error, aiohttp.ClientSSLError | aiohttp.InvalidURL):
        return False
    return isinstance(
        error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError | TimeoutError | OSError
    )


def client_error(error: Exception, described: str, attempts: int) -> RankloadError:
    """What to raise for `error`, met after so many `attempts` at the object that messages call `described`."""
    import aiohttp

    if isinstance(error, aiohttp.InvalidURL):
        return AccessError(f"{described}: not a valid URL", path=described)
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return AccessError(
            f"{described}: the server sent nothing for {SILENCE_TIMEOUT_S} s ({attempts} attempts)",
            path=described,
        )
    return store_error(error, described)
