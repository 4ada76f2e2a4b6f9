"""Makes a store of what the user passes as ``object_store``: an object that can download by name, and no more."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from ..errors import CorruptError, NotFoundError, OptionError
from ..redaction import redact_path
from ..retries import Outages, TryAgainError, until_done
from ..store_errors import outage_in, store_error
from .base import Entry, Heard, ObjectInfo, OnBytes, Store, unheard
from .local import within_limit
from .sums import StoredSum
from .transfer import (
    Meter,
    Reports,
    awaited,
    bytes_arrived,
    receive_through_folder,
    run_watched,
    until_received,
)

T = TypeVar("T")


class GivenStore:
    """The store over `backend`, which has ``download_object`` (an object store) or ``download_file`` (a logger
    destination)."""

    is_local = False

    def __init__(self, backend: Any, heard: Heard = unheard, outages: Outages | None = None) -> None:
        self._backend = backend
        self.heard = heard
        self.outages = outages or Outages()
        self._by_object = hasattr(backend, "download_object")
        self.identity = f"{type(backend).__module__}.{type(backend).__qualname__}"

    def describe(self, name: str) -> str:
        try:
            # What such a store signs stands in the query, whatever the scheme.
            return redact_path(re.split("[?#]", str(self._backend.get_uri(name)))[0])
        except Exception:
            # get_uri is optional, and describing an object for a message must not fail.
            return f"{type(self._backend).__name__}:{name}"

    def origin(self, name: str) -> Hashable:
        return self.identity

    def join(self, name: str, child: str) -> str:
        return f"{name.rstrip('/')}/{child}" if name else child

    def link_targets(self, link_name: str, text: str) -> list[str]:
        folder = link_name.rpartition("/")[0]
        return list(dict.fromkeys([text, f"{folder}/{text}" if folder else text]))

    def stat(self, name: str) -> ObjectInfo | None:
        if not hasattr(self._backend, "get_object_size"):
            return ObjectInfo(name=name, size_bytes=None, certain=False)
        try:
            size = until_done(
                self.outages,
                self.describe(name),
                lambda: self._once(name, lambda: self._answered(name, self._backend.get_object_size)),
                lambda: self.heard(0, self.describe(name)),
            )
        except NotImplementedError:
            return ObjectInfo(name=name, size_bytes=None, certain=False)
        except Exception as error:
            mapped = store_error(error, self.describe(name))
            if isinstance(mapped, NotFoundError):
                return None
            raise mapped from mapped.__cause__
        return ObjectInfo(name=name, size_bytes=int(size))

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        return None

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        size = expected.size_bytes if expected is not None else None
        described = self.describe(name)

        def attempt(reports: Reports) -> None:
            meter = Meter(reports)
            has_called_back = False

            def callback(arrived: int, total: int) -> None:
                nonlocal has_called_back
                has_called_back = True
                meter.reach(arrived)

            def write(part: str) -> None:
                def poll() -> None:
                    if not has_called_back:
                        on_disk = bytes_arrived(os.path.dirname(part))
                        meter.reach(on_disk if size is None else min(on_disk, size))

                run_watched(lambda: self._once(name, lambda: self._fetch(name, part, callback)), meter, poll)
                if os.path.exists(part):
                    meter.reach(os.path.getsize(part))
                    meter.report()

            receive_through_folder(target_path, described, size, write)

        try:
            until_received(self.outages, described, on_bytes, attempt)
        except Exception as error:
            mapped = store_error(error, self.describe(name))
            raise mapped from mapped.__cause__

    def read_small(self, name: str, limit: int) -> bytes:
        import tempfile

        info = self.stat(name)
        if info is not None and info.size_bytes is not None and info.size_bytes > limit:
            raise CorruptError(
                f"{self.describe(name)}: expected a small text of at most {limit} bytes, got "
                f"{info.size_bytes}",
                path=self.describe(name),
            )
        with tempfile.TemporaryDirectory(prefix="rankload-") as folder:
            path = os.path.join(folder, "object")
            self.download(name, path, lambda n_bytes: self.heard(n_bytes, self.describe(name)), info)
            with open(path, "rb") as file:
                return within_limit(file.read(limit + 1), limit, self.describe(name))

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        return ()

    def entries(self, name: str) -> list[Entry] | None:
        return None

    def nearby(self, name: str) -> str:
        return ""  # such a store cannot list

    def close(self) -> None:
        """Does nothing: the user closes the backend."""

    def _fetch(self, name: str, part: str, callback: Callable[[int, int], None]) -> None:
        if self._by_object:
            self._backend.download_object(name, part, overwrite=True, callback=callback)
        else:
            self._backend.download_file(name, part, overwrite=True, progress_bar=False)

    def _answered(self, name: str, ask: Callable[[str], T]) -> T:
        return awaited(lambda: ask(name), self.heard, self.describe(name))

    def _once(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns. Raises what it raises, and `TryAgainError` for what another attempt may mend."""
        try:
            found = work()
        except Exception as error:
            outage = outage_in(error)
            if outage is None:
                raise
            raise TryAgainError(
                store_error(error, self.describe(name)),
                origin=self.identity,
                is_there=outage.is_there,
                throttled=outage.throttled,
            ) from error
        self.outages.answered(self.identity)
        return found


def open_object_store(
    object_store: object, path: str, heard: Heard = unheard, outages: Outages | None = None
) -> tuple[Store, str]:
    """The store over `object_store`, and the name of `path` in it.

    Raises `OptionError` where it is no fsspec file system and has neither ``download_object`` nor ``download_file``.
    """
    if "fsspec" in sys.modules:
        from fsspec import AbstractFileSystem

        if isinstance(object_store, AbstractFileSystem):
            from .fsspec import store_of_filesystem

            return store_of_filesystem(object_store, path, heard, outages)
    if callable(getattr(object_store, "download_object", None)) or callable(
        getattr(object_store, "download_file", None)
    ):
        return GivenStore(object_store, heard, outages), path
    raise OptionError(
        f"object_store is a {type(object_store).__name__}: expected an fsspec file system, an object with "
        "download_object(object_name, filename, overwrite, callback) and "
        "get_object_size(object_name), or a logger destination with "
        "download_file(remote_file_name, destination, overwrite, progress_bar)"
    )
