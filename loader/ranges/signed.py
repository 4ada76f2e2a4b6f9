"""Opens S3, GCS and Azure objects as http sources, by URLs that the backend signs with its own credentials."""

from __future__ import annotations

from ..errors import AccessError, RankloadError
from ..http.addresses import Address
from ..http.connections import Connections
from ..retries import TryAgainError
from ..stores.base import ObjectInfo
from ..stores.fsspec import FsspecStore
from ..stores.signing import SIGNED_FOR_S
from .http import HttpSource


def open_signed(
    store: FsspecStore, info: ObjectInfo, connections: Connections | None = None
) -> HttpSource | None:
    """The source of the object in `info`, at a URL that the store's backend signs.

    None where the backend cannot sign (its credentials hold no key), or the server refuses what it signs.

    Raises as `open_range_source` does otherwise.
    """
    signer, described = store.signer(), store.describe(info.name)
    if signer is None or info.size_bytes is None:
        return None

    def make_address() -> Address:
        return signer.address(info.name, store.heard, described)

    try:
        make_address()
    except RankloadError:
        raise  # a failure of the job, which ended the wait
    except Exception:
        return None
    owns = connections is None
    connections = signer.connections(connections or Connections(), store.outages)
    # The ETag of other backends' listings is not the one that their HTTP answers carry.
    version = info.version if signer.is_s3 and info.version and info.version.startswith('"') else None
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
            first=store.first_bytes(info.name),
        )
    except TryAgainError:
        raise
    except AccessError:
        # The backend's own reads may succeed where a signed URL does not; where not, their error says more.
        if owns:
            connections.close()
        return None
