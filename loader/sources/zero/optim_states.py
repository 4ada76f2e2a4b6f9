"""Reads a DeepSpeed ``optim_states`` file, or stage 0's optimizer: checks the entries, and gives them as `OptimStates`.
Pure.

The entries are those of the optimizers' ``state_dict`` in DeepSpeed (``runtime/zero/stage_1_and_2.py``,
``runtime/zero/stage3.py``, ``runtime/bf16_optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import FormatError, LayoutError
from ...saved.tensor import SavedTensor
from ...saved.values import InertObject, kind_of
from .fields import Field, a_count, a_mapping, a_sequence, a_tensor, enum_value

Writer = Literal["zero", "zero3", "bf16", "whole"]
"""Which of DeepSpeed's optimizers wrote it: that of stages 1 and 2, of stage 3, BF16_Optimizer, one of stage 0."""

MASTER = "fp32"
"""The kind of the fp32 master weights; the other kinds are the optimizer's own state keys."""

_GLOBALS = (
    "loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad", "cur_scale", "cur_iter", "last_overflow_iter",
    "scale_factor", "scale_window",
)  # fmt: skip
"""Keys that become `OptimStates.globals`."""


@dataclass(frozen=True)
class OptimStates:
    """The entries of one rank's optimizer file; none of its tensors was read.

    A flat tensor is a partition of a parameter group, or of a subgroup at stage 3; at stage 0 a parameter's own tensor.
    """

    file: str
    writer: Writer
    stage: int
    """1 for BF16_Optimizer, which saves none."""
    tensors: dict[str, dict[int, SavedTensor]]
    """Kind to flat tensor's index to tensor: the masters, and element-wise state."""
    scalars: dict[int, dict[str, Any]]
    """Flat tensor's index to its other state, such as ``step``: numbers, None, or tensors of one element."""
    groups: tuple[dict[str, Any], ...] | None
    """Hyperparameters of each parameter group, without ``params``; None where the file has none."""
    group_of: dict[int, int]
    """Flat tensor's index to its parameter group's."""
    partition_count: tuple[int, ...] | None
    """Stages 1, 2: ranks that each group is cut over; None where the file does not record it."""
    ranks: int | None
    """Ranks that all groups are cut over, where the file has one number for all."""
    group_paddings: tuple[int, ...] | None
    """Elements of this rank's partition that belong to no parameter, per group."""
    alignment_paddings: tuple[tuple[int, ...], ...] | None
    """Elements of padding after each parameter, per group."""
    globals: dict[str, Any] = field(default_factory=dict)
    """``loss_scaler``, ``dynamic_loss_scale``, ``overflow``, ``clip_grad``, and stage 0's scale numbers."""


def read_optim_states(tree: Any, *, file: str) -> OptimStates:
    """The entries of an optimizer file, given the `tree` of its pickle; `file` is what messages call it.

    Raises `FormatError` where it is no optimizer file of ZeRO's, `LayoutError` for state that is not element-wise,
    `CorruptError` where entries have impossible types or values, or contradict each other.
    """
    outer = tree.get("optimizer_state_dict") if isinstance(tree, Mapping) else None
    if not isinstance(outer, Mapping):
        raise FormatError(
            f"{file}: expected a DeepSpeed optim_states file with 'optimizer_state_dict'", path=file
        )
    top = Field(file).at("optimizer_state_dict")
    if "fp32_flat_groups" in outer:
        return _stage_3(outer, top)
    if "single_partition_of_fp32_groups" in outer and "base_optimizer_state" in outer:
        return _stages_1_and_2(outer, top)
    keys = ", ".join(repr(key) for key in list(outer)[:12])
    raise FormatError(f"{file}: an optimizer format that is not known; it holds {keys}", path=file)


