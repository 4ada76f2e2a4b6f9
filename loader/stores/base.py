"""The interface of a store: whole objects by name, in local files, http(s), fsspec's file systems or object stores.

What a load reads is found by names that are derived, so that stores that cannot list serve as well; `Store.entries`
lists a folder for whoever looks for checkpoints in it. Each store maps every error of its backend to
``rankload.loader.errors``, with secrets taken out, and tries again what may pass (``loader.retries``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

from ..retries import Outages
from .sums import StoredSum

OnBytes = Callable[[int], None]
"""Called with the number of bytes that have just arrived: 0 while nothing comes (several times a second, so that what
it raises stops the transfer promptly), negative where a broken transfer starts again."""

Heard = Callable[[int, str], None]
"""Called while a store waits for an answer, several times a second: with 0, and what it waits for, without secrets.
With more than 0 once something came. It ends the wait by raising. Any thread may call it."""


def unheard(n_bytes: int, waiting_for: str) -> None:
    """The `Heard` of a caller for whom nobody waits: calls block for as long as they block."""


ONE_CONNECTION = frozenset({"sftp", "ssh", "ftp", "smb"})
"""Protocols whose file systems use one connection, on which several threads would wait for ever: each gets its own."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://|::)")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about one object."""

    name: str = field(repr=False)  # may have a signature in it
    size_bytes: int | None
    """None where the store does not say before the object is read."""
    version: str | None = None
    """Changes when the content does (ETag, generation, modification time); None where the store has none."""
    is_folder: bool = False
    certain: bool = True
    """False where the store cannot say without a download whether there is such an object."""
    may_be_page: bool = field(default=False, compare=False)
    """Whether the store calls it a page, as servers answer to what is not there."""
    is_stream: bool = field(default=False, compare=False)
    """Whether the store tells neither its size nor that it does ranges: it has to come whole, by one request."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies directly in a folder."""

    name: str
    """Its own, without the folder's."""
    is_folder: bool
    size_bytes: int | None = None
    """None for a folder, and where the store does not say."""
    modified_s: float | None = None
    """When it was last written, in seconds of the epoch; None where the store does not say."""
    link: str | None = None
    """What it links to, where it is a symbolic link, as the link has it."""


class Store(Protocol):
    """Objects by name. Methods block; all may be called from several threads, and in a forked child."""

    @property
    def is_local(self) -> bool:
        """Whether objects are files on this node, which are used where they lie (`local_path`)."""

    @property
    def outages(self) -> Outages:
        """What the call that the store belongs to knows of outages, and for how long it waits for one to pass."""

    @property
    def heard(self) -> Heard:
        """What every method calls while it waits, `download` excepted, which has its own."""

    @property
    def identity(self) -> str:
        """Differs between stores whose objects could have equal names; holds no secret in clear."""

    def describe(self, name: str) -> str:
        """`name` for messages and receipts: the URI without user info, and a URL without its query."""

    def origin(self, name: str) -> Hashable:
        """Whose answer it is that the object `name` gets, as `Outages.answered` calls it."""

    def join(self, name: str, child: str) -> str:
        """The name of `child` (may hold ``/``) under the folder `name`."""

    def stat(self, name: str) -> ObjectInfo | None:
        """None where there is no such object. Raises `AccessError` where the store refuses to say (`probes`)."""

    def peek(self, name: str, n_bytes: int) -> bytes | None:
        """The first `n_bytes` of the object, or all of a smaller one; None where only whole objects can be had.

        Raises `NotFoundError` and `AccessError`.
        """

    def download(
        self, name: str, target_path: str, on_bytes: OnBytes, expected: ObjectInfo | None = None
    ) -> None:
        """Writes the whole object to `target_path`, where a file appears only once its size has been checked.

        `expected` is what `stat` said. Raises `NotFoundError`, `AccessError`, or `CorruptError` for a body
        that is shorter or longer than the store said, and whatever `on_bytes` raises; no partial file stays. Where
        the disk refuses, some stores raise its OSError, others an `AccessError`.
        """

    def read_small(self, name: str, limit: int) -> bytes:
        """The whole object, in memory. `CorruptError` where it holds more than `limit` bytes."""

    def local_path(self, name: str) -> str:
        """The file on this node (local stores only)."""

    def link_targets(self, link_name: str, text: str) -> list[str]:
        """The names that `text`, found in the link `link_name`, may stand for, the likeliest first.

        Raises `UnsafeError` where it names another store.
        """

    def stored_sums(self, info: ObjectInfo) -> tuple[StoredSum, ...]:
        """Checksums of the whole object that the store keeps; may send a request for them. Empty where that fails."""

    def entries(self, name: str) -> list[Entry] | None:
        """What lies directly in the folder `name`, in no order; None where the store cannot list.

        Empty where there is no such folder. Raises `AccessError` where the store refuses.
        """

    def nearby(self, name: str) -> str:
        """Sentences for a message on what lies at `name`, which is no checkpoint, or beside it; "" if not known."""

    def close(self) -> None:
        """Gives back connections; the store can be used again afterwards."""


def path_scheme(path: str) -> str | None:
    """``s3`` for ``s3://bucket/key`` and ``zip`` for ``zip::s3://...``; None for a local path."""
    match = _SCHEME.match(path)
    return match[0].lower() if match else None


def path_schemes(path: str) -> list[str]:
    """Those of a chain, in order: ``zip`` and ``s3`` for ``zip::s3://...``."""
    return [scheme.lower() for scheme in _SCHEME.findall(path)]
