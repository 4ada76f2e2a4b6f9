"""The store of every other URI: whatever fsspec opens, chained file systems included."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Hashable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from ..errors import CorruptError, NotFoundError, OptionError, RankloadError, UnsafeError
from ..http.settings import headers_of
from ..plurals import counted
from ..redaction import redact_path, redact_text, secrets_in
from ..retries import Outages, TryAgainError, until_done
from ..store_errors import caused_by, is_expired, outage_in, refusals_in, store_error
from .base import (
    ONE_CONNECTION,
    Entry,
    Heard,
    ObjectInfo,
    OnBytes,
    Store,
    path_scheme,
    path_schemes,
    unheard,
)
from .http import HttpStore
from .local import LocalStore, file_uri_path, within_limit
from .names import child_of, is_url, url_link_targets
from .sums import StoredSum, in_info
from .transfer import Meter, Reports, awaited, bytes_on_disk, receive, run_watched, until_received

_EXTRAS = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs",
    "az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure", "wasb": "azure", "wasbs": "azure",
    "hf": "hf", "http": "http", "https": "http", "sftp": "sftp", "ssh": "sftp",
}  # fmt: skip
"""The extra of this distribution that installs the backend of a protocol."""
_WITH_BUCKETS = frozenset(
    {
        "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "tos", "hf", "r2", "obs", "cos", "cosn", "b2",
    }
)  # fmt: skip
"""Protocols whose names begin with a bucket."""
_TELL_EMPTY_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs"})
"""Those of them whose file systems tell an empty bucket from one that is not there (tried with real servers)."""
_CHAINED_URL = re.compile(r"::(https?)://[\x21-\x7e]*\Z", re.IGNORECASE)
"""A URL at the end of a chain that needs no percent-encoding."""
_USERS = frozenset({"headers", "cookies", "auth"})
"""Options of fsspec's http, and of its client, that are for the user's own server."""
_ANYBODYS = frozenset({"accept", "accept-encoding", "range", "user-agent", "if-match", "if-none-match"})
"""Headers that any server may be sent."""
_VERSION_FIELDS = (
    "ETag", "etag", "e_tag", "version_id", "VersionId", "generation", "md5Hash", "content_md5", "checksum", "blob_id",
    "LastModified", "last_modified", "mtime", "modified", "created",
)  # fmt: skip
"""What file systems call an object's version; the first one that is set counts."""
_TIME_FIELDS = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
"""What they call the time when it was last written."""


T = TypeVar("T")


class FsspecStore:
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

    def stat(self, name: str) -> ObjectInfo | None:
        try:
            info = self._asked(name, lambda files: files.info(name))
        except NotFoundError:
            return None
        size = info.get("size")
        is_folder = info.get("type") == "directory"
        version = next((str(info[key]) for key in _VERSION_FIELDS if info.get(key)), None)
        found = ObjectInfo(
            name=name,
            size_bytes=size if isinstance(size, int) and not is_folder else None,
            version=version,
            is_folder=is_folder,
        )
        self._sums[found] = in_info(self.protocols(), info)
        return found

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        described = self.describe(name)
        size = expected.size_bytes if expected is not None else None

        def attempt(reports: Reports) -> None:
            meter = Meter(reports)

            def write(part: str) -> None:
                callback = _callback(meter)

                def poll() -> None:
                    # Where a backend never calls back, the bytes on the disk are counted.
                    if not callback.called:
                        meter.reach(min(bytes_on_disk(part), size if size is not None else 1 << 62))

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
                run_watched(lambda: files.put_file(source_path, name, callback=_callback(meter)), meter, None)

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
        data: bytes = self._asked(name, lambda files: files.cat_file(name, start=0, end=n_bytes))
        return data

    def read_small(self, name: str, limit: int) -> bytes:
        def read(files: Any) -> bytes:
            with files.open(name, "rb", block_size=max(limit + 1, 1 << 16)) as file:
                data: bytes = file.read(limit + 1)
                return data

        return within_limit(self._asked(name, read), limit, self.describe(name))

    def local_path(self, name: str) -> str:
        raise NotImplementedError("not a local store")

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        if {"s3", "s3a"} & set(self.protocols()):
            from .sums import ask_s3

            return self._answer(info.name, lambda files: ask_s3(files, info.name, info.version))
        return self._sums.get(info, ())

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
        return [_entry(one, folder) for one in found if _is_inside(one, folder)]

    def nearby(self, name: str) -> str:
        """Whether the bucket is there: one request."""
        bucket = name.split("/", 1)[0]
        if self.protocol not in _WITH_BUCKETS - {"hf"} or self.stat(bucket) is not None:
            return ""
        empty = "" if self.protocol in _TELL_EMPTY_BUCKETS else ", or it is empty"
        return f"There is no bucket {bucket}{empty}: check its name, the endpoint and the account in storage_options"

    def close(self) -> None:
        """Does nothing: fsspec closes its sessions when the file system is collected."""

    def protocols(self) -> tuple[str, ...]:
        """All the names of the file system's protocol, ``s3`` and ``s3a`` for example."""
        return _protocols(self._filesystem)

    def files(self) -> Any:
        """The file system: of this thread where it has one connection; opened anew in a forked child."""
        if self.protocol in ONE_CONNECTION:
            return self._of_this_thread()
        if self._pid != os.getpid() and self._reopen is not None:
            self._filesystem = _open(*self._reopen)[0]
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

        return until_done(self.outages, described, attempt, lambda: self.heard(0, described))

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
                    self._filesystem = _open(uri, {**options, "skip_instance_cache": True})[0]
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
            return _open(uri, storage_options)
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


