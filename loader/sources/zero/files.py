"""Fetches the files of a ZeRO checkpoint from a DeepSpeed folder, or from Composer's archives, one for each saved rank.

`ZeroSource` is what both offer: `find` gives what is on this node already, `fetch` brings more. `needs` and `open` work
out which files a rank needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ...checkpoint import Opening
from ...errors import LayoutError, NotFoundError
from ...fetch.files import FetchedFile
from ...formats.torch_file import FileIndex
from ...template import expand_path, template_variables
from .file_names import Needed, OptimNaming, optim_namings

ZERO_FOLDER = "deepspeed"
"""The folder inside Composer's archives that holds ZeRO's files."""


class ZeroSource(Protocol):
    """Brings the files of saved ranks to this node, and finds them there."""

    @property
    def files(self) -> list[FetchedFile]:
        """What was fetched for this rank, each file or archive once."""

    def find(self, name: str) -> tuple[str, str] | None:
        """(local path, what messages call it) of the ZeRO file `name`; None where it has not been fetched."""

    def index(self, path: str, name: str) -> FileIndex:
        """The index of a file that `find` returned as (`path`, `name`)."""

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        """Finds out how the optimizer's files are called. Every rank must call, before it fetches any.

        Raises `NotFoundError`, on every rank, where saved rank 0 has none.
        """

    def fetch(
        self,
        needed: Needed,
        stage: str,
        *,
        saved_world_size: int,
        partitioned: bool,
        part: int = 0,
        layers: Sequence[str] = (),
    ) -> None:
        """Fetches the files that are `needed` of the model's `part` (``mp_rank``), and the layer files named `layers`.

        `stage` names the fetch in messages and timings; `saved_world_size` counts data-parallel ranks; `partitioned` is
        stage 3. Every rank must call, also one that needs nothing.
        """


class FolderSource:
    """A DeepSpeed tag folder, whose files' names are derived from rank and stage."""

    def __init__(self, opening: Opening, folder: str, first: FetchedFile) -> None:
        self._opening = opening
        self._folder = folder
        self._naming: OptimNaming | None = None
        self._found: dict[str, FetchedFile] = {first.name.rsplit("/", 1)[-1]: first}

    @property
    def files(self) -> list[FetchedFile]:
        return list(self._found.values())

    def find(self, name: str) -> tuple[str, str] | None:
        file = self._found.get(name)
        return None if file is None else (file.path, file.source)

    def index(self, path: str, name: str) -> FileIndex:
        return self._opening.index(path, name)

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        namings = {naming.name(0): naming for naming in optim_namings(bf16=bf16)}
        store, shown = self._opening.store, self._opening.store.describe(self._folder)

        def probe(_: Any) -> str:
            for name in namings:
                if store.stat(store.join(self._folder, name)) is not None:
                    return name
            tried = ", ".join(namings)
            raise NotFoundError(f"{shown} has no optimizer file of rank 0; looked for {tried}", path=shown)

        with self._opening.stages.timed("locate"):
            self._naming = namings[self._opening.session.channel.decide("optimizer files", None, probe)]

    def fetch(
        self,
        needed: Needed,
        stage: str,
        *,
        saved_world_size: int,
        partitioned: bool,
        part: int = 0,
        layers: Sequence[str] = (),
    ) -> None:
        store = self._opening.store
        names = [*needed.files(partitioned=partitioned, naming=self._naming, part=part), *layers]
        objects = {name: store.join(self._folder, name) for name in names if name not in self._found}
        fetched = self._opening.fetch(list(objects.values()), stage)
        self._found.update({name: fetched.files[path] for name, path in objects.items()})


class ArchiveSource:
    """Composer's archives: the r-th holds saved rank r's files, the first also what all ranks need."""

    def __init__(self, opening: Opening, first: FetchedFile) -> None:
        self._opening = opening
        self._found: dict[int, FetchedFile] = {0: first}

    @property
    def files(self) -> list[FetchedFile]:
        return list(self._found.values())

    def find(self, name: str) -> tuple[str, str] | None:
        member = f"{ZERO_FOLDER}/{name}"
        for archive in self._found.values():
            if member in archive.members:
                return f"{archive.path}/{member}", f"{archive.source}:{member}"
        return None

    def index(self, path: str, name: str) -> FileIndex:
        return self._opening.index(path, name)

    def locate_optimizer(self, *, bf16: bool | None) -> None:
        """Does nothing: the members of a fetched archive are known."""

    def fetch(
        self,
        needed: Needed,
        stage: str,
        *,
        saved_world_size: int,
        partitioned: bool,
        part: int = 0,
        layers: Sequence[str] = (),
    ) -> None:
        ranks = sorted((needed.models | needed.optims) - self._found.keys())
        names: dict[int, str] = {}
        with self._opening.stages.stage(f"{stage}: names"):
            if needed.experts:
                raise LayoutError(
                    f"{self._found[0].source}: experts (MoE) in Composer's archives are not supported; restore them "
                    "from the folder that DeepSpeed saved"
                )
            if part or layers:
                raise LayoutError(
                    f"{self._found[0].source}: pipeline stages and tensor parallelism in Composer's archives are not "
                    "supported; restore them from the folder that DeepSpeed saved"
                )
            names = {rank: self._name(rank, saved_world_size) for rank in ranks}
        fetched = self._opening.fetch(list(names.values()), stage)
        self._found.update({rank: fetched.files[name] for rank, name in names.items()})

    def _name(self, rank: int, saved_world_size: int) -> str:
        """The object name of saved rank `rank`'s archive, from the path's template."""
        request, topology = self._opening.request, self._opening.session.topology
        first = self._found[0].source
        used = template_variables(request.path)
        if not used & {"rank", "local_rank", "node_rank"}:
            raise LayoutError(
                f"{first} is the first of {saved_world_size} ranks' archives, but the path has no "
                "{rank}: pass a template such as ep1-rank{rank}.tar",
                path=first,
            )
        places = {
            each: (node, local)
            for node, ranks in enumerate(topology.ranks_by_node)
            for local, each in enumerate(ranks)
        }
        if saved_world_size == topology.world_size and rank in places:
            node, local = places[rank]
        elif used <= {"rank", "run_name"}:
            node, local = 0, 0
        else:
            raise LayoutError(
                f"{first} was saved by {saved_world_size} ranks and this job has {topology.world_size}, so which "
                "node each of the archives is of is not known: the path may use {rank} and {run_name} only",
                path=first,
            )
        path = expand_path(
            request.path, rank=rank, local_rank=local, node_rank=node, run_name=request.run_name
        )
        return self._opening.name_of(path)
