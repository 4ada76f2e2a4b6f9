"""Defines what a source is, and what it is handed: `Source` turns a checkpoint's `Files` into a `Saved`.

A source knows how one kind of checkpoint lies in files, and nothing of what will be restored but the `Demand`. The
files of a load are fetched once per node, by all ranks together; so a source asks for them by `Files` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from ..formats.torch_file import FileIndex
from ..saved.contents import Saved
from ..saved.demand import Demand
from ..saved.node_file import FileItem, ItemSpan, NodeFile

T = TypeVar("T")


class Files(Protocol):
    """A checkpoint's files, as one rank sees them. Where it says so, every rank must call, in the same order."""

    @property
    def name(self) -> str:
        """What messages and the receipt call the checkpoint; without secrets."""

    @property
    def in_folder(self) -> bool:
        """Whether the checkpoint is a folder's files; their names are relative to it then, else names of objects."""

    @property
    def folder(self) -> str:
        """The own name of the folder that the path names; empty where it names a file, or one of DeepSpeed's tags."""

    @property
    def by_rank(self) -> bool:
        """Whether the path names a file for each rank, or for each of a node's: `of_rank` gives their names."""

    @property
    def first(self) -> NodeFile:
        """The file that the path names; of a folder, the first one that shows what it is."""

    def fetch(
        self,
        names: Sequence[str],
        stage: str,
        *,
        optional: bool = False,
        items: Mapping[str, Sequence[ItemSpan]] | None = None,
    ) -> dict[str, NodeFile]:
        """Brings the files `names` to this node, and gives them by these names. Every rank must call.

        Of a remote file, what `items` wants next may come along: the torch files inside of it, by its name.

        Raises `NotFoundError` on all ranks where one is missing; with `optional`, it is left out. `stage` is the
        fetch's name in messages and timings.
        """

    def will_look_beside(self, names: Sequence[str]) -> None:
        """Says that `beside` will be called with `names`, so that the store may be asked with the next `fetch`."""

    def beside(self, names: Sequence[str], stage: str) -> dict[str, NodeFile]:
        """Brings those of `names` that lie in the folder that the path names to this node. Every rank must call.

        It gives them by these names. There are none where the path names a file, or one of DeepSpeed's tags. What the
        store refuses to speak of is taken not to be there. Raises as `fetch`.
        """

    def find(self, names: Sequence[str], what: str) -> str:
        """The first of `names` that exists; rank 0 asks the store. Every rank must call, with the same names.

        Raises `NotFoundError` on all ranks where there is none; `what` is what messages call it.
        """

    def existing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that exist; rank 0 asks the store. Every rank must call, with the same names."""

    def of_rank(self, rank: int, saved_world_size: int) -> str:
        """The name of saved rank `rank`'s file, by the path's template. Raises `LayoutError` where it has none."""

    def index(self, file: NodeFile, member: str = "") -> FileIndex:
        """The index of a file of tensors that was fetched; of an archive, of its `member`."""

    def parsed(self, file: NodeFile, parse: Callable[[str, str], T]) -> T:
        """What `parse` makes of another file that was fetched, from its path here and its name for messages.

        Raises as `parse`; of a remote file that came damaged, once it was fetched again.
        """

    def items(self, wanted: Sequence[FileItem], stage: str) -> list[FileIndex]:
        """The indexes of torch files inside fetched files, in the order of `wanted`. Every rank must call.

        Of a remote file, only the ends of its items are fetched for that. Raises as `index`, and `CorruptError` where a
        file ends before an item does, on all ranks alike. `stage` is as in `fetch`.
        """

    def stage(self, name: str) -> AbstractContextManager[Any]:
        """A timed block, whose failure on one rank is all ranks', by the next thing that they do together. Every rank
        must enter."""

    def any(self, what: str, flag: bool) -> bool:
        """Whether `flag` is true on any rank. Every rank must call; `what` names the question."""


class Source(Protocol):
    """One kind of checkpoint."""

    def recognises(self, files: Files) -> bool:
        """Whether the checkpoint is of this kind, by what was fetched so far. Every rank must call; all agree."""

    def open(self, files: Files, demand: Demand) -> Saved:
        """What the checkpoint holds of what `demand` asks for on this rank. Every rank must call.

        Fetches the files that are needed and reads their indexes. Raises, on all ranks alike, `NotFoundError`,
        `FormatError`, `CorruptError`, `UnsafeError` or `LayoutError`, as the files give cause.
        """
