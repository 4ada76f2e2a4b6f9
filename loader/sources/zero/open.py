"""Opens a ZeRO checkpoint: fetches the files that this rank needs, from a folder or from archives, and joins them.

`Zero.open` does, in order: `ZeroFiles.begin` (the first model file), `gather_files` (all the others),
`contents.zero_contents` (their layout) and `tree.zero_saved` (its parts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import LayoutError, NotFoundError
from ...saved.contents import Saved, SetFile
from ...saved.demand import Demand
from ...saved.model_parallel import Position
from ...stores.locate import MODEL_STATES
from ..base import Files
from ..single_file import COMPOSER_STATES, read_layout
from .contents import LaidOut, zero_contents
from .experts import check_experts, expert_files, optimizer_file, with_experts
from .file_names import ZERO_FOLDER, Needed, expert_file, model_file, optim_namings
from .files import ArchiveSource, FolderSource, ZeroSource
from .layers import check_layers, read_layer, with_layers
from .layout import zero_checkpoint
from .model_parallel import check_layout, check_model_part
from .model_states import ModelStates, read_model_states
from .needs import all_files, files_of_runs, own_files, wanted_runs
from .optim_states import OptimStates, read_optim_states
from .tree import zero_saved


class Zero:
    """A DeepSpeed checkpoint: its folder, or Composer's archives, each with the files of one saved rank."""

    def recognises(self, files: Files) -> bool:
        first = files.first
        return (files.in_folder and first.name in MODEL_STATES) or (
            first.kind == "archive" and any(member.startswith(f"{ZERO_FOLDER}/") for member in first.members)
        )

    def open(self, files: Files, demand: Demand) -> Saved:
        source: ZeroSource = FolderSource(files) if files.in_folder else ArchiveSource(files)
        with files.stage("read first"):
            zero = ZeroFiles.begin(source, demand, name=files.name)
        gather_files(files, zero)
        with files.stage("read states"):
            contents = zero_contents(
                zero.models, zero.optims, weights_only=demand.weights_only, laid_out=zero.laid_out
            )
            saved = replace(
                zero_saved(contents, zero.demand, name=files.name), files=_set_of_files(zero, demand)
            )
            return saved if files.in_folder else _of_archives(files, saved, demand)


def _set_of_files(zero: ZeroFiles, demand: Demand) -> tuple[SetFile, ...]:
    """All files of the checkpoint; none where the path names the first archive alone, and a load needs no other."""
    try:
        return zero.all_files()
    except LayoutError:
        # Weights below stage 3 are all in the first one.
        if demand.outline:
            raise
        return ()


def _of_archives(files: Files, saved: Saved, demand: Demand) -> Saved:
    """DeepSpeed's parts and Composer's own; of a part that both have, DeepSpeed's, and Composer's random states."""
    # Composer gathers all ranks' random states into the first archive.
    saved = replace(saved, kind="composer-zero", rng_per_rank=False)
    if COMPOSER_STATES not in files.first.members:
        return saved
    index = files.index(files.first, COMPOSER_STATES)
    composer = read_layout(index.tree, file=index.name)
    if demand.weights_only:
        return replace(saved, extra={**saved.extra, **composer.extra})
    schedulers = {**composer.state.get("schedulers", {}), **saved.state.get("schedulers", {})}
    return replace(
        saved,
        layout="composer",
        state={**composer.state, **saved.state, "schedulers": schedulers},
        rng=composer.rng if composer.rng is not None else saved.rng,
        extra={**saved.extra, **composer.extra},
    )


