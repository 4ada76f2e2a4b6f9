"""Gives a source the files of the checkpoint that a load was asked for: `sources.base.Files`, for all ranks together.

Each file is fetched once per node (`files.fetch_files`); of one that comes in parts that is its index alone, and
`parts` brings the rest. What was fetched and read is kept here, for the stages after the source and for the receipt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..byte_ranges import ByteRange
from ..cache.folder import folder_of
from ..context import LoadContext
from ..errors import UNPROVED, InternalError, LayoutError, MismatchError
from ..formats.torch_file import FileIndex
from ..saved.contents import SetFile
from ..saved.node_file import FileItem, ItemSpan, NodeFile
from ..saved.tree import find_unknown
from ..stores.locate import Located
from ..stores.names import file_name
from ..stores.probes import Probes, all_there
from ..template import expand_path, template_variables
from .again import SecondFetch
from .ahead import ask_all_ahead
from .files import FetchedFile, FileNeed, fetch_files
from .items import ends_of, read_items
from .needs import NeedTable
from .remote_files import RemoteFiles

T = TypeVar("T")
_FETCHED_TWICE_BYTES = 64 << 20
"""Files that no checksum proves are fetched again, to see whether they came damaged, up to so many bytes of them."""


@dataclass(frozen=True)
class NamedPath:
    """The path that a load was given, and how it becomes names of objects."""

    template: str = field(repr=False)  # may have a signature or a password in it
    run_name: str | None
    name_of: Callable[[str], str]
    """Gives the name in the store of the object that a path, without variables, means."""


class CheckpointFiles:
    """The files of one checkpoint, as this rank sees them; a `sources.base.Files`."""

    def __init__(self, context: LoadContext, remote: RemoteFiles, located: Located, path: NamedPath) -> None:
        """Fetches the first file. Every rank must call; raises as `fetch_files`."""
        self.context = context
        self.remote = remote
        """The files that come in parts: at first their index alone."""
        self.again = SecondFetch(context, remote)
        """Fetches once more what does not match its checksum."""
        self._index_at: dict[str, FileIndex] = {}
        """By local path."""
        self._located = located
        self._path = path
        self._fetched: dict[str, FetchedFile] = {}
        self._names: dict[str, str] = {}
        """Names of files, the same on all ranks, by local path."""
        self._soon: list[str] = []
        """Objects that rank 0 will ask for, besides those that are fetched next."""
        self._places: NeedTable | None = None
        """Which rank is where, once all have asked each other."""
        first = self._fetch([located.first], "fetch first")[located.first]
        # Of a folder, relative to it, as all its files are named; and without the query of a URL.
        relative = located.first_inside or file_name(first.name)
        self._first = replace(first, name=relative) if self.in_folder else first
        self._fetched[self._first.name] = self._first

    def object_of(self, file: SetFile) -> str:
        """The name in the store of one of the checkpoint's files."""
        located, join = self._located, self.context.store.join
        if file.beside:
            return join(located.root or "", file.name)
        return join(located.name, file.name) if self.in_folder else file.name

    @property
    def located(self) -> Located:
        """Where the checkpoint was found, by names in the store."""
        return self._located

    @property
    def in_folder(self) -> bool:
        return self._located.form == "folder"

    @property
    def name(self) -> str:
        return self.context.store.describe(self._located.name) if self.in_folder else self._first.source

    @property
    def folder(self) -> str:
        return "" if self._located.root is None else file_name(self._located.root)

    @property
    def by_rank(self) -> bool:
        return bool(template_variables(self._path.template) & {"rank", "local_rank", "node_rank"})

    @property
    def first(self) -> NodeFile:
        return self._first

    @property
    def indexes(self) -> list[FileIndex]:
        """Of the files of tensors that the source read, in its order."""
        return list(self._index_at.values())

    @property
    def fetched(self) -> list[FetchedFile]:
        """What was fetched for this rank, each file or archive once."""
        return list(self._fetched.values())

    def fetch(
        self,
        names: Sequence[str],
        stage: str,
        *,
        optional: bool = False,
        items: Mapping[str, Sequence[ItemSpan]] | None = None,
    ) -> dict[str, NodeFile]:
        store = self.context.store
        objects = {
            name: store.join(self._located.name, name) if self.in_folder else name
            for name in names
            if name not in self._fetched
        }
        parts = {
            objects[name]: [part for one in spans for part in ends_of(self.context, one)]
            for name, spans in (items or {}).items()
            if name in objects and not store.is_local
        }
        fetched = self._fetch([FileNeed(path, optional) for path in objects.values()], stage, parts=parts)
        self._fetched.update({name: fetched[path] for name, path in objects.items() if path in fetched})
        return {name: self._fetched[name] for name in names if name in self._fetched}

    def will_look_beside(self, names: Sequence[str]) -> None:
        root, join = self._located.root, self.context.store.join
        if root is not None and self.context.session.topology.rank == 0:
            self._soon = [join(root, name) for name in names]

    def beside(self, names: Sequence[str], stage: str) -> dict[str, NodeFile]:
        root, store = self._located.root, self.context.store
        if root is None:
            return {}
        objects = {name: store.join(root, name) for name in names}
        with self.context.stages.timed("locate"):
            there = self.context.session.channel.decide(
                f"{stage}: find", None, lambda _: all_there(store, list(objects.values()))
            )
        # Rank 0 has told all of them.
        fetched = self._fetch(there, stage, same=True) if there else {}
        self._fetched.update(fetched)
        return {name: replace(fetched[path], name=name) for name, path in objects.items() if path in fetched}

    def _fetch(
        self,
        needs: Sequence[str | FileNeed],
        stage: str,
        *,
        same: bool = False,
        parts: Mapping[str, Sequence[ByteRange]] | None = None,
    ) -> dict[str, FetchedFile]:
        """Every rank must call, whatever it names, unless all name the `same`. The stage's bytes are counted on the
        node's first rank."""
        session = self.context.session
        with self.context.stages.timed(stage) as timing:
            same_as = self._places if same else None
            soon, self._soon = self._soon, []
            fetched = fetch_files(
                self.context,
                needs,
                self.remote,
                stage=stage,
                same_as=same_as,
                parts=parts or {},
                soon=soon,
            )
            self._places = fetched.table
            if session.topology.local_rank == 0:
                timing.bytes += fetched.fetched_bytes
        return dict(fetched.files)

    def find(self, names: Sequence[str], what: str) -> str:
        store = self.context.store

        def probe(_: Any) -> str:
            probes = Probes(store)
            objects = {
                name: store.join(self._located.name, name) if self.in_folder else name for name in names
            }
            # There are connections by now, so that all can be asked for at once.
            ask_all_ahead(self.context, list(objects.values()), beginning_only=True, at_once=len(objects))
            for name, one in objects.items():
                found = probes.look(one)
                if found is not None and not found.is_folder:
                    return name
            raise probes.nothing(f"{self.name} has no {what}; looked for {', '.join(names)}", self.name)

        with self.context.stages.timed("locate"):
            return str(self.context.session.channel.decide(f"find {what}", None, probe))

    def existing(self, names: Sequence[str]) -> list[str]:
        store = self.context.store
        objects = {store.join(self._located.name, name) if self.in_folder else name: name for name in names}
        with self.context.stages.timed("locate"):
            there = self.context.session.channel.decide(
                "existing", None, lambda _: all_there(store, list(objects))
            )
        return [objects[one] for one in there]

    def of_rank(self, rank: int, saved_world_size: int) -> str:
        template, run_name = self._path.template, self._path.run_name
        topology, first = self.context.session.topology, self._first.source
        used = template_variables(template)
        if not self.by_rank:
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
                "node each of the files is of is not known: the path may use {rank} and {run_name} only",
                path=first,
            )
        path = expand_path(template, rank=rank, local_rank=local, node_rank=node, run_name=run_name)
        return self._path.name_of(path)

    def index(self, file: NodeFile, member: str = "") -> FileIndex:
        path, name = (
            (f"{file.path}/{member}", f"{file.source}:{member}") if member else (file.path, file.source)
        )
        if path not in self._index_at:
            self._index_at[path] = self.again.reading(path, name, lambda: self.remote.index(path, name))
            self._names[path] = name
        return self._index_at[path]

    def parsed(self, file: NodeFile, parse: Callable[[str, str], T]) -> T:
        return self.again.reading(file.path, file.source, lambda: parse(file.path, file.source))

    def items(self, wanted: Sequence[FileItem], stage: str) -> list[FileIndex]:
        found, by_file = read_items(self.context, self.remote, self.again, wanted, stage)
        self._index_at |= {index.path: index for index in by_file}
        self._names |= {index.path: index.name for index in by_file}
        return found

    def stage(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return self.context.stages.announced(name)

    def any(self, what: str, flag: bool) -> bool:
        return bool(self.context.session.channel.decide(what, flag, any))

    @property
    def cache_dir(self) -> str | None:
        """The folder that fetched files were put into, or two with a comma between them where one had too little room;
        None where all are used in place."""
        if self.context.store.is_local and all(file.kind == "file" for file in self.fetched):
            return None
        folders = dict.fromkeys(filter(None, (folder_of(file.path) for file in self.fetched)))
        return ", ".join(folders) or self.context.cache.folder

    def name_at(self, path: str) -> str:
        """The name, the same on all ranks, of the file at a local path: of an archive's member ``ARCHIVE:MEMBER``."""
        known = self._names.get(path)
        if known is not None:
            return known
        for file in self._fetched.values():
            if path == file.path or (file.kind == "archive" and path.startswith(f"{file.path}/")):
                member = path[len(file.path) + 1 :]
                self._names[path] = f"{file.source}:{member}" if member else file.source
                return self._names[path]
        raise InternalError(
            f"{self.name}: {path} is read, and was not fetched; please report it", path=self.name
        )

    @property
    def renewed(self) -> list[str]:
        """The names of files all of which this rank fetched again for its node, while ranks may have read of them."""
        return [self.name_at(path) for path in self.remote.renewed]

    @contextlib.contextmanager
    def suspected(self) -> Iterator[None]:
        """Around work that fails where names or shapes do not fit: marks its error as `errors.UNPROVED` where an index
        from a store, which no checksum proves, may have come damaged."""
        try:
            yield
        except (LayoutError, MismatchError) as error:
            # A second load fetches all of them again.
            if not self.remote.renew_indexes and self._has_unproved_indexes():
                error.details[UNPROVED] = True
            raise

    def _has_unproved_indexes(self) -> bool:
        if self.context.store.is_local:
            return False
        in_parts = any(
            index.format == "safetensors" for index in self.indexes if index.path in self.remote.known
        )
        proved = {index.path for index in self.indexes if index.verifiable}
        whole = [
            file.size_bytes
            for file in self.fetched
            if file.whole is not None and not file.compared_by and file.path not in proved
        ]
        return (in_parts or bool(whole)) and sum(whole) <= _FETCHED_TWICE_BYTES

    def file_of(self, tree: Any) -> str:
        """The name of the file that an unknown type in `tree` came from, for messages; `name` where there is none."""
        unknown = {name for _, name in find_unknown(tree)}
        for index in self.indexes:
            if unknown and not unknown.isdisjoint(name for _, name in find_unknown(index.tree)):
                return index.name
        return self.name
