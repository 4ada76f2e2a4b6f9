"""Opens the files of a ZeRO checkpoint that this rank needs, from a folder or from archives, and joins their contents.

In order: `ZeroFiles.open` (the first model file), `gather_files` (all the others), `zero_parts` (contents and layout).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...checkpoint import Opening
from ...errors import NotFoundError
from ...formats.torch_file import FileIndex
from ...saved.contents import Contents
from ...stores.locate import MODEL_STATES
from ...targets.deepspeed.engine import engine_classes, engine_target, is_deepspeed_engine, name_parameters
from ...targets.deepspeed.parallel import engine_position, expert_layers, layer_files
from ...targets.deepspeed.target import wanted_slots
from ...targets.state import optimizer_classes, scheduler_classes
from ..single_file import rng_list
from .contents import ZeroContents, zero_contents, zero_tree
from .experts import check_experts, optimizer_file, with_experts
from .file_names import Needed, model_file, optim_namings
from .files import ZeroSource
from .layers import LayerFile, check_layers, read_layer, with_layers
from .layout import zero_checkpoint
from .model_parallel import Position, check_layout, check_model_part
from .model_states import ExpertLayer, ModelStates, read_model_states
from .needs import all_files, files_of_slots, own_files
from .optim_states import OptimStates, read_optim_states


@dataclass
class ZeroFiles:
    """The files of a checkpoint that this rank has read, by saved rank.

    Of a model that is split, they are those of this rank's part; `head` may be of another part.
    """

    name: str
    """What messages call the checkpoint."""
    source: ZeroSource
    position: Position
    """This rank's in the job."""
    head: ModelStates
    """The model file that was read first, with how the model was split."""
    models: dict[int, ModelStates] = field(default_factory=dict)
    optims: dict[int, OptimStates] = field(default_factory=dict)
    indexes: list[FileIndex] = field(default_factory=list)
    expert_layers: tuple[ExpertLayer, ...] = ()
    """This job's MoE layers; once their files are read, model file 0 has this rank's experts."""
    experts: dict[str, tuple[Any, str]] = field(default_factory=dict)
    """Experts' files that were read: name to (tree, what messages call it)."""
    layers: tuple[LayerFile, ...] = ()
    """The layer files of this rank's pipeline stage."""

    @classmethod
    def open(cls, source: ZeroSource, *, name: str, opening: Opening) -> ZeroFiles:
        """Reads the first model file, which `source` has fetched.

        Raises `NotFoundError` where there is none, `LayoutError` where the model was split in another way than this
        job's.
        """
        for candidate in MODEL_STATES:
            found = source.find(candidate)
            if found is not None:
                index = source.index(*found)
                first = read_model_states(index.tree, file=found[1])
                position = _position(opening, first)
                if position.part:
                    return cls(name, source, position, first, {}, {}, [replace(index, storages=())])
                return cls(name, source, position, first, {0: first}, {}, [index])
        raise NotFoundError(f"{name} has no {' or '.join(MODEL_STATES)}", path=name)

    @property
    def first(self) -> ModelStates:
        """The model file of saved rank 0 of this rank's part; `head` until it is read."""
        return self.models.get(0, self.head)

    @property
    def world_size(self) -> int:
        """Data-parallel ranks that saved."""
        return self.first.world_size

    @property
    def ranks(self) -> int:
        """All ranks that saved."""
        return self.world_size * self.first.layout.parts

    @property
    def stage(self) -> int:
        """3, 0, or 1 for both 1 and 2, whose files need no distinction here."""
        if self.first.partitioned:
            return 3
        return 0 if self.first.param_shapes is None else 1

    def has_optimizer_files(self, *, weights_only: bool) -> bool:
        """Whether this load needs files of the optimizer."""
        return self.stage == 3 or (self.stage > 0 and not weights_only)

    def fetch(self, needed: Needed, stage: str) -> None:
        """Fetches what is `needed` and was not read, and this pipeline stage's layer files. Every rank must call."""
        self.source.fetch(
            needed - self.held,
            stage,
            saved_world_size=self.world_size,
            partitioned=self.first.partitioned,
            part=self.position.part,
            layers=[layer.name for layer in self.layers],
        )

    def read(self, needed: Needed) -> None:
        """Reads the indexes of the fetched files that are `needed` and were not read, and of the layer files.

        Raises `NotFoundError` where a file is not among the fetched ones, naming those that are, and what the readers
        of the files raise.
        """
        missing = needed - self.held
        for rank in sorted(missing.models):
            names = [model_file(rank, partitioned=self.head.partitioned, part=self.position.part)]
            self.models[rank] = self._read(names, read_model_states)
        for rank in sorted(missing.optims):
            names = [naming.name(rank, self.position.part) for naming in optim_namings(bf16=self.first.bf16)]
            self.optims[rank] = self._read(names, read_optim_states)
        if missing.models:
            check_model_part(self.head, self.first)
        for name in sorted(missing.experts):
            self.experts[name] = self._read([name], lambda tree, file: (tree, file))
        if missing.experts:
            self.models[0] = with_experts(self.first, self.expert_layers, self.experts)
        if self.layers and not self.first.module:
            layers = [(layer, *self._read([layer.name], _layer)) for layer in self.layers]
            self.models[0] = with_layers(self.first, layers)

    @property
    def held(self) -> Needed:
        """The files that were read so far."""
        return Needed(frozenset(self.models), frozenset(self.optims), frozenset(self.experts))

    def _read(self, names: list[str], reader: Callable[..., Any]) -> Any:
        """What `reader` makes of the first of `names` that was fetched."""
        for name in names:
            found = self.source.find(name)
            if found is not None:
                index = self.source.index(*found)
                self.indexes.append(index)
                return reader(index.tree, file=found[1])
        files = self.source.files
        among = "; ".join(
            f"{file.source}" + (f" ({', '.join(file.members[:8])})" if file.members else "") for file in files
        )
        raise NotFoundError(
            f"this rank needs {' or '.join(names)}, which is not in {among}", path=files[0].source
        )


