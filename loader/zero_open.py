"""Opening ZeRO's files of one checkpoint, whichever way they came: which a rank needs, and what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..distributed.topology import Topology
from .arguments import LoadRequest
from .engine import engine_classes, is_deepspeed_engine, name_parameters
from .errors import NotFoundError
from .fetch import FetchedFile
from .locate import MODEL_STATES
from .monolithic import Contents, rng_list
from .restore import optimizer_classes, scheduler_classes
from .torch_file import FileIndex, read_index
from .zero_contents import ZeroContents, zero_contents, zero_tree
from .zero_files import OptimNaming, files_for_rank, model_file, optim_namings
from .zero_layout import check_world_size, zero_checkpoint
from .zero_model_states import ModelStates, read_model_states
from .zero_optim_states import OptimStates, read_optim_states

Find = Callable[[str], tuple[str, str] | None]
"""A ZeRO file's name to (local path, what messages call it); None where it is not among the files at hand."""


@dataclass(frozen=True)
class ZeroFiles:
    """What the first rank's model file tells of all the others."""

    name: str
    first: ModelStates
    index: FileIndex

    @classmethod
    def open(cls, find: Find, *, name: str) -> ZeroFiles:
        """Reads the first rank's model file. Raises `NotFoundError` where there is none."""
        for candidate in MODEL_STATES:
            found = find(candidate)
            if found is not None:
                index = read_index(found[0], name=found[1])
                return cls(name, read_model_states(index.tree, file=found[1]), index)
        raise NotFoundError(f"{name} has no {' or '.join(MODEL_STATES)}", path=name)

    @property
    def world_size(self) -> int:
        return self.first.world_size

    @property
    def stage(self) -> int:
        """3, 0, or 1 for 1 and 2, which differ in nothing here."""
        if self.first.partitioned:
            return 3
        return 0 if self.first.param_shapes is None else 1

    def check(self, world_size: int, *, weights_only: bool) -> None:
        """Raises `LayoutError` naming both sizes where this job cannot take the checkpoint."""
        if weights_only and self.stage < 3:
            return  # the weights are whole in the first rank's file
        check_world_size(zero_checkpoint(self.first, None), world_size, file=self.name)

    def has_optimizer_files(self, *, weights_only: bool) -> bool:
        """Whether there are files of the optimizer that this load needs."""
        return self.stage == 3 or (self.stage > 0 and not weights_only)

    def needs_own_files(self, *, weights_only: bool) -> bool:
        return self.has_optimizer_files(weights_only=weights_only)

    def optimizer_spellings(self) -> list[str]:
        """How rank 0's optimizer file may be called, the likeliest first."""
        return [naming.name(0) for naming in optim_namings(bf16=self.first.bf16)]

    def files_for(
        self, rank: int, world_size: int, spelling: str | None, *, weights_only: bool
    ) -> tuple[str, ...]:
        """What `rank` needs, relative to the folder. `spelling` is how rank 0's optimizer file is called."""
        naming = next((one for one in optim_namings() if one.name(0) == spelling), None)
        return files_for_rank(
            self.stage, self.world_size, rank, world_size, weights_only=weights_only, naming=naming
        )


def read_zero(
    zero: ZeroFiles, find: Find, request: LoadRequest, topology: Topology, files: list[FetchedFile]
) -> tuple[list[FileIndex], Contents, ZeroContents]:
    """Indexes, contents and layout of the files that this rank restores from.

    Raises `NotFoundError` where a file is not among `files`, naming those that are.
    """
    indexes = [zero.index]
    rank = min(topology.rank, zero.world_size - 1)
    models: dict[int, ModelStates] = {0: zero.first}
    if zero.stage == 3 and rank:
        models[rank] = _read(find, [model_file(rank, partitioned=True)], read_model_states, files, indexes)
    optims: dict[int, OptimStates] = {}
    if zero.has_optimizer_files(weights_only=request.weights_only):
        names = [naming.name(rank) for naming in _likeliest_first(zero)]
        optims[rank] = _read(find, names, read_optim_states, files, indexes)
    whole = zero_contents(models, optims, weights_only=request.weights_only)
    model = getattr(request.state, "model", None)
    if is_deepspeed_engine(model):
        whole = name_parameters(model, whole)
        optimizer_class, scheduler_class = engine_classes(model)
    else:
        optimizer_class = _first(optimizer_classes(request.state), "Optimizer")
        scheduler_class = _first(scheduler_classes(request.state), "Scheduler")
    tree = zero_tree(
        whole,
        rank=rank,
        optimizer_class=optimizer_class,
        scheduler_class=scheduler_class,
        weights_only=request.weights_only,
    )
    own = tree.pop("state")
    rng = rng_list(tree.get("rng"))
    if rng is not None:
        tree.pop("rng")
    return indexes, Contents("deepspeed", own, rng, tree), whole


def _likeliest_first(zero: ZeroFiles) -> Iterator[OptimNaming]:
    return optim_namings(bf16=zero.first.bf16)


def _read(
    find: Find,
    names: list[str],
    reader: Callable[..., Any],
    files: list[FetchedFile],
    indexes: list[FileIndex],
) -> Any:
    for name in names:
        found = find(name)
        if found is not None:
            index = read_index(found[0], name=found[1])
            indexes.append(index)
            return reader(index.tree, file=found[1])
    among = "; ".join(
        f"{file.source}" + (f" ({', '.join(file.members[:8])})" if file.members else "") for file in files
    )
    raise NotFoundError(
        f"this rank needs {' or '.join(names)}, which is not in {among}", path=files[0].source
    )


def _first(names: Any, default: str) -> str:
    return next(iter(names), default)