def _stages_1_and_2(outer: Mapping[Any, Any], top: Field) -> OptimStates:
    bf16 = "zero_stage" not in outer
    masters = _flat_tensors(
        outer["single_partition_of_fp32_groups"], top.at("single_partition_of_fp32_groups")
    )
    base = outer["base_optimizer_state"]
    place = top.at("base_optimizer_state")
    groups: tuple[dict[str, Any], ...] | None = None
    if isinstance(base, Mapping):
        states = a_mapping(base.get("state"), place.at("state"))
        groups, group_of = _groups(base.get("param_groups"), place.at("param_groups"))
        if sorted(group_of) != list(range(len(masters))) or any(k != v for k, v in group_of.items()):
            raise place.at("param_groups").wrong(f"one flat parameter in each of {len(masters)} groups", base)
    else:
        # elastic_checkpoint: a list of states; of the hyperparameters at most a common step.
        states = dict(enumerate(a_sequence(base, place, len(masters))))
        group_of = {index: index for index in range(len(masters))}
        if "base_optimizer_state_step" in outer:
            groups = tuple({"step": outer["base_optimizer_state_step"]} for _ in masters)
    tensors, scalars = _states(states, masters, place.at("state"))
    count = len(masters)
    return OptimStates(
        file=top.file,
        writer="bf16" if bf16 else "zero",
        stage=1 if bf16 else _stage(outer["zero_stage"], top, (1, 2)),
        tensors={MASTER: dict(enumerate(masters)), **tensors},
        scalars=scalars,
        groups=groups,
        group_of=group_of,
        partition_count=_partition_counts(outer.get("partition_count"), top.at("partition_count"), count),
        ranks=outer["partition_count"] if type(outer.get("partition_count")) is int else None,
        group_paddings=_counts(outer.get("group_paddings"), top.at("group_paddings"), count),
        alignment_paddings=_alignment(
            outer.get("param_alignment_paddings"), top.at("param_alignment_paddings"), count
        ),
        globals={key: outer[key] for key in _GLOBALS if key in outer},
    )


def _stage_3(outer: Mapping[Any, Any], top: Field) -> OptimStates:
    masters = _flat_tensors(outer["fp32_flat_groups"], top.at("fp32_flat_groups"))
    inner = a_mapping(outer.get("optimizer_state_dict"), top.at("optimizer_state_dict"))
    place = top.at("optimizer_state_dict")
    groups, group_of = _groups(inner.get("param_groups"), place.at("param_groups"))
    if sorted(group_of) != list(range(len(masters))):
        raise place.at("param_groups").wrong(f"params 0 to {len(masters) - 1}, each once", sorted(group_of))
    tensors, scalars = _states(
        a_mapping(inner.get("state"), place.at("state")), masters, place.at("state"), exact=True
    )
    if "ds_zero_partition_groups" in outer:
        raise LayoutError(
            f"{top.file} was saved with experts partitioned by themselves (AutoEP), which is not supported",
            path=top.file,
        )
    return OptimStates(
        file=top.file,
        writer="zero3",
        stage=_stage(outer.get("zero_stage"), top, (3,)),
        tensors={MASTER: dict(enumerate(masters)), **tensors},
        scalars=scalars,
        groups=groups,
        group_of=group_of,
        partition_count=None,
        ranks=a_count(outer.get("partition_count"), top.at("partition_count"), least=1),
        group_paddings=None,
        alignment_paddings=None,
        globals={key: outer[key] for key in _GLOBALS if key in outer},
    )


def read_whole_optimizer(tree: Any, *, file: str) -> OptimStates:
    """Stage 0's optimizer, which the model file holds whole (`ModelStates.optimizer`): one tensor for each parameter,
    in the optimizer's order.

    Raises as `read_optim_states`, and `LayoutError` for optimizers whose state names no parameters.
    """
    top = Field(file).at("optimizer")
    outer = a_mapping(tree, top)
    if "single_partition_of_fp32_groups" in outer:
        raise LayoutError(
            f"{file}: stage 0 with BF16_Optimizer (a bf16 pipeline), whose files do not tell its parameters, is not "
            "supported: load the weights only, and save at stage 1 from then on",
            path=file,
        )
    masters: list[SavedTensor] | None = None
    inner, place = outer, top
    if "optimizer_state_dict" in outer:
        if "fp32_groups" not in outer:
            raise LayoutError(
                f"{file}: stage 0 with a fused fp16 optimizer (fp32_groups_flat) is not supported: load the "
                "weights only, and save at stage 1 from then on",
                path=file,
            )
        groups_place = top.at("fp32_groups")
        masters = [
            tensor
            for index, group in enumerate(a_sequence(outer["fp32_groups"], groups_place))
            for tensor in _flat_tensors(group, groups_place.at(index))
        ]
        inner, place = a_mapping(outer["optimizer_state_dict"], top), top.at("optimizer_state_dict")
    groups, group_of = _groups(inner.get("param_groups"), place.at("param_groups"))
    if masters is not None and sorted(group_of) != list(range(len(masters))):
        raise place.at("param_groups").wrong(f"params 0 to {len(masters) - 1}, each once", sorted(group_of))
    states = a_mapping(inner.get("state"), place.at("state"))
    tensors: dict[str, dict[int, SavedTensor]] = {}
    scalars: dict[int, dict[str, Any]] = {}
    for index in sorted(states, key=repr):
        if index not in group_of:
            raise place.at("state").at(index).wrong("the index of a parameter", index)
        for key, value in a_mapping(states[index], place.at("state").at(index)).items():
            if isinstance(value, SavedTensor) and key != "step":
                tensors.setdefault(str(key), {})[index] = value
            else:
                scalars.setdefault(index, {})[str(key)] = _scalar(value, place.at("state").at(index).at(key))
    if masters is not None:
        tensors[MASTER] = dict(enumerate(masters))
    return OptimStates(
        file=file,
        writer="whole",
        stage=0,
        tensors=tensors,
        scalars=scalars,
        groups=groups,
        group_of=group_of,
        partition_count=None,
        ranks=None,
        group_paddings=None,
        alignment_paddings=None,
        globals={key: outer[key] for key in _GLOBALS if key in outer} if masters is not None else {},
    )