@dataclass
class ZeroFiles:
    """The files of a checkpoint that this rank has read, by saved rank.

    Of a model that is split, they are those of this rank's part; `head` may be of another part.
    """

    source: ZeroSource
    demand: Demand
    """Its position has the part of the model whose files this rank reads."""
    head: ModelStates
    """The model file that was read first, with how the model was split."""
    models: dict[int, ModelStates] = field(default_factory=dict)
    """Once experts' files are read, entry 0 has this rank's experts; so with a pipeline's layer files."""
    optims: dict[int, OptimStates] = field(default_factory=dict)
    experts: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Experts' files that were read: name to (tree, what messages call it)."""
    layers: frozenset[str] = frozenset()
    """Names of the layer files that were read."""
    laid_out: LaidOut | None = None
    """The layout, once `gather_files` has looked for the files that this rank needs."""

    @classmethod
    def begin(cls, source: ZeroSource, demand: Demand, *, name: str) -> ZeroFiles:
        """Reads the first model file, which `source` has; messages call the checkpoint `name`.

        Raises `NotFoundError` where there is none, `LayoutError` where the model was split in another way than this
        job's.
        """
        names = [model_file(0, partitioned=partitioned) for partitioned in (False, True)]
        for candidate in names:
            index = source.index(candidate)
            if index is not None:
                head = read_model_states(index.tree, file=index.name)
                demand = replace(demand, position=_position(demand, head))
                return cls(source, demand, head, {} if demand.position.part else {0: head})
        raise NotFoundError(f"{name} has no {' or '.join(names)}", path=name)

    @property
    def first(self) -> ModelStates:
        """The model file of saved rank 0 of this rank's part; `head` until it is read."""
        return self.models.get(0, self.head)

    @property
    def stage(self) -> int:
        """3, 0, or 1 for both 1 and 2, whose files need no distinction here."""
        if self.first.partitioned:
            return 3
        return 0 if self.first.param_shapes is None else 1

    @property
    def with_optimizer(self) -> bool:
        """Whether this load needs files of the optimizer."""
        return self.stage == 3 or (self.stage > 0 and not self.demand.weights_only)

    def all_files(self) -> tuple[SetFile, ...]:
        """The files of all saved ranks and parts of the model; not those of a pipeline's layers, which none names."""
        first, with_optimizer = self.head, self.stage > 0
        ranks = all_files(first.world_size, partitioned=first.partitioned, with_optimizer=with_optimizer)
        experts = (
            expert_file(layer, expert)
            for layer, count in enumerate(first.num_experts)
            for expert in range(count)
        )
        names = [
            name
            for part in range(first.layout.parts)
            for name in self.source.names(ranks, first=first, part=part)
        ]
        return tuple(map(SetFile, dict.fromkeys([*names, *experts])))

    def fetch(self, needed: Needed, stage: str) -> None:
        """Fetches what is `needed` and was not read. Every rank must call."""
        self.source.fetch(needed - self.held, stage, first=self.first, part=self.demand.position.part)

    def read(self, needed: Needed) -> None:
        """Reads the indexes of the fetched files that are `needed` and were not read.

        Raises `NotFoundError` where a file is not among the fetched ones, naming those that are, and what the readers
        of the files raise.
        """
        missing, part = needed - self.held, self.demand.position.part
        for rank in sorted(missing.models):
            names = [model_file(rank, partitioned=self.head.partitioned, part=part)]
            self.models[rank] = self._read(names, read_model_states)
        for rank in sorted(missing.optims):
            names = [naming.name(rank, part) for naming in optim_namings(bf16=self.first.bf16)]
            self.optims[rank] = self._read(names, read_optim_states)
        if missing.models:
            check_model_part(self.head, self.first)
        for name in sorted(missing.experts):
            self.experts[name] = self._read([name], lambda tree, file: (tree, file))
        if missing.experts:
            self.models[0] = with_experts(self.first, self.demand.experts, self.experts)
        if missing.layers:
            layers = [(layer, *self._read([layer.name], _layer)) for layer in self.demand.layers]
            self.models[0] = with_layers(self.first, layers)
            self.layers = missing.layers

    @property
    def held(self) -> Needed:
        """The files that were read so far."""
        return Needed(frozenset(self.models), frozenset(self.optims), frozenset(self.experts), self.layers)

    def _read(self, names: list[str], reader: Callable[..., Any]) -> Any:
        """What `reader` makes of the first of `names` that was fetched."""
        for name in names:
            index = self.source.index(name)
            if index is not None:
                return reader(index.tree, file=index.name)
        held = self.source.held
        among = "; ".join(
            f"{file.source}" + (f" ({', '.join(file.members[:8])})" if file.members else "") for file in held
        )
        raise NotFoundError(
            f"this rank needs {' or '.join(names)}, which is not in {among}", path=held[0].source
        )


def _layer(tree: Any, *, file: str) -> tuple[dict[str, Any], str]:
    return read_layer(tree, file=file), file


def _position(demand: Demand, first: ModelStates) -> Position:
    """This rank's part of the model and place in its data-parallel group; checks that they fit the saved layout."""
    position = demand.position
    if demand.outline:
        return replace(position, layout=first.layout)
    if demand.weights_only and position.layout.has_layers_of(first.layout):
        # The layer files hold all weights, and do not depend on how many stages there were.
        return replace(position, part=0)
    check_layout(first.layout, first.file, position.layout, engine=demand.in_parts)
    return position


def gather_files(files: Files, zero: ZeroFiles) -> None:
    """Fetches and reads all files that this rank restores from. Every rank must call.

    Where it is known which elements this rank keeps (``demand.in_parts``), only the files of the saved ranks that have
    them are fetched: in two steps, see `needs`. Else the files of all saved ranks are.
    """
    demand, first, position = zero.demand, zero.first, zero.demand.position
    if zero.with_optimizer:
        zero.source.locate_optimizer(bf16=first.bf16)
    needed = _expert_files(files, zero) | Needed(
        frozenset(), layers=frozenset(layer.name for layer in demand.layers)
    )
    partitioned, with_optimizer = first.partitioned, zero.with_optimizer
    if not demand.of_all_ranks:
        needed |= own_files(
            position.rank,
            position.world_size,
            first.world_size,
            partitioned=partitioned,
            with_optimizer=with_optimizer,
        )
    else:
        needed |= all_files(first.world_size, partitioned=partitioned, with_optimizer=with_optimizer)
    zero.fetch(needed, "fetch")
    rest = Needed(frozenset())
    with files.stage("read"):
        zero.read(needed)
        if with_optimizer and demand.in_parts:
            first, optim = zero.first, zero.optims[min(zero.optims)]
            layout = zero_checkpoint(first, optim)
            zero.laid_out = LaidOut(first, optim, layout)
            if demand.layers and not demand.rename:
                check_layers(zero.first, demand.trained)
            rest = files_of_runs(layout, wanted_runs(demand, layout, zero.first)) - zero.held
    if files.any("further files", bool(rest)):
        zero.fetch(rest, "fetch others")
        with files.stage("read others"):
            zero.read(rest)


def _expert_files(files: Files, zero: ZeroFiles) -> Needed:
    """The files of this rank's experts. Every rank must call.

    Raises `LayoutError`, on every rank, where the checkpoint's experts are others than this job's.
    """
    demand = zero.demand
    if demand.outline or not (zero.first.num_experts or demand.experts):
        return Needed(frozenset())
    with files.stage("experts"):
        check_experts(zero.first, demand.experts, weights_only=demand.weights_only)
    names = {name for layer in demand.experts for name in expert_files(layer)}
    if not zero.stage and not demand.weights_only:
        names.add(optimizer_file(demand.experts))
    return Needed(frozenset(), experts=frozenset(names))
