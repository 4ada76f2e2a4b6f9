"""Signs URLs of objects of S3, GCS and Azure, by the backend's own credentials: `signer_of`."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from ..http import exchange
from ..http.addresses import Address
from ..http.connections import Connections
from ..retries import Outages
from .base import Heard
from .transfer import awaited

SIGNED_FOR_S = 3600.0
_S3 = frozenset({"s3", "s3a"})
_SIGNERS = _S3 | {"gs", "gcs", "az", "abfs", "abfss"}


@dataclass(frozen=True)
class Signer:
    """Signs URLs with the credentials of one file system."""

    files: Any = field(repr=False)
    is_s3: bool
    """Where it is, answers state the version that the file system does."""
    verify: Any
    """What the backend trusts, as `Connections.trusting` takes it."""
    credentials: str
    """Where the credentials come from, for messages."""

    def address(self, name: str, heard: Heard, described: str) -> Address:
        """Where the object `name`, which messages call `described`, is read for `SIGNED_FOR_S`.

        Raises what the backend does where it cannot sign, and what `heard` does.
        """
        # The error stays out of messages: SDKs may quote credentials in theirs.
        signed = awaited(
            lambda: self.files.sign(name, expiration=int(SIGNED_FOR_S)),
            heard,
            f"credentials for {described}",
        )
        return Address(str(signed), {}, self.credentials)

    def connections(self, shared: Connections, outages: Outages) -> Connections:
        """Those of `shared` that trust as the backend does, and give a silence up as `outages` say."""
        own = shared.trusting(self.verify)
        silence_s = outages.silence_s(exchange.SILENCE_TIMEOUT_S)
        return own.by(replace(own.route, silence_timeout_s=silence_s))


def signer_of(files: Any, protocols: Collection[str]) -> Signer | None:
    """What signs URLs for the file system `files`, of these `protocols`.

    None where its backend is not known to, or where reads need headers that a signed URL would have to be sent with.
    """
    if not _SIGNERS & set(protocols):
        return None
    is_s3, verify = bool(_S3 & set(protocols)), None
    if is_s3:
        if _needs_headers(files):
            return None
        files = _signing_with_v4(files)
        verify = files.client_kwargs.get("verify", os.environ.get("AWS_CA_BUNDLE") or None)
    protocol = next(iter(protocols))
    credentials = f"a URL signed with the credentials of the {protocol} backend{_method(files)}"
    return Signer(files, is_s3, verify, credentials)


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