def is_protocol(scheme: str) -> bool:
    """Whether fsspec knows a file system of this name."""
    from fsspec import available_protocols

    return scheme in available_protocols()


def _open(uri: str, storage_options: Mapping[str, Any]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    shown = redact_path(uri)
    secrets = secrets_in(storage_options)
    try:
        filesystem, name = url_to_fs(uri, **_as_given(uri, storage_options))
    except OptionError:
        raise
    except Exception as error:
        ours = caused_by(_unopened(uri, shown, error, secrets), error, secrets)
        raise ours from ours.__cause__
    return filesystem, str(name)


def _unopened(uri: str, shown: str, error: Exception, secrets: frozenset[str]) -> RankloadError:
    """The error for a file system that could not be made."""
    told = redact_text(str(error), secrets)
    if isinstance(error, ImportError):
        return OptionError(f"{shown}: {_how_to_install(uri, told)}", path=shown)
    if isinstance(error, TypeError):
        return OptionError(f"{shown}: storage_options do not fit: {told}", path=shown)
    if isinstance(error, ValueError) and "rotocol" in told:
        return OptionError(
            f"{shown}: unknown protocol {path_scheme(uri)!r}; expected a local path, http(s), "
            "or a protocol that fsspec knows",
            path=shown,
        )
    return store_error(error, shown, secrets=secrets)


def _as_given(uri: str, storage_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, by which the http(s) part of a chain is sent as it is written: it may be signed to the letter.

    Its headers, cookies and login go to its own server alone.
    """
    options = dict(storage_options)
    for scheme in {"http", "https"} & set(path_schemes(uri)):
        own = options.get(scheme) or {}
        if not isinstance(own, Mapping):
            continue
        match = _CHAINED_URL.search(uri)
        encoded = {"encoded": True} if match is not None and match[1].lower() == scheme else {}
        options[scheme] = {**encoded, **_kept_home(own)}
    return options


def _kept_home(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of fsspec's http by which what is the user's is in the headers of a client that `_client` makes."""
    client = options.get("client_kwargs") or {}
    if not isinstance(client, Mapping) or "get_client" in options:
        return dict(options)
    auth = options.get("auth") or client.get("auth")
    theirs = {name: value for name, value in client.items() if name not in _USERS}
    headers = headers_of(client, options, auth)
    ours = {name: value for name, value in options.items() if name not in _USERS}
    return {**ours, "client_kwargs": {**theirs, "headers": headers}, "get_client": _client}


async def _client(**options: Any) -> Any:
    """The client of fsspec's http. Redirected to another server, it sends none of the headers that are the user's.

    aiohttp itself leaves out Authorization, where it is a header, and nothing else.
    """
    from aiohttp import ClientSession, TraceConfig
    from yarl import URL

    async def redirected(session: Any, context: Any, told: Any) -> None:
        location = told.response.headers.get("Location") or told.response.headers.get("URI") or ""
        if told.url.join(URL(location)).origin() != told.url.origin():
            for name in [name for name in told.headers if name.lower() not in _ANYBODYS]:
                # The next request is sent with what is left.
                told.headers.popall(name, None)

    trace = TraceConfig()
    trace.on_request_redirect.append(redirected)
    return ClientSession(**{**options, "trace_configs": [*options.get("trace_configs", ()), trace]})


def _how_to_install(uri: str, error: str) -> str:
    schemes = path_schemes(uri)
    for scheme in schemes:
        if scheme in _EXTRAS:
            extra = _EXTRAS[scheme]
            return f"reading {scheme}:// needs a package that is missing; pip install 'rankload[{extra}]'"
    return f"a package that {schemes[0] if schemes else 'its protocol'}:// needs is missing: {error}"


def _is_inside(found: Mapping[str, Any], folder: str) -> bool:
    """Whether it lies in `folder`: some file systems list the folder itself, or a file of that name."""
    own = str(found.get("name", "")).rstrip("/")
    return own != folder and own != f"/{folder}" and own != folder.removeprefix("/")


def _entry(found: Mapping[str, Any], folder: str) -> Entry:
    is_folder = found.get("type") == "directory"
    size = found.get("size")
    return Entry(
        str(found["name"]).rstrip("/").rpartition("/")[2],
        is_folder,
        size if isinstance(size, int) and not is_folder else None,
        _seconds(next((found[key] for key in _TIME_FIELDS if found.get(key)), None)),
    )


def _seconds(time: Any) -> float | None:
    """A time as file systems state it, in seconds of the epoch."""
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.replace("Z", "+00:00"))
        except ValueError:
            return None
    if isinstance(time, datetime):
        return time.timestamp()
    return float(time) if isinstance(time, int | float) else None


def _callback(meter: Meter) -> Any:
    from fsspec.callbacks import Callback

    class Count(Callback):  # type: ignore[misc]
        called = False

        def relative_update(self, inc: int = 1) -> None:
            self.called = True
            meter.add(inc)

        def absolute_update(self, value: int) -> None:
            self.called = True
            meter.reach(value)

    return Count()
