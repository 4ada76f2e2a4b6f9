"""Where each parameter of a DeepSpeed ZeRO checkpoint lies: on which saved rank, in which flat tensor, from where on.

Everything is told by one rank's files: ``param_shapes`` gives the order, and the padding rules the rest
(``param_slice_mappings`` is wrong with ``round_robin_gradients`` and is not used). All of it is plain numbers. Pure.

* Stages 1, 2: a group is its parameters one after the other, each followed by its alignment padding, then padded to
  a multiple of 2 * N and cut into N equal partitions. A group of experts is cut over fewer ranks than the N that
  saved: those that had the same experts (`zero_experts`).
* Stage 3: each parameter is cut by itself into N shares of ceil(numel / N), the last ones padded; a rank's flat
  tensor is its shares of a subgroup's parameters, one after the other.
* Stage 0: each parameter has a tensor of its own, in the optimizer's order, which only the job's optimizer can name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...errors import CorruptError, LayoutError
from ...saved.intervals import CoverageError, Piece, Place, cut
from .experts import group_ranks
from .model_states import ModelStates, Shape
from .optim_states import MASTER, OptimStates

FROZEN_GROUP = -1
"""`SavedParameter.group` of what no optimizer owns."""


@dataclass(frozen=True)
class SavedParameter:
    """A parameter as the checkpoint has it."""

    name: str
    shape: Shape
    group: int
    """Index of the flat tensor: the group, the subgroup at stage 3, the position at stage 0; or `FROZEN_GROUP`."""
    offset: int
    """Of its first element: in the whole group (stages 1, 2), in each rank's flat tensor (stage 3)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def frozen(self) -> bool:
        return self.group == FROZEN_GROUP


@dataclass(frozen=True)
class ZeroCheckpoint:
    """The layout of one checkpoint, the same for whichever rank's files it was read from."""

    stage: int
    """0 to 3. Without an optimizer file, stages 1 and 2 are told apart by the saved configuration only."""
    world_size: int
    """Data-parallel ranks that saved: N."""
    parameters: dict[str, SavedParameter]
    """By name, frozen ones included where their place is known; without aliases."""
    aliases: dict[str, str]
    """Names of tied parameters to the name that is in `parameters`."""
    partition_numel: tuple[int, ...]
    """Elements of each flat tensor on each rank, paddings included; () where no optimizer file was read."""
    group_of: dict[int, int]
    """Flat tensor's index to its parameter group's."""
    kinds: tuple[str, ...]
    """``fp32`` and the optimizer's state that lies element by element; () where no optimizer file was read."""
    group_ranks: tuple[tuple[int, ...], ...] = ()
    """Stages 1, 2 with experts: the saved ranks that each group is cut over, in order; (): all of them are."""

    @property
    def partitioned(self) -> bool:
        """Whether the model files have no parameters (stage 3)."""
        return self.stage == 3

    def find(self, name: str) -> SavedParameter | None:
        """The parameter called `name`, or that `name` is an alias of."""
        return self.parameters.get(self.aliases.get(name, name))

    def pieces(self, name: str) -> list[Piece]:
        """Where the parameter's elements lie: on which saved rank, in which flat tensor, from which element on.

        The same for every kind. Frozen ones of stage 3: in that rank's fragment, ``place.group`` `FROZEN_GROUP`.
        Raises `KeyError` for a name that is not known, or is whole in the model file.
        """
        found = self.find(name)
        if found is None or (found.frozen and not self.partitioned):
            raise KeyError(name)
        if self.stage == 0:
            return [Piece(Place(0, found.group), 0, 0, found.numel)] if found.numel else []
        if self.partitioned:
            return share_pieces(found.numel, self.world_size, found.group, found.offset)
        ranks = self.group_ranks[found.group] if self.group_ranks else range(self.world_size)
        numel = self.partition_numel[found.group]
        return cut(found.offset, found.numel, numel, len(ranks), found.group, ranks)


