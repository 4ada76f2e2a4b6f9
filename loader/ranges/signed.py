"""Opens S3, GCS and Azure objects as http sources, by URLs that the backend signs with its own credentials."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from ..errors import AccessError, RankloadError
from ..http import exchange
from ..http.addresses import Address
from ..http.connections import Connections
from ..retries import TryAgainError
from ..stores.base import ObjectInfo
from ..stores.fsspec import FsspecStore
from ..stores.transfer import awaited
from .http import HttpSource

SIGNED_FOR_S = 3600.0
_S3 = frozenset({"s3", "s3a"})
_SIGNERS = _S3 | {"gs", "gcs", "az", "abfs", "abfss"}


def open_signed(
    store: FsspecStore, info: ObjectInfo, connections: Connections | None = None
) -> HttpSource | None:
    """The source of the object in `info`, at a URL that the store's backend signs.

    None where the backend cannot sign (its credentials hold no key), or the server refuses what it signs.

    Raises as `open_range_source` does otherwise.
    """
    files = store.files()
    if not _SIGNERS & set(store.protocols()) or info.size_bytes is None:
        return None
    is_s3 = bool(_S3 & set(store.protocols()))
    verify = None
    if is_s3:
        if _needs_headers(files):
            return None
        files = _signing_with_v4(files)
        verify = files.client_kwargs.get("verify", os.environ.get("AWS_CA_BUNDLE") or None)
    credentials = f"a URL signed with the credentials of the {store.protocol} backend{_method(files)}"

    described = store.describe(info.name)

    def make_address() -> Address:
        # The error stays out of messages: SDKs may quote credentials in theirs.
        signed = awaited(
            lambda: files.sign(info.name, expiration=int(SIGNED_FOR_S)),
            store.heard,
            f"credentials for {described}",
        )
        return Address(str(signed), {}, credentials)

    try:
        make_address()
    except RankloadError:
        raise  # a failure of the job, which ended the wait
    except Exception:
        return None
    owns = connections is None
    connections = (connections or Connections()).trusting(verify)
    silence_s = store.outages.silence_s(exchange.SILENCE_TIMEOUT_S)
    connections = connections.by(replace(connections.route, silence_timeout_s=silence_s))
    # The ETag of other backends' listings is not the one that their HTTP answers carry.
    version = info.version if is_s3 and info.version and info.version.startswith('"') else None
    expected = ObjectInfo(info.name, info.size_bytes, version)
    try:
        return HttpSource(
            make_address,
            connections,
            owns_connections=owns,
            expected=expected,
            signed_for_s=SIGNED_FOR_S,
            described=described,
            heard=store.heard,
            outages=store.outages,
        )
    except TryAgainError:
        raise
    except AccessError:
        # The backend's own reads may succeed where a signed URL does not; where not, their error says more.
        if owns:
            connections.close()
        return None


def _needs_headers(files: Any) -> bool:
    """Whether reads need headers that a signed URL would have to be sent with (requester pays, customer keys)."""
    extra = dict(getattr(files, "s3_additional_kwargs", {}))
    return bool(getattr(files, "req_kw", {})) or any(name.startswith("SSECustomer") for name in extra)


def _signing_with_v4(files: Any) -> Any:
    """A file system like `files` whose URLs are signed with SigV4: botocore's default for URLs may be v2."""
    configured = dict(files.config_kwargs)
    if configured.get("signature_version") or files.anon or (files.session is not None and _is_given(files)):
        return files
    options = {**files.storage_options, "config_kwargs": {**configured, "signature_version": "s3v4"}}
    return type(files)(*files.storage_args, **options)


def _is_given(files: Any) -> bool:
    return "session" in files.storage_options


def _method(files: Any) -> str:
    """Where a backend found its credentials, as it names it (``env``, ``shared-credentials-file`` ...)."""
    if getattr(files, "anon", False):
        return " (anonymous: unsigned)"
    if getattr(files, "key", None):
        return " (storage_options)"
    session = getattr(files, "session", None)
    method = getattr(getattr(session, "_credentials", None), "method", None)
    return f" ({method})" if isinstance(method, str) else ""
