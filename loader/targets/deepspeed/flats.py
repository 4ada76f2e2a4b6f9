"""Reads from DeepSpeed's optimizers which parameter lies where in each tensor that they update on this rank.

One function for each kind of optimizer (`Kind` in ``live``), all with the same arguments and result. The attributes
and the order of a partition's parameters are those of DeepSpeed's sources: ``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``, ``runtime/bf16_optimizer.py`` and ``runtime/fp16/unfused_optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from ...errors import LayoutError
from ...saved.partitions import Slot, cut, padded_share, shares
from ...saved.regions import Run


@dataclass(frozen=True, eq=False)
class MasterFlat:
    """A tensor that the engine's optimizer updates on this rank, and what lies in it."""

    master: torch.Tensor
    """Contiguous, where it is a partition. The key of the optimizer's state."""
    param_group: int
    slots: tuple[tuple[str, Slot], ...]
    """(parameter's name, its slot in ``master``)."""


Built = tuple[list[MasterFlat], list[list[str]]]
"""This rank's flats, and the names in the optimizer's parameter groups, in the order that the optimizer was given."""


def zero_flats(optimizer: Any, name_of: dict[int, str], rank: int, world_size: int) -> Built:
    """Stages 1 and 2: a group's parameters in round-robin order, each with its padding, cut into equal partitions.

    `name_of` is by ``id`` of a parameter; `rank` and `world_size` are those of the data-parallel group. Raises
    `LayoutError` where the optimizer has a parameter that is not in the engine's module.
    """
    flats = []
    for group, members in enumerate(optimizer.round_robin_bit16_groups):
        paddings = getattr(optimizer, "round_robin_bit16_padding", None)
        place = _group_place(optimizer, group, rank, world_size)
        flats.append(
            _row_flat(
                optimizer.single_partition_of_fp32_groups[group], group, members, name_of, *place,
                paddings[group] if paddings else None,
            )
        )  # fmt: skip
    return flats, [[_parameter_name(name_of, p) for p in members] for members in optimizer.bit16_groups]


def bf16_flats(optimizer: Any, name_of: dict[int, str], rank: int, world_size: int) -> Built:
    """BF16_Optimizer: a group's parameters in order, cut into equal partitions. Arguments as `zero_flats`."""
    flats = [
        _row_flat(
            optimizer.fp32_groups_flat_partition[group], group, members, name_of,
            *_group_place(optimizer, group, rank, world_size), None,
        )
        for group, members in enumerate(optimizer.bf16_groups)
    ]  # fmt: skip
    return flats, [[_parameter_name(name_of, p) for p in members] for members in optimizer.bf16_groups]


def zero3_flats(optimizer: Any, name_of: dict[int, str], rank: int, world_size: int) -> Built:
    """Stage 3: one flat for each subgroup, of this rank's share of each of its parameters. Arguments as `zero_flats`.

    Raises `LayoutError` too where shares are not equal parts over all ranks of the group (MiCS).
    """
    flats = []
    groups: list[list[str]] = [[] for _ in optimizer.optimizer.param_groups]
    for index, members in enumerate(optimizer.fp16_groups):
        slots = []
        offset = 0
        for parameter in members:
            name = _parameter_name(name_of, parameter)
            share = parameter.partition_numel()
            slots += [
                (name, slot) for slot in shares(parameter.ds_numel, world_size, offset) if slot.rank == rank
            ]
            if share != padded_share(parameter.ds_numel, world_size):
                raise LayoutError(
                    f"{name} is partitioned into shares of {share} elements, expected {parameter.ds_numel} over "
                    f"{world_size} ranks (MiCS and other hierarchical partitions are not supported)"
                )
            offset += share
            groups[optimizer.sub_group_to_group_id[index]].append(name)
        group = optimizer.sub_group_to_group_id[index]
        flats.append(MasterFlat(optimizer.fp32_partitioned_groups_flat[index], group, tuple(slots)))
    return flats, groups


def unfused_flats(optimizer: Any, name_of: dict[int, str], rank: int, world_size: int) -> Built:
    """FP16_UnfusedOptimizer, stage 0: each parameter has a whole fp32 master. Arguments as `zero_flats`."""
    groups = [[_parameter_name(name_of, p) for p in members] for members in optimizer.fp16_groups]
    return _whole_flats(optimizer.fp32_groups, groups), groups


def plain_flats(optimizer: Any, name_of: dict[int, str], rank: int, world_size: int) -> Built:
    """Stage 0 in fp32: the parameters themselves are updated. Arguments as `zero_flats`."""
    members = [group["params"] for group in optimizer.param_groups]
    groups = [[_parameter_name(name_of, p) for p in group] for group in members]
    return _whole_flats(members, groups), groups


def _row_flat(
    master: torch.Tensor,
    group: int,
    members: Sequence[torch.Tensor],
    name_of: dict[int, str],
    rank: int,
    world_size: int,
    paddings: Sequence[int] | None,
) -> MasterFlat:
    """This rank's partition of a group that is cut into equal ones; `paddings` are elements after each parameter."""
    slots = []
    offset = 0
    for position, parameter in enumerate(members):
        for slot in cut(offset, parameter.numel(), master.numel(), world_size):
            if slot.rank == rank:
                slots.append((_parameter_name(name_of, parameter), slot))
        offset += parameter.numel() + (paddings[position] if paddings is not None else 0)
    return MasterFlat(master, group, tuple(slots))


def _group_place(optimizer: Any, group: int, rank: int, world_size: int) -> tuple[int, int]:
    """This rank among those that a parameter group is cut over, and how many they are: all ranks of the data-parallel
    group or, for a group of experts, those that have the same experts."""
    processes = getattr(optimizer, "real_dp_process_group", None)
    if not processes or not torch.distributed.is_initialized():
        return rank, world_size
    return torch.distributed.get_rank(processes[group]), torch.distributed.get_world_size(processes[group])


def _whole_flats(
    masters: Sequence[Sequence[torch.Tensor]], groups: Sequence[Sequence[str]]
) -> list[MasterFlat]:
    flats: list[MasterFlat] = []
    for index, (tensors, names) in enumerate(zip(masters, groups, strict=True)):
        for tensor, name in zip(tensors, names, strict=True):
            flats.append(MasterFlat(tensor, index, ((name, Slot(0, 0, Run(0, tensor.numel()))),)))
    return flats


def _parameter_name(name_of: dict[int, str], parameter: torch.Tensor) -> str:
    found = name_of.get(id(parameter))
    if found is None:
        raise LayoutError(
            f"the engine's optimizer holds a parameter of shape {tuple(parameter.shape)} that is not in its module"
        )
    return found
