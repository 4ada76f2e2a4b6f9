"""Fetches once more, into the same place, what does not match its checksum. Any rank may, while it reads.

`SecondFetch` is one rank's, for one load. The processes of a node agree by a lock beside the file
(`cache.holes.fetching_again`): whoever finds damage first fetches, the others find that it was done. So damaged bytes
leave the store twice for a node, not once for each rank; and what is damaged again, or lies in no store, is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..byte_ranges import ByteRange, union
from ..cache.holes import Landed, fetching_again
from ..context import LoadContext
from ..errors import CorruptError, FormatError, RankloadError, UnsafeError, fetched_twice
from ..saved.tensor import StorageRef
from ..stores.base import ObjectInfo, OnBytes
from .object_cache import ObjectCache
from .remote_file import fetch_again
from .remote_files import ObjectPart, RemoteFiles
from .rounds import count_own
from .tally import OnProgress
from .whole import obtain_again

T = TypeVar("T")
_SMALL_BYTES = 1 << 20
_ALL = ByteRange(0, 1 << 62)
"""Stands for a file that came whole."""


class SecondFetch:
    """What one rank fetches again, of the files of `remote`."""

    def __init__(self, context: LoadContext, remote: RemoteFiles) -> None:
        self._context = context
        self._remote = remote

    def storage(self, storage: StorageRef, why: str, is_right: Callable[[], bool] | None = None) -> bool:
        """As `ranges`, of a storage and its header."""
        first = storage.header if storage.header >= 0 else storage.offset
        return self.ranges(storage.file, [ByteRange(first, storage.offset + storage.nbytes)], why, is_right)

    def ranges(
        self,
        path: str,
        ranges: Sequence[ByteRange],
        why: str,
        is_right: Callable[[], bool] | None = None,
    ) -> bool:
        """Fetches `ranges` of this node's file at `path` again; of a file that came whole, all of it.

        Each byte is fetched again once. False where this load did so before on this node, or the file is from no store:
        then what is wrong stays wrong.
        `is_right`, where given, tells whether another process has put the right bytes there meanwhile. Of a file that
        comes in parts, only what has landed on this node is fetched. Raises as `read_ranges`, or as `obtain_again`.
        """
        known = self._remote.known
        in_parts, whole = path in known, known.whole_at(path)
        if not in_parts and whole is None:
            return False
        at, spans = (path, union(ranges)) if whole is None else (whole[0], (_ALL,))
        with fetching_again(at, known.load_id, lambda: self._context.stages.count(0)) as done:
            if is_right is not None and is_right():
                return True
            spans = done.left(spans)
            if not spans:
                return False
            done.note(spans)
            if whole is None:
                n_bytes = self._into_file(path, spans)
                name = known.name_of(path)
            else:
                n_bytes = self._whole(*whole[1:])
                name = whole[1]
            known.add_fetched({path if whole is None else whole[0]: n_bytes})
            self._remote.note_again(name, n_bytes, why)
        return True

    def reading(self, path: str, name: str, read: Callable[[], T], ranges: Sequence[ByteRange] = ()) -> T:
        """What `read` makes of the file at `path`; where that is damaged, once it was fetched again.

        Of a file that comes in parts, `ranges` are what it reads of it. One bit that flipped on the way can make an
        index, or a small file, seem to be of another kind; a large file is fetched again only where it is damaged.

        Raises as `read`, and as `ranges`.
        """
        kinds = self._kinds(path)
        try:
            return read()
        except kinds as error:
            made: list[T] = []

            def is_right() -> bool:
                with contextlib.suppress(*kinds):
                    made.append(read())
                return bool(made)

            again = self.ranges(path, ranges, error.message.removeprefix(f"{name}: "), is_right)
            if made:
                return made[0]
            if not again:
                raise
        try:
            return read()
        except CorruptError as error:
            raise fetched_twice(error) from error.__cause__

    def _kinds(self, path: str) -> tuple[type[RankloadError], ...]:
        """The errors after which the file at `path` is fetched again."""
        whole = self._remote.known.whole_at(path)
        large = whole is not None and whole[2].size_bytes > _SMALL_BYTES
        return (CorruptError,) if large else (CorruptError, FormatError, UnsafeError)

    def _into_file(self, path: str, spans: Sequence[ByteRange]) -> int:
        source = self._remote.known.open_source(self._context.store, path)
        return fetch_again(source, path, Landed(path).landed(spans), self._on_bytes())

    def _whole(self, name: str, part: ObjectPart) -> int:
        context, known = self._context, self._remote.known
        objects = ObjectCache(context.store, context.cache, known.load_id)
        info = ObjectInfo(part.object_name, part.size_bytes, part.store_version)
        on_bytes = self._on_bytes()
        return obtain_again(
            objects, info, self._remote, OnProgress(on_bytes, lambda _: on_bytes(0), lambda _: None)
        )

    def _on_bytes(self) -> OnBytes:
        return count_own(self._context, self._remote)