def _flat_tensors(value: Any, place: Field) -> list[SavedTensor]:
    return [a_tensor(item, place.at(index)) for index, item in enumerate(a_sequence(value, place))]


def _groups(value: Any, place: Field) -> tuple[tuple[dict[str, Any], ...], dict[int, int]]:
    groups = []
    group_of: dict[int, int] = {}
    for index, group in enumerate(a_sequence(value, place)):
        entries = a_mapping(group, place.at(index))
        for param in a_sequence(entries.get("params"), place.at(index).at("params")):
            number = a_count(param, place.at(index).at("params"))
            if number in group_of:
                raise place.at(index).at("params").wrong("each parameter once", number)
            group_of[number] = index
        groups.append({str(k): v for k, v in entries.items() if k not in ("params", "param_names")})
    return tuple(groups), group_of


def _states(
    states: Mapping[Any, Any], masters: list[SavedTensor], place: Field, *, exact: bool = False
) -> tuple[dict[str, dict[int, SavedTensor]], dict[int, dict[str, Any]]]:
    """The element-wise tensors by kind and flat tensor, and the other state by flat tensor.

    `exact`: tensors are as long as the masters; else they may be longer, by padding.
    """
    tensors: dict[str, dict[int, SavedTensor]] = {}
    scalars: dict[int, dict[str, Any]] = {}
    for index, entries in states.items():
        at = place.at(index)
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(masters):
            raise at.wrong(f"an index below {len(masters)}", index)
        for key, value in a_mapping(entries, at).items():
            if isinstance(value, SavedTensor) and len(value.shape) > 0:
                # Trimmed or padded, but never shorter than the fp32 partition, which most optimizers trim.
                if (
                    len(value.shape) != 1
                    or value.numel < masters[index].numel
                    or (exact and value.numel != masters[index].numel)
                ):
                    raise LayoutError(
                        f"{place.file}: optimizer state {key!r} has shape {value.shape} where the partition has "
                        f"{masters[index].numel} elements; only state that lies element by element along the "
                        "parameters can be restored",
                        path=place.file,
                    )
                tensors.setdefault(str(key), {})[index] = value
            else:
                scalars.setdefault(index, {})[str(key)] = _scalar(value, at.at(key))
    return tensors, scalars


def _scalar(value: Any, place: Field) -> Any:
    if isinstance(value, SavedTensor):
        if value.numel != 1:
            raise place.wrong("a number", value)
    elif isinstance(value, InertObject) or not (value is None or isinstance(value, bool | int | float | str)):
        raise LayoutError(
            f"{place.file}: {place.key} holds a {kind_of(value)}; only numbers and tensors that lie element by "
            "element along the parameters can be restored",
            path=place.file,
        )
    return value


def _stage(value: Any, top: Field, expected: tuple[int, ...]) -> int:
    place = top.at("zero_stage")
    stage = enum_value(value, place)
    if stage not in expected:
        raise place.wrong(f"stage {' or '.join(map(str, expected))}", stage)
    return stage


def _partition_counts(value: Any, place: Field, groups: int) -> tuple[int, ...] | None:
    if value is None or type(value) is int:
        return None if value is None else (a_count(value, place, least=1),) * groups
    return tuple(a_count(item, place, least=1) for item in a_sequence(value, place, groups))


def _counts(value: Any, place: Field, length: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    return tuple(a_count(item, place) for item in a_sequence(value, place, length))


def _alignment(value: Any, place: Field, groups: int) -> tuple[tuple[int, ...], ...] | None:
    if value is None:
        return None
    return tuple(
        tuple(a_count(item, place.at(index)) for item in a_sequence(group, place.at(index)))
        for index, group in enumerate(a_sequence(value, place, groups))
    )