def share_pieces(numel: int, world_size: int, group: int, offset: int) -> list[Piece]:
    """Stage 3: rank r has elements [r * p, (r + 1) * p) of a parameter, p = ceil(numel / N), at `offset`."""
    share = -(-numel // world_size)
    return [
        Piece(Place(rank, group), offset, rank * share, min(share, numel - rank * share))
        for rank in range(-(-numel // share) if share else 0)
    ]


def zero_checkpoint(model: ModelStates, optim: OptimStates | None) -> ZeroCheckpoint:
    """The layout that a model file and an optimizer file of the same rank tell; any rank's do.

    `optim` None: nobody needs the optimizer's files (weights only, stages 0 to 2). At stage 0 it is what
    `read_whole_optimizer` gives; the result then has no parameters until `named_by_optimizer` gave them names.

    Raises `LayoutError` or `CorruptError`, naming the file, where the two do not fit each other or the rules.
    """
    frozen = {
        name: SavedParameter(name, shape, FROZEN_GROUP, 0) for name, shape in model.frozen_shapes.items()
    }
    if model.param_shapes is None:
        return ZeroCheckpoint(
            0, model.world_size, frozen, dict(model.shared), (),
            dict(optim.group_of) if optim else {}, tuple(optim.tensors) if optim else (),
        )  # fmt: skip
    _check_agreement(model, optim)
    ranks: tuple[tuple[int, ...], ...] = ()
    if model.partitioned:
        parameters, numels = _shares(model.param_shapes, model.world_size)
        stage = 3
    else:
        paddings = optim.alignment_paddings if optim else None
        if optim is not None:
            ranks = group_ranks(model, optim)
            _check_paddings(optim, model.param_shapes)
        parameters, numels = _rows(model, paddings, ranks)
        configured = model.configured_stage
        stage = optim.stage if optim else configured if configured in (1, 2) else 1
    if optim is not None:
        _check_tensors(optim, numels)
    known = set(parameters) | set(frozen)
    aliases = {alias: owner for alias, owner in model.shared.items() if owner in known and alias not in known}
    return ZeroCheckpoint(
        stage,
        model.world_size,
        {**parameters, **frozen},
        aliases,
        tuple(numels) if optim else (),
        dict(optim.group_of) if optim else {},
        tuple(optim.tensors) if optim else (),
        ranks,
    )


def named_by_optimizer(
    checkpoint: ZeroCheckpoint,
    optim: OptimStates,
    groups: Sequence[Sequence[tuple[str, Shape]]],
) -> ZeroCheckpoint:
    """A stage 0 checkpoint whose parameters are named by the job's optimizer: `groups` of (name, shape).

    They are matched by position; every group's size and every tensor's shape must agree. Raises `LayoutError`.
    """
    expected = [len(group) for group in groups]
    got = [0] * (max(optim.group_of.values(), default=-1) + 1)
    for group in optim.group_of.values():
        got[group] += 1
    if expected != got:
        raise LayoutError(
            f"{optim.file}: its optimizer has parameter groups of {got} parameters, this job's of {expected}. Stage "
            "0 does not keep their names, so they can only be matched by position",
            path=optim.file,
        )
    parameters = dict(checkpoint.parameters)
    flat = [entry for group in groups for entry in group]
    # Positions count through the groups, whatever numbers the file's ``params`` lists hold.
    order = sorted(optim.group_of, key=lambda index: (optim.group_of[index], index))
    for position, (index, (name, shape)) in enumerate(zip(order, flat, strict=True)):
        for kind, tensors in optim.tensors.items():
            if index in tensors and tensors[index].shape != shape:
                raise LayoutError(
                    f"{optim.file}: {kind} of the optimizer's parameter {position} has shape "
                    f"{tensors[index].shape}, but {name}, which is at this position here, has {shape}. Stage 0 does "
                    "not keep names: give the optimizer its parameters in the order of the job that saved",
                    path=optim.file,
                )
        parameters[name] = SavedParameter(name, shape, index, 0)
    return replace(checkpoint, parameters=parameters)


def _rows(
    model: ModelStates, paddings: Sequence[Sequence[int]] | None, ranks: Sequence[Sequence[int]]
) -> tuple[dict[str, SavedParameter], list[int]]:
    """Stages 1 and 2: each parameter's offset in its group, and the partitions' sizes."""
    parameters: dict[str, SavedParameter] = {}
    numels = []
    for group, shapes in enumerate(model.param_shapes or ()):
        offset = 0
        for position, (name, shape) in enumerate(shapes.items()):
            parameters[name] = SavedParameter(name, shape, group, offset)
            offset += math.prod(shape) + (paddings[group][position] if paddings is not None else 0)
        count = len(ranks[group]) if ranks else model.world_size
        numels.append(2 * -(-offset // (2 * count)))
    return parameters, numels


def _shares(
    groups: Sequence[Mapping[str, Shape]], world_size: int
) -> tuple[dict[str, SavedParameter], list[int]]:
    """Stage 3: each parameter's offset in every rank's flat tensor, and the flat tensors' sizes."""
    parameters: dict[str, SavedParameter] = {}
    numels = []
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            parameters[name] = SavedParameter(name, shape, group, offset)
            offset += -(-math.prod(shape) // world_size)
        numels.append(offset)
    return parameters, numels


def _check_agreement(model: ModelStates, optim: OptimStates | None) -> None:
    if optim is None:
        return
    groups = model.param_shapes or ()
    if (optim.writer == "zero3") != model.partitioned:
        raise CorruptError(
            f"{optim.file} is of ZeRO stage {optim.stage}, but {model.file} is of "
            f"{'stage 3' if model.partitioned else 'another stage than 3'}; they are not of one checkpoint",
            path=optim.file,
        )
    if len(optim.tensors[MASTER]) != len(groups):
        raise CorruptError(
            f"{optim.file} has {len(optim.tensors[MASTER])} fp32 partitions, but {model.file} tells the parameters "
            f"of {len(groups)}; they are not of one checkpoint",
            path=optim.file,
        )
    if optim.ranks is not None and optim.ranks != model.world_size:
        raise LayoutError(
            f"{optim.file} is partitioned over {optim.ranks} ranks, and {model.world_size} saved it (MiCS or another "
            "hierarchical layout), which is not supported",
            path=optim.file,
        )


def _check_paddings(optim: OptimStates, groups: Sequence[Mapping[str, Shape]]) -> None:
    for index, paddings in enumerate(optim.alignment_paddings or ()):
        if len(paddings) != len(groups[index]):
            raise CorruptError(
                f"{optim.file}: param_alignment_paddings/{index} has {len(paddings)} entries for "
                f"{len(groups[index])} parameters",
                path=optim.file,
            )


def _check_tensors(optim: OptimStates, numels: Sequence[int]) -> None:
    """Every flat tensor has the size that the rules give, or that less this rank's padding."""
    for index, expected in enumerate(numels):
        padding = optim.group_paddings[index] if optim.group_paddings else 0
        trimmed = {expected - padding, expected}
        for kind, tensors in optim.tensors.items():
            if index not in tensors:
                continue
            got = tensors[index].numel
            if got not in trimmed or len(tensors[index].shape) != 1:
                raise CorruptError(
                    f"{optim.file}: {kind} of flat tensor {index} has shape {tensors[index].shape}, expected "
                    f"({expected},)" + (f" or ({expected - padding},)" if padding else ""),
                    path=optim.file,
                )


def check_pieces(checkpoint: ZeroCheckpoint, optim: OptimStates, rank: int) -> None:
    """Checks that saved rank `rank`'s tensors hold every element that the layout places in them.

    Raises `CorruptError` naming file, kind and parameter.
    """
    for name, parameter in checkpoint.parameters.items():
        if parameter.frozen:
            continue
        try:
            pieces = checkpoint.pieces(name)
        except CoverageError as error:
            raise CorruptError(f"{optim.file}: {name}: {error}", path=optim.file) from error
        for piece in pieces:
            if piece.place.rank != rank:
                continue
            for kind, tensors in optim.tensors.items():
                tensor = tensors.get(piece.place.group)
                if tensor is not None and tensor.numel < piece.start + piece.length:
                    raise CorruptError(
                        f"{optim.file}: {kind} of flat tensor {piece.place.group} has {tensor.numel} elements, but "
                        f"{name} reaches to {piece.start + piece.length}",
                        path=optim.file,
                    )
