"""Brings the files of a ZeRO checkpoint from a DeepSpeed folder, or from Composer's archives, one for each saved rank.

`ZeroSource` is what both offer: `index` reads what is on this node already, `fetch` brings more. `needs` works out
which files a rank needs.
"""

from __future__ import annotations

from typing import Protocol

from ...errors import LayoutError
from ...formats.torch_file import FileIndex
from ...saved.node_file import NodeFile
from ..base import Files
from .file_names import ZERO_FOLDER, Needed, OptimNaming, optim_namings
from .model_states import ModelStates


class ZeroSource(Protocol):
    """Brings the files of saved ranks to this node, and reads their indexes."""

    @property
    def held(self) -> list[NodeFile]:
        """What was fetched for this rank, each file or archive once."""

    def index(self, name: str) -> FileIndex | None:
        """The index of the ZeRO file `name`; None where it has not been fetched."""

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        """Finds out how the optimizer's files are called. Every rank must call, before it fetches any.

        Raises `NotFoundError`, on every rank, where saved rank 0 has none.
        """

    def names(self, needed: Needed, *, first: ModelStates, part: int) -> list[str]:
        """The names of the files, or of the archives, that have what is `needed` of the model's `part` (``mp_rank``).

        The optimizer's are among them once they were located. Raises `LayoutError` where the path names no other rank's
        archive.
        """

    def fetch(self, needed: Needed, stage: str, *, first: ModelStates, part: int) -> None:
        """Fetches the files that are `needed` of the model's `part` (``mp_rank``).

        `stage` names the fetch in messages and timings; `first` is a model file of the checkpoint. Every rank must
        call, also one that needs nothing.
        """


class FolderSource:
    """A DeepSpeed tag folder, whose files' names are derived from rank and stage."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._naming: OptimNaming | None = None
        self._held: dict[str, NodeFile] = {files.first.name: files.first}

    @property
    def held(self) -> list[NodeFile]:
        return list(self._held.values())

    def index(self, name: str) -> FileIndex | None:
        file = self._held.get(name)
        return None if file is None else self._files.index(file)

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        namings = {naming.name(0): naming for naming in optim_namings(bf16=bf16)}
        self._naming = namings[self._files.find(list(namings), "optimizer file of rank 0")]

    def names(self, needed: Needed, *, first: ModelStates, part: int) -> list[str]:
        return list(needed.files(partitioned=first.partitioned, naming=self._naming, part=part))

    def fetch(self, needed: Needed, stage: str, *, first: ModelStates, part: int) -> None:
        names = self.names(needed, first=first, part=part)
        self._held.update(self._files.fetch([name for name in names if name not in self._held], stage))


class ArchiveSource:
    """Composer's archives: the r-th holds saved rank r's files, the first also what all ranks need."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._held: dict[int, NodeFile] = {0: files.first}

    @property
    def held(self) -> list[NodeFile]:
        return list(self._held.values())

    def index(self, name: str) -> FileIndex | None:
        member = f"{ZERO_FOLDER}/{name}"
        for archive in self._held.values():
            if member in archive.members:
                return self._files.index(archive, member)
        return None

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        """Does nothing: the members of a fetched archive are known."""

    def names(self, needed: Needed, *, first: ModelStates, part: int) -> list[str]:
        ranks = sorted(needed.models | needed.optims)
        return [
            self._files.first.name if not rank else self._files.of_rank(rank, first.world_size)
            for rank in ranks
        ]

    def fetch(self, needed: Needed, stage: str, *, first: ModelStates, part: int) -> None:
        ranks = sorted((needed.models | needed.optims) - self._held.keys())
        names: dict[int, str] = {}
        with self._files.stage(f"{stage}: names"):
            if needed.experts:
                raise self._unsupported("experts (MoE)")
            if part or needed.layers:
                raise self._unsupported("pipeline stages and tensor parallelism")
            names = {rank: self._files.of_rank(rank, first.world_size) for rank in ranks}
        fetched = self._files.fetch(list(names.values()), stage)
        self._held.update({rank: fetched[name] for rank, name in names.items()})

    def _unsupported(self, what: str) -> LayoutError:
        return LayoutError(
            f"{self._held[0].source}: {what} in Composer's archives are not supported; restore them from the folder "
            "that DeepSpeed saved",
            path=self._held[0].source,
        )