def _layer(tree: Any, *, file: str) -> tuple[dict[str, Any], str]:
    return read_layer(tree, file=file), file


def _position(opening: Opening, first: ModelStates) -> Position:
    """This rank's part of the model and place in its data-parallel group; checks that they fit the saved layout."""
    model, topology = getattr(opening.request.state, "model", None), opening.session.topology
    live = is_deepspeed_engine(model)
    position = engine_position(model) if live else Position(topology.rank, topology.world_size)
    if opening.request.weights_only and position.layout.has_layers_of(first.layout):
        # The layer files hold all weights, and do not depend on how many stages there were.
        return replace(position, part=0)
    check_layout(first.layout, first.file, position.layout, engine=live)
    return position


def gather_files(opening: Opening, zero: ZeroFiles) -> None:
    """Fetches and reads all files that this rank restores from. Every rank must call.

    Which elements a DeepSpeed engine holds on this rank is known, so that only the files of the saved ranks that have
    them are fetched: in two steps, see `needs`. For any other target the files of all saved ranks are.
    """
    request, position, stages = opening.request, zero.position, opening.stages
    with_optimizer = zero.has_optimizer_files(weights_only=request.weights_only)
    partitioned, saved = zero.first.partitioned, zero.world_size
    if with_optimizer:
        zero.source.locate_optimizer(bf16=zero.first.bf16)
    engine = getattr(request.state, "model", None)
    experts = _expert_files(opening, zero)
    if position.layout.pipeline:
        zero.layers = layer_files(request.state.model.module)
    if is_deepspeed_engine(engine):
        needed = own_files(
            position.rank,
            position.world_size,
            saved,
            partitioned=partitioned,
            with_optimizer=with_optimizer,
        )
    else:
        needed = all_files(saved, partitioned=partitioned, with_optimizer=with_optimizer)
    needed |= experts
    zero.fetch(needed, "fetch")
    rest = Needed(frozenset(), frozenset())
    with stages.stage("read"):
        zero.read(needed)
        if with_optimizer and is_deepspeed_engine(engine):
            layout = zero_checkpoint(zero.first, zero.optims[min(zero.optims)])
            target = engine_target(engine)
            if position.layout.pipeline and not request.options.rename:
                check_layers(zero.first, target.owned)
            slots = wanted_slots(target, layout, zero.first, request.options.rename)
            rest = files_of_slots(layout, slots) - zero.held
    if opening.session.channel.decide("further files", bool(rest), any):
        zero.fetch(rest, "fetch others")
        with stages.stage("read others"):
            zero.read(rest)


def _expert_files(opening: Opening, zero: ZeroFiles) -> Needed:
    """The files of this rank's experts. Every rank must call.

    Raises `LayoutError`, on every rank, where the checkpoint's experts are others than this job's.
    """
    engine = getattr(opening.request.state, "model", None)
    live = is_deepspeed_engine(engine)
    if not zero.first.num_experts and not (live and getattr(engine, "has_moe_layers", False)):
        return Needed(frozenset())
    with opening.stages.stage("experts"):
        zero.expert_layers = expert_layers(engine) if live else ()
        check_experts(zero.first, zero.expert_layers, weights_only=opening.request.weights_only)
    names = {name for layer in zero.expert_layers for name in layer.files}
    if not zero.stage and not opening.request.weights_only:
        names.add(optimizer_file(zero.expert_layers))
    return Needed(frozenset(), frozenset(), frozenset(names))


def zero_parts(opening: Opening, zero: ZeroFiles) -> tuple[Contents, ZeroContents]:
    """The parts under Composer's names, and the joined files with their layout, for the target.

    Raises `LayoutError` or `CorruptError` where the files that were read were not saved together.
    """
    request, rank = opening.request, zero.position.rank
    whole = zero_contents(zero.models, zero.optims, weights_only=request.weights_only)
    model = getattr(request.state, "model", None)
    if is_deepspeed_engine(model):
        whole = name_parameters(model, whole)
        optimizer_class, scheduler_class = engine_classes(model)
    else:
        optimizer_class = next(iter(optimizer_classes(request.state)), "Optimizer")
        scheduler_class = next(iter(scheduler_classes(request.state)), "Scheduler")
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
    return Contents("deepspeed", own, rng, tree), whole
