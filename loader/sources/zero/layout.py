"""Computes where each parameter of a DeepSpeed ZeRO checkpoint lies, padding included: on which saved rank, in which
flat tensor, from which element on. Pure.

One rank's files are enough: ``param_shapes`` gives the order of the parameters, and DeepSpeed's rules of padding give
the rest (``param_slice_mappings`` is not used: it is wrong with ``round_robin_gradients``). N ranks saved:

* Stages 1, 2: a group is its parameters one after the other, each followed by its alignment padding (which only an
  optimizer file holds). The group is padded to a multiple of 2 * N and cut into N equal partitions (`partitions.cut`).
  A group of experts is cut over fewer ranks: those that had the same experts (`experts`).
* Stage 3: each parameter is cut by itself into N shares of ceil(numel / N), the last ones padded (`partitions.shares`).
  A rank's flat tensor is its shares of a subgroup's parameters, one after the other.
* Stage 0: each parameter has a tensor of its own, in the optimizer's order; only the job's optimizer has their names.

The rules are those of ``flatten_dense_tensors_aligned`` with ``nccl_start_alignment_factor`` = 2
(``runtime/zero/stage_1_and_2.py``, ``runtime/bf16_optimizer.py``) and of ``_aligned_size``
(``runtime/zero/partition_parameters.py``). `_check_tensors` compares them with the sizes in the files.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...errors import CorruptError, LayoutError
from ...plurals import counted
from ...saved.demand import Shape
from ...saved.partitions import Slot, cut, padded_partition, padded_share, shares
from ...saved.regions import CoverageError, Run
from ...saved.tensor import same_shape
from .experts import group_ranks
from .model_states import ModelStates
from .optim_states import MASTER, OptimStates

FROZEN_GROUP = -1
"""`SavedParameter.group` of a parameter that no optimizer owns."""


class SavedParameter(NamedTuple):
    """A parameter as the checkpoint has it."""

    name: str
    shape: Shape
    group: int
    """Index of the flat tensor: the group, the subgroup at stage 3, the position at stage 0; or `FROZEN_GROUP`."""
    offset: int
    """Of its first element, in elements: in the whole group (stages 1, 2), in each rank's flat tensor (stage 3)."""

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
    """0 to 3. Without an optimizer file, 1 or 2 as the saved configuration says, else 1."""
    world_size: int
    """Data-parallel ranks that saved: N."""
    parameters: dict[str, SavedParameter]
    """By name, frozen ones included where their place is known; without aliases."""
    aliases: dict[str, str]
    """Names of tied parameters to the name that is in `parameters`."""
    partition_numel: tuple[int, ...]
    """Elements of each flat tensor on each rank, padding included; () where no optimizer file was read."""
    group_of: dict[int, int]
    """Flat tensor's index to its parameter group's."""
    kinds: tuple[str, ...]
    """``fp32`` and the keys of the optimizer's element-wise state; () where no optimizer file was read."""
    group_ranks: tuple[tuple[int, ...], ...] = ()
    """Stages 1, 2 with experts: the saved ranks that each group is cut over, in order; (): all of them are."""

    @property
    def partitioned(self) -> bool:
        """Whether the model files have no parameters (stage 3)."""
        return self.stage == 3

    def find(self, name: str) -> SavedParameter | None:
        """The parameter called `name`, or that `name` is an alias of."""
        return self.parameters.get(self.aliases.get(name, name))

    def pieces(self, name: str, ranks: Collection[int] | None = None) -> list[Slot]:
        """Where the parameter's elements lie, in their order: on which saved rank, and from which element on there.

        The same for every kind; the flat tensor is the one that `SavedParameter.group` says. With `ranks`, only what
        these have. A frozen parameter of stage 3 lies in each rank's fragment of it. Raises `KeyError` for a name that
        is not known, or that the model file has whole, and `CoverageError` where the parameter reaches beyond its
        group.
        """
        found = self._in_partitions(name)
        if self.stage == 0:
            slots = [Slot(0, 0, Run(0, found.numel))] if found.numel else []
        elif self.partitioned:
            return shares(
                found.numel, self.world_size, found.offset, None if ranks is None else sorted(ranks)
            )
        else:
            over = self.ranks_of(found)
            slots = cut(found.offset, found.numel, self.partition_numel[found.group], len(over), over)
        return slots if ranks is None else [slot for slot in slots if slot.rank in ranks]

    def holders(self, name: str, run: Run) -> Sequence[int]:
        """The saved ranks that have elements of the `run` of a parameter, in the elements' order; none is looked up.

        Raises as `pieces`, and `CoverageError` where the run is not inside the parameter.
        """
        found = self._in_partitions(name)
        if run.stop > found.numel:
            raise CoverageError(
                f"element {found.numel} of the parameter is wanted and lies in no saved piece"
            )
        if not run.length:
            return ()
        if self.stage == 0:
            return (0,)
        if self.partitioned:
            over: Sequence[int] = range(self.world_size)
            first, size = run.start, padded_share(found.numel, self.world_size)
        else:
            over = self.ranks_of(found)
            first, size = found.offset + run.start, self.partition_numel[found.group]
        last = first + run.length - 1
        if last >= size * len(over):
            raise CoverageError(f"element {run.stop - 1} of the parameter lies beyond its group's partitions")
        return over[first // size : last // size + 1]

    def _in_partitions(self, name: str) -> SavedParameter:
        found = self.find(name)
        if found is None or (found.frozen and not self.partitioned):
            raise KeyError(name)
        return found

    def ranks_of(self, parameter: SavedParameter) -> Sequence[int]:
        """Stages 1, 2: the saved ranks that its group is cut over, in order."""
        return self.group_ranks[parameter.group] if self.group_ranks else range(self.world_size)


def zero_checkpoint(model: ModelStates, optim: OptimStates | None) -> ZeroCheckpoint:
    """The layout, from a model file and an optimizer file of the same rank; any rank's give the same.

    `optim` None: the load needs no optimizer file (weights only, stages 0 to 2). At stage 0 it is what
    `read_whole_optimizer` returns; the result then has frozen parameters only, until `named_by_optimizer` adds the
    others.

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
        parameters, numels = _offsets_in_shares(model.param_shapes, model.world_size)
        stage = 3
    else:
        paddings = optim.alignment_paddings if optim else None
        if optim is not None:
            ranks = group_ranks(model, optim)
            _check_paddings(optim, model.param_shapes)
        parameters, numels = _offsets_in_groups(model, paddings, ranks)
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


def check_shares(model: ModelStates, optim: OptimStates, numels: Sequence[int]) -> None:
    """Raises, as `zero_checkpoint`, where an optimizer file of stage 3 does not fit `model`, whose flat tensors have
    `numels` elements each."""
    _check_agreement(model, optim)
    _check_tensors(optim, numels)


def _check_agreement(model: ModelStates, optim: OptimStates | None) -> None:
    """Raises where the two files are not of the same stage, groups or number of ranks."""
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
                f"{optim.file}: param_alignment_paddings/{index} has {counted(len(paddings), 'entry', 'entries')} for "
                f"{counted(len(groups[index]), 'parameter')}",
                path=optim.file,
            )


def _offsets_in_groups(
    model: ModelStates, paddings: Sequence[Sequence[int]] | None, ranks: Sequence[Sequence[int]]
) -> tuple[dict[str, SavedParameter], list[int]]:
    """Stages 1 and 2: each parameter's offset in its group, and the elements of each group's partitions."""
    parameters: dict[str, SavedParameter] = {}
    numels = []
    for group, shapes in enumerate(model.param_shapes or ()):
        offset = 0
        for position, (name, shape) in enumerate(shapes.items()):
            parameters[name] = SavedParameter(name, shape, group, offset)
            offset += math.prod(shape) + (paddings[group][position] if paddings is not None else 0)
        count = len(ranks[group]) if ranks else model.world_size
        numels.append(padded_partition(offset, count))
    return parameters, numels


def _offsets_in_shares(
    groups: Sequence[Mapping[str, Shape]], world_size: int
) -> tuple[dict[str, SavedParameter], list[int]]:
    """Stage 3: each parameter's offset in every rank's flat tensor, and the elements of the flat tensors."""
    parameters: dict[str, SavedParameter] = {}
    numels = []
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            parameters[name] = SavedParameter(name, shape, group, offset)
            offset += padded_share(math.prod(shape), world_size)
        numels.append(offset)
    return parameters, numels


def _check_tensors(optim: OptimStates, numels: Sequence[int]) -> None:
    """Raises `CorruptError` unless every flat tensor has the size that the rules give, or that less its padding."""
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


def named_by_optimizer(
    checkpoint: ZeroCheckpoint,
    optim: OptimStates,
    groups: Sequence[Sequence[tuple[str, Shape]]],
) -> ZeroCheckpoint:
    """`checkpoint`, of stage 0, with the parameters that `optim` holds, named by the job's optimizer.

    `groups` are the job's parameter groups, as (name, shape). They are matched by position. Raises `LayoutError` where
    a group's size or a tensor's shape differs.
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
            if index in tensors and not same_shape(tensors[index].shape, shape):
                raise LayoutError(
                    f"{optim.file}: {kind} of the optimizer's parameter {position} has shape "
                    f"{tensors[index].shape}, but {name}, which is at this position here, has {shape}. Stage 0 does "
                    "not keep names: give the optimizer its parameters in the order of the job that saved",
                    path=optim.file,
                )
        parameters[name] = SavedParameter(name, shape, index, 0)
    return replace(checkpoint, parameters=parameters)
