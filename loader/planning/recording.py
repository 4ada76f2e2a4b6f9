"""Notes which files one rank's source asks for: `RankFiles` stands between the source and the checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from ..fetch.checkpoint_files import CheckpointFiles
from ..formats.torch_file import FileIndex
from ..saved.node_file import FileItem, ItemSpan, NodeFile

T = TypeVar("T")


class RankFiles:
    """The files of `files`, as one rank of a planned job asks for them; a `sources.base.Files`."""

    def __init__(self, files: CheckpointFiles) -> None:
        self._files = files
        self.asked: dict[str, NodeFile] = {files.first.path: files.first}
        """Those that the rank's node needs, by local path."""
        self.items_read: list[FileItem] = []
        """The torch files inside of them whose indexes the rank reads."""

    @property
    def name(self) -> str:
        return self._files.name

    @property
    def in_folder(self) -> bool:
        return self._files.in_folder

    @property
    def folder(self) -> str:
        return self._files.folder

    @property
    def by_rank(self) -> bool:
        return self._files.by_rank

    @property
    def first(self) -> NodeFile:
        return self._files.first

    def fetch(
        self,
        names: Sequence[str],
        stage: str,
        *,
        optional: bool = False,
        items: Mapping[str, Sequence[ItemSpan]] | None = None,
    ) -> dict[str, NodeFile]:
        return self._noted(self._files.fetch(names, stage, optional=optional, items=items))

    def will_look_beside(self, names: Sequence[str]) -> None:
        self._files.will_look_beside(names)

    def beside(self, names: Sequence[str], stage: str) -> dict[str, NodeFile]:
        return self._noted(self._files.beside(names, stage))

    def find(self, names: Sequence[str], what: str) -> str:
        return self._files.find(names, what)

    def existing(self, names: Sequence[str]) -> list[str]:
        return self._files.existing(names)

    def of_rank(self, rank: int, saved_world_size: int) -> str:
        return self._files.of_rank(rank, saved_world_size)

    def index(self, file: NodeFile, member: str = "") -> FileIndex:
        return self._files.index(file, member)

    def parsed(self, file: NodeFile, parse: Callable[[str, str], T]) -> T:
        return self._files.parsed(file, parse)

    def items(self, wanted: Sequence[FileItem], stage: str) -> list[FileIndex]:
        self.items_read += wanted
        return self._files.items(wanted, stage)

    def stage(self, name: str) -> AbstractContextManager[Any]:
        return self._files.stage(name)

    def any(self, what: str, flag: bool) -> bool:
        return self._files.any(what, flag)

    def _noted(self, found: dict[str, NodeFile]) -> dict[str, NodeFile]:
        self.asked |= {file.path: file for file in found.values()}
        return found
