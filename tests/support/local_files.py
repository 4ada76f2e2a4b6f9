"""A checkpoint's `Files` for one rank, over files that are on this machine: what a source is handed, without a load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankload.loader.errors import LayoutError, NotFoundError
from rankload.loader.formats.torch_file import FileIndex, read_index
from rankload.loader.formats.torch_items import read_item
from rankload.loader.saved.node_file import FileItem, ItemSpan, NodeFile
from rankload.loader.stores.locate import MODEL_STATES


class LocalFiles:
    """The files of `path`: one file, or a folder of which `first` shows what it is.

    With `archives`, the path is the first of several ranks' archives, which lie there as folders with their members.
    """

    def __init__(
        self, path: Path, *, first: Sequence[str] = MODEL_STATES, archives: Sequence[Path] = ()
    ) -> None:
        self.path = path
        self.name = str(path)
        self.in_folder = path.is_dir() and not archives
        self.by_rank = bool(archives)
        self.archives = {str(one): one for one in archives}
        self.fetched: list[str] = []
        """Names of what was fetched after the first file, in order."""
        self.stages: list[str] = []
        """Fetches, agreements and questions, in order."""
        self.indexed: list[str] = []
        """What messages call the files whose indexes were read."""
        name = next(one for one in first if (path / one).exists()) if self.in_folder else str(path)
        self.first = self._file(name)

    def will_look_beside(self, names: Sequence[str]) -> None:
        pass

    def fetch(
        self,
        names: Sequence[str],
        stage: str,
        *,
        optional: bool = False,
        items: Mapping[str, Sequence[ItemSpan]] | None = None,
    ) -> dict[str, NodeFile]:
        self.stages.append(stage)
        there = [name for name in names if not optional or self._place(name).exists()]
        self.fetched += there
        return {name: self._file(name) for name in there}

    def beside(self, names: Sequence[str], stage: str) -> dict[str, NodeFile]:
        self.stages.append(stage)
        return {name: self._file(name) for name in names if self.in_folder and self._place(name).exists()}

    def find(self, names: Sequence[str], what: str) -> str:
        self.stages.append(f"find {what}")
        for name in names:
            if self._place(name).exists():
                return name
        raise NotFoundError(f"{self.name} has no {what}; looked for {', '.join(names)}", path=self.name)

    def of_rank(self, rank: int, saved_world_size: int) -> str:
        if rank >= len(self.archives):
            raise LayoutError(f"{self.name} is the first of {saved_world_size} ranks' archives")
        return list(self.archives)[rank]

    def index(self, file: NodeFile, member: str = "") -> FileIndex:
        path, name = (
            (f"{file.path}/{member}", f"{file.source}:{member}") if member else (file.path, file.source)
        )
        self.indexed.append(name)
        return read_index(path, name=name)

    def parsed(self, file: NodeFile, parse: Callable[[str, str], Any]) -> Any:
        return parse(file.path, file.source)

    def existing(self, names: Sequence[str]) -> list[str]:
        self.stages.append("existing")
        return [name for name in names if self._place(name).exists()]

    def items(self, wanted: Sequence[FileItem], stage: str) -> list[FileIndex]:
        self.stages.append(stage)
        return [
            read_item(
                item.file.path,
                item.span.start,
                item.span.stop,
                name=f"{item.file.source}: {item.key}",
                key=f"{item.key}:",
            )
            for item in wanted
        ]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.stages.append(name)
        yield

    def any(self, what: str, flag: bool) -> bool:
        self.stages.append(what)
        return flag

    def _place(self, name: str) -> Path:
        return self.path / name if self.in_folder else Path(name)

    def _file(self, name: str) -> NodeFile:
        place = self._place(name)
        if not place.exists():
            raise NotFoundError(f"{place} is not there", path=str(place))
        if place.is_dir():
            members = sorted(str(one.relative_to(place)) for one in place.rglob("*") if one.is_file())
            return NodeFile(name, str(place), str(place), "archive", tuple(members))
        return NodeFile(name, str(place), str(place), "file")
