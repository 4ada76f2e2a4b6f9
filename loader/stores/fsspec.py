"""The store of every other URI: whatever fsspec opens, chained file systems included.

    first bytes    by URLs that the backend signs (S3, GCS, Azure), else by the file system's own calls: `ask_ahead`
    all else       by the file system's calls, each in `once`: with credentials renewed, and errors in rankload's words

One file: every method answers by what came first, or asks as `once` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from ..byte_ranges import ByteRange
from ..errors import AccessError, CorruptError, NotFoundError, OptionError, RankloadError, UnsafeError
from ..http.addresses import origin_of
from ..http.answers import Pin
from ..http.connections import Connections
from ..http.exchange import Request
from ..http.redirects import Followed, follow
from ..plurals import counted
from ..redaction import redact_path, redact_text, secrets_in
from ..retries import Outages, TryAgainError, until_done
from ..store_errors import is_expired, outage_in, refusals_in, store_error
from ..workers import Stop, stopped_by
from .base import (
    ONE_CONNECTION,
    Entry,
    Heard,
    ObjectInfo,
    OnBytes,
    Store,
    path_scheme,
    unheard,
)
from .filesystems import open_filesystem
from .first_answers import AsksFirst, FirstAnswers, FirstBytes
from .http import HttpStore
from .infos import entry_of, is_inside, object_of
from .local import LocalStore, file_uri_path, within_limit
from .names import child_of, is_url, url_link_targets
from .signing import Signer, signer_of
from .sums import StoredSum, ask_s3, in_info
from .transfer import (
    Meter,
    Reports,
    awaited,
    bytes_arrived,
    callback_of,
    receive,
    run_watched,
    until_received,
)

_WITH_BUCKETS = frozenset(
    {
        "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "tos", "hf", "r2", "obs", "cos", "cosn", "b2",
    }
)  # fmt: skip
"""Protocols whose names begin with a bucket."""
_TELL_EMPTY_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})
"""Those of them whose file systems tell an empty bucket from one that is not there (tried with real servers)."""
_AT_ONCE = 16
"""How many parts of one object are asked for at once."""
WHOLE_ONLY = frozenset({"zip", "tar", "libarchive", "filecache", "simplecache", "blockcache", "cached"})
"""Protocols where a read in the middle reads all that is before it, or keeps the whole object on the disk."""


T = TypeVar("T")


class FsspecStore(AsksFirst):
    """Names are the file system's own, without the protocol (``bucket/key``).

    `reopen` is the URI and options to open the file system with in a forked child, and where its credentials have
    expired; None where the user passed it.
    """

    is_local = False

    def __init__(
        self,
        filesystem: Any,
        reopen: tuple[str, Mapping[str, Any]] | None = None,
        heard: Heard = unheard,
        outages: Outages | None = None,
    ) -> None:
        self.heard = heard
        self.outages = outages or Outages()
        self._filesystem = filesystem
        self._reopen = reopen
        self._pid = os.getpid()
        protocol = filesystem.protocol
        self.protocol: str = protocol if isinstance(protocol, str) else protocol[0]
        self._own = threading.local()
        self._own.filesystem = self._pid, filesystem
        self._sums: dict[ObjectInfo, tuple[StoredSum, ...]] = {}
        self._answered: set[str] = set()
        """The objects that the store has told of, or given."""
        self._renewing = threading.Lock()
        self._first = FirstAnswers(self)
        self._first_sums: dict[str, tuple[StoredSum, ...]] = {}
        """By name, those in the answers to the first requests for objects."""
        self._connections = Connections()
        self._signer: tuple[Any, Signer | None] = (None, None)
        """The file system, and what signs for it."""
        self._secrets = secrets_in(getattr(filesystem, "storage_options", {})) | secrets_in(
            {} if reopen is None else reopen[1]
        )
        settings = repr(sorted(getattr(filesystem, "storage_options", {}).items(), key=str))
        self.identity = f"{self.protocol}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}"

    def describe(self, name: str) -> str:
        return redact_path(f"{self.protocol}://{name}")

    def origin(self, name: str) -> Hashable:
        return self.identity

    def join(self, name: str, child: str) -> str:
        return child_of(name, child)

    def link_targets(self, link_name: str, text: str) -> list[str]:
        if is_url(link_name):
            return url_link_targets(link_name, text)
        root = f"{link_name.split('/', 1)[0]}/" if self.protocol in _WITH_BUCKETS else ""
        scheme = path_scheme(text)
        if scheme is not None:
            target = str(self.files()._strip_protocol(text))
            if scheme not in self.protocols() or not target.startswith(root):
                raise UnsafeError(
                    f"{self.describe(link_name)}: the link names another store, {redact_text(text)}",
                    path=self.describe(link_name),
                )
            return [target]
        folder = link_name.rpartition("/")[0]
        relative = f"{folder}/{text}" if folder else text
        return list(dict.fromkeys([root + text.lstrip("/") if root else text, relative]))

    def signer(self) -> Signer | None:
        """What signs URLs of the store's objects; None where its backend does not."""
        files = self.files()
        if self._signer[0] is not files:
            self._signer = files, signer_of(files, self.protocols())
        return self._signer[1]

    def ask_ahead(
        self,
        name: str,
        n_bytes: int,
        and_last: Callable[[bytes], bool] | None = None,
        parts: Sequence[ByteRange] = (),
        *,
        last_likely: bool = False,
        last_later: bool = False,
        with_sums: bool = False,
    ) -> None:
        """As `AsksFirst.ask_ahead`, by signed URLs; where the backend does not sign any, as `_ask_plain`.

        What the answers of other stores than S3 state is not the version that their file systems do: these are asked
        for it at the same time. S3 is asked for checksums, which answers to a GET for a range do not state.
        """
        signer = self.signer()
        if signer is None or (name not in self._first and not self._can_sign(signer, name)):
            self._ask_plain(name, n_bytes, parts, with_last=last_likely)
            return
        ask = partial(super().ask_ahead, name, n_bytes, and_last, parts, last_later=last_later)
        if name in self._first or (signer.is_s3 and not with_sums):
            ask()
            return
        stop, more = Stop(), self._sums_ahead if signer.is_s3 else self._info_ahead
        with ThreadPoolExecutor(1) as threads:
            told = threads.submit(stopped_by(stop)(more), name)
            try:
                ask()
            except BaseException:
                stop.set()
                raise
        told.result()(self._first.get(name))

    def _sums_ahead(self, name: str) -> Callable[[FirstBytes | None], None]:
        """Asks S3 for checksums; what it returns is called with what else has come."""
        etag, sums = self._ask_s3(name)

        def join(first: FirstBytes | None) -> None:
            if first is not None and first.info.version == etag:
                self._sums[first.info] = sums

        return join

    def _info_ahead(self, name: str) -> Callable[[FirstBytes | None], None]:
        """The same for what the file system says of the object."""
        info = None
        with contextlib.suppress(AccessError):
            info = self._told(name)

        def join(first: FirstBytes | None) -> None:
            if info is not None and first is not None:
                self._first.describe(name, info)
            elif info is not None or first is not None:
                self.forget(name)

        return join

    def _ask_s3(self, name: str) -> tuple[str | None, tuple[StoredSum, ...]]:
        return self._answer(name, lambda files: ask_s3(files, name))

    def _can_sign(self, signer: Signer, name: str) -> bool:
        try:
            signer.address(name, self.heard, self.describe(name))
        except RankloadError:
            raise  # a failure of the job, which ended the wait
        except Exception:
            self._signer = self.files(), None
            return False
        return True

    def _ask_plain(self, name: str, n_bytes: int, parts: Sequence[ByteRange], *, with_last: bool) -> None:
        """Asks what there is of an object, and then for all of a small one, or at the same time for its first `n_bytes`
        and its `parts`, `with_last` also for its last as many.

        The file system's reads state no version: what it says of the object before is the version that they are of, if
        it says the same once all is read (`RangeSource.confirm`).
        """
        if name in self._first or self.protocol in ONE_CONNECTION:
            return
        began = time.monotonic()
        try:
            info = self._told(name)
        except AccessError as error:
            if not refusals_in(error):
                raise
            return
        took_s = time.monotonic() - began
        if info is None:
            self._first.note(name, None, took_s)
        elif info.size_bytes is not None:
            size, spans = info.size_bytes, [ByteRange(0, n_bytes), *parts]
            if size <= 2 * n_bytes:
                spans = [ByteRange(0, size)]
            elif with_last:
                spans.append(ByteRange(size - n_bytes, size))
            if n_bytes == 1 or WHOLE_ONLY & set(self.protocols()):
                spans = []
            pin = Pin(info.size_bytes, info.version)
            found = self._read_plain(name, spans)
            self._first.note(name, FirstBytes(info, pin, None, True, (), found), took_s)

    def _read_plain(self, name: str, spans: Sequence[ByteRange]) -> tuple[tuple[int, bytes], ...]:
        """The bytes `spans` of an object, as far as they can be had now."""
        stop = Stop()

        def read(span: ByteRange) -> tuple[int, bytes]:
            with stopped_by(stop), contextlib.suppress(AccessError, CorruptError, NotFoundError):
                if span.length:
                    data = self._asked(
                        name, lambda files: files.cat_file(name, start=span.start, end=span.stop)
                    )
                    return span.start, data if len(data) == span.length else b""
            return span.start, b""

        with ThreadPoolExecutor(max(1, min(_AT_ONCE, len(spans)))) as threads:
            try:
                return tuple(one for one in threads.map(read, spans) if one[1])
            except BaseException:
                stop.set()
                raise

    def get(self, name: str, span: str) -> Followed:
        """The answer to one GET for the bytes `span`, whatever its status. Raises as `follow`."""
        signer, described = self.signer(), self.describe(name)
        if signer is None:
            raise RankloadError(f"{described}: nothing signs its URL", path=described)
        address = signer.address(name, self.heard, described)
        request = Request("GET", address.url, described, {"Range": f"bytes={span}"})
        connections = signer.connections(self._connections, self.outages)
        followed = follow(connections, request, address, self.waits(name))
        for url in (address.url, followed.url):
            self.outages.answered(origin_of(url))
        if followed.answer.response.status in (200, 206):
            self._answered.add(name)
            self.outages.answered(self.identity)
        self.heard(1, described)
        return followed

    def add_sums(self, name: str, sums: tuple[StoredSum, ...], *, of_whole: bool) -> None:
        """Keeps the checksums that an answer stated."""
        self._first_sums[name] = sums

    def stat(self, name: str) -> ObjectInfo | None:
        if name in self._first:
            return self.first_info(name)
        return self._told(name)

    def _told(self, name: str) -> ObjectInfo | None:
        """What the file system says of the object."""
        try:
            info = self._asked(name, lambda files: files.info(name))
        except NotFoundError:
            return None
        found = object_of(name, info)
        if stated := in_info(self.protocols(), info):
            self._sums[found] = stated
        return found

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        described = self.describe(name)
        size = expected.size_bytes if expected is not None else None

        def attempt(reports: Reports) -> None:
            meter = Meter(reports)

            def write(part: str) -> None:
                first = self._first.get(name)
                data = None if first is None else first.all_bytes
                self.forget(name)
                if data is not None:
                    with open(part, "xb") as file:
                        file.write(data)
                    meter.reach(len(data))
                    meter.report()
                    return
                callback = callback_of(meter)

                def poll() -> None:
                    # Where a backend never calls back, the bytes on the disk are counted.
                    if not callback.called:
                        meter.reach(min(bytes_arrived(part), size if size is not None else 1 << 62))

                def get(files: Any) -> None:
                    run_watched(lambda: files.get_file(name, part, callback=callback), meter, poll)

                self.once(name, get, reports)
                if os.path.exists(part):
                    meter.reach(os.path.getsize(part))
                    meter.report()

            receive(target_path, described, size, write)

        try:
            until_received(self.outages, described, on_bytes, attempt)
        except Exception as error:
            mapped = self._error(error, described)
            raise mapped from mapped.__cause__

    def upload(self, source_path: str, name: str, on_bytes: OnBytes) -> None:
        """Writes the file `source_path` to the object `name`, and compares its size with what the store then has.

        Raises `AccessError` where the store refuses, `CorruptError` where it has another number of bytes.
        """
        described = self.describe(name)
        size = os.path.getsize(source_path)

        def attempt(reports: Reports) -> None:
            meter = Meter(reports)

            def put(files: Any) -> None:
                self._make_folder(name)
                run_watched(
                    lambda: files.put_file(source_path, name, callback=callback_of(meter)), meter, None
                )

            self.once(name, put, reports, doing="written")
            meter.reach(size)
            meter.report()

        try:
            until_received(self.outages, described, on_bytes, attempt)
        except Exception as error:
            mapped = self._error(error, described, "written")
            raise mapped from mapped.__cause__
        self.files().invalidate_cache()
        got = self._asked(name, lambda files: files.info(name), doing="written").get("size")
        if got not in (None, size):
            raise CorruptError(
                f"{described}: {counted(size, 'byte')} were written, and the store has {got}", path=described
            )

    def write_small(self, name: str, data: bytes) -> None:
        """Writes the object whole. Raises as `upload`."""

        def write(files: Any) -> None:
            self._make_folder(name)
            files.pipe_file(name, data)

        self._asked(name, write, doing="written")

    def _make_folder(self, name: str) -> None:
        # Object stores need no folders, and some would make the bucket.
        folder = name.rpartition("/")[0]
        if folder and self.protocol not in _WITH_BUCKETS:
            self.files().makedirs(folder, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes the object, where there is one. Raises as `upload`."""

        def remove(files: Any) -> None:
            files.invalidate_cache()
            if files.exists(name):
                files.rm_file(name)

        with contextlib.suppress(NotFoundError):
            self._asked(name, remove, doing="removed")

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        first = self._first.get(name)
        start = None if first is None else first.beginning(n_bytes)
        if start is not None:
            return start
        data: bytes = self._asked(name, lambda files: files.cat_file(name, start=0, end=n_bytes))
        return data

    def read_small(self, name: str, limit: int) -> bytes:
        def read(files: Any) -> bytes:
            with files.open(name, "rb", block_size=max(limit + 1, 1 << 16)) as file:
                data: bytes = file.read(limit + 1)
                return data

        first = self._first.get(name)
        whole = None if first is None else first.all_bytes
        return within_limit(self._asked(name, read) if whole is None else whole, limit, self.describe(name))

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        if {"s3", "s3a"} & set(self.protocols()) and info not in self._sums:
            etag, sums = self._ask_s3(info.name)
            # Where it is another version by now, the download itself says so.
            self._sums[info] = sums if info.version in (None, etag) else ()
        return self._sums.get(info) or self._first_sums.get(info.name, ())

    def entries(self, name: str) -> list[Entry] | None:
        folder = name.rstrip("/")

        def list_all(files: Any) -> Any:
            files.invalidate_cache()
            try:
                return files.ls(folder, detail=True)
            except NotImplementedError:
                return None

        try:
            found = self._asked(name, list_all)
        except NotFoundError:
            return []
        if found is None:
            return None
        return [entry_of(one) for one in found if is_inside(one, folder)]

    def nearby(self, name: str) -> str:
        """Whether the bucket is there: one request."""
        bucket = name.split("/", 1)[0]
        if self.protocol not in _WITH_BUCKETS - {"hf"} or self.stat(bucket) is not None:
            return ""
        empty = "" if self.protocol in _TELL_EMPTY_BUCKETS else ", or it is empty"
        return f"There is no bucket {bucket}{empty}: check its name, the endpoint and the account in storage_options"

    def close(self) -> None:
        """Gives back its own connections: fsspec closes its sessions when the file system is collected."""
        self._first.close()
        self._connections.close()

    def protocols(self) -> tuple[str, ...]:
        """All the names of the file system's protocol, ``s3`` and ``s3a`` for example."""
        return _protocols(self._filesystem)

    def files(self) -> Any:
        """The file system: of this thread where it has one connection; opened anew in a forked child."""
        if self.protocol in ONE_CONNECTION:
            return self._of_this_thread()
        if self._pid != os.getpid() and self._reopen is not None:
            self._filesystem = open_filesystem(*self._reopen)[0]
            self._pid = os.getpid()
        return self._filesystem

    def once(
        self,
        name: str,
        work: Callable[[Any], T],
        reports: Reports | None = None,
        *,
        doing: str = "read",
        renews: bool = True,
    ) -> T:
        """What `work` returns, which is given the file system and asks the store for the object `name`.

        A refusal after an earlier answer about that object may mean that credentials have expired: then the file system
        is opened anew, which finds new ones, and `work` is called once more. Raises rankload's own errors,
        `TryAgainError` for an outage, and what the callback of `reports` raised.
        """
        files = self.files()
        try:
            found = work(files)
        except Exception as error:
            if reports is not None and reports.raised is not None:
                raise
            outage = outage_in(error)
            mapped = self._error(error, self.describe(name), doing)
            if outage is not None:
                raise TryAgainError(
                    mapped, origin=self.identity, is_there=outage.is_there, throttled=outage.throttled
                ) from mapped.__cause__
            # Of an object that it has not told of, a refusal may mean that it is not there.
            may_have_expired = refusals_in(mapped) and (name in self._answered or is_expired(error))
            if not (renews and may_have_expired and self._renewed(files)):
                raise mapped from mapped.__cause__
        else:
            self._answered.add(name)
            self.outages.answered(self.identity)
            return found
        return self.once(name, work, reports, doing=doing, renews=False)

    def _error(self, error: BaseException, described: str, doing: str = "read") -> RankloadError:
        return store_error(error, described, doing, self._secrets)

    def _asked(self, name: str, work: Callable[[Any], T], *, doing: str = "read") -> T:
        """As `once`, begun anew as long as there is an outage; `heard` is called meanwhile."""
        described = self.describe(name)

        def attempt() -> T:
            return self.once(
                name, lambda files: awaited(lambda: work(files), self.heard, described), doing=doing
            )

        return self.until_done(name, attempt)

    def _answer(self, name: str, work: Callable[[Any], T]) -> T:
        """What `work` gets from the file system, a call that blocks; `heard` is called meanwhile."""
        files = self.files()  # of this thread, which waits
        return awaited(lambda: work(files), self.heard, self.describe(name))

    def _renewed(self, refused: Any) -> bool:
        """Whether there is another file system now than the one that was `refused`, with credentials found anew."""
        if self._reopen is None or self.protocol in ONE_CONNECTION:
            return False
        with self._renewing:
            if self._filesystem is refused:
                uri, options = self._reopen
                try:
                    self._filesystem = open_filesystem(uri, {**options, "skip_instance_cache": True})[0]
                except RankloadError:
                    return False
            return True

    def _of_this_thread(self) -> Any:
        pid, filesystem = getattr(self._own, "filesystem", (None, None))
        if pid != os.getpid():
            given = self._filesystem
            options = {**given.storage_options, "skip_instance_cache": True}
            filesystem = type(given)(*given.storage_args, **options)
            self._own.filesystem = os.getpid(), filesystem
        return filesystem


def open_fsspec(
    uri: str,
    storage_options: Mapping[str, Any],
    heard: Heard = unheard,
    outages: Outages | None = None,
) -> tuple[Store, str]:
    """The store and name of an fsspec URI. Raises `OptionError` as `open.open_store` does."""
    outages = outages or Outages()
    shown = redact_path(uri)

    def opened() -> tuple[Any, str]:
        try:
            return open_filesystem(uri, storage_options)
        except RankloadError as error:
            outage = None if error.__cause__ is None else outage_in(error.__cause__)
            if outage is None:
                raise
            raise TryAgainError(error, origin=f"credentials of {shown}", is_there=outage.is_there) from error

    # Some backends ask for their credentials here.
    filesystem, name = until_done(
        outages, shown, lambda: awaited(opened, heard, shown), lambda: heard(0, shown)
    )
    return FsspecStore(filesystem, (uri, storage_options), heard, outages), name


def store_of_filesystem(
    filesystem: Any, path: str, heard: Heard = unheard, outages: Outages | None = None
) -> tuple[Store, str]:
    """The store over the file system that the user passed, and the name of `path` in it."""
    protocol = filesystem.protocol
    if "file" in ((protocol,) if isinstance(protocol, str) else protocol):
        return LocalStore(), file_uri_path(path) or path
    name = str(filesystem._strip_protocol(path)) if "://" in path else path
    if {"http", "https"} & set(_protocols(filesystem)) and is_url(name):
        # Our own client has ranges, and keeps the user's headers from other servers.
        with contextlib.suppress(OptionError):
            return HttpStore(filesystem.storage_options, heard, outages), name
    return FsspecStore(filesystem, None, heard, outages), name


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
