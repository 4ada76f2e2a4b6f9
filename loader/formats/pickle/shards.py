"""Reads what a pickle says of one rank's shard of a tensor: torch's DTensor, and FSDP1's ShardedTensor. Free of torch.

Both are objects around an ordinary tensor. Their classes have changed with torch's versions, so that what is needed is
looked for by the names of fields: a DTensor's ``_local_tensor`` and, in its ``_spec``, the placements and the mesh,
whose shape is in ``_layout`` or, in older versions, is that of its tensor ``mesh``. Nothing is refused here, since the
shard may be in a part that nobody restores: what is not found is the shard's `problem`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...saved.shards import REPLICATE, SHARD, STRIDED, Placement, Spread
from ...saved.strided import Box
from ...saved.tensor import SavedTensor
from ...saved.values import GlobalName, InertObject, kind_of
from .budget import Budget
from .inert import PickledShard
from .known import DTYPES

_MOST_DIMENSIONS = 16
"""Of a mesh: no job's has more than a few."""
_MOST_SHARDS = 1 << 16
"""Of one tensor on one rank, or of its ranks."""
_LARGEST = 1 << 62
_BYTES = 1000
"""About what the values that describe a shard take."""

Sizes = tuple[int, ...]


class _ProblemError(Exception):
    """A field that is missing, or that holds something else than it does in any torch that is known."""


def is_shard_class(name: str) -> bool:
    """Whether the class of that name keeps one rank's shard of a tensor."""
    return name.startswith("torch.distributed.") and name.endswith((".DTensor", ".ShardedTensor"))


def read_shard(budget: Budget, name: str, args: Sequence[Any], state: Any) -> PickledShard:
    """The shard that an object of the class `name` is; `args` are those that its wrapper tensor is made with."""
    budget.charge(_BYTES)
    kind = f"{name.rpartition('.')[2]}, one rank's shard of a tensor"
    shard = PickledShard(global_name=name, kind=kind)
    try:
        shard.dtype, shard.shape = _wrapper(args)
        if name.endswith(".DTensor"):
            _read_dtensor(shard, _fields(state))
        else:
            _read_sharded_tensor(shard, state)
    except _ProblemError as problem:
        shard.problem = str(problem)
    return shard


def _wrapper(args: Sequence[Any]) -> tuple[str, Sizes]:
    """The dtype and shape of the whole tensor."""
    if len(args) < 3 or not isinstance(args[1], GlobalName) or args[1].name not in DTYPES:
        raise _ProblemError("its wrapper has no dtype that is known")
    return DTYPES[args[1].name], _sizes(args[2], "the size of its wrapper")


def _read_dtensor(shard: PickledShard, fields: Mapping[str, Any]) -> None:
    local = fields.get("_local_tensor")
    if not isinstance(local, SavedTensor):
        raise _ProblemError(f"its _local_tensor is a {kind_of(local)}, expected an ordinary tensor")
    spec = _fields_of(fields.get("_spec"), "its _spec")
    placements = spec.get("placements")
    if not isinstance(placements, tuple | list) or len(placements) > _MOST_DIMENSIONS:
        raise _ProblemError("its _spec has no placements")
    mesh, origin, coordinate, world_size = _mesh(_fields_of(spec.get("mesh"), "the mesh of its _spec"))
    placed = tuple(map(_placement, placements))
    shard.local, shard.world_size = local, world_size
    shard.spread = Spread(mesh, coordinate, placed, origin)


def _mesh(fields: Mapping[str, Any]) -> tuple[Sizes, int | None, Sizes | None, int]:
    """The shape of a DeviceMesh, the rank at its coordinate 0, this rank's coordinate, and the job's ranks."""
    if "_coordinate_on_dim" not in fields:
        raise _ProblemError("its DeviceMesh has no _coordinate_on_dim")
    at = fields["_coordinate_on_dim"]
    coordinate = None if at is None else _sizes(at, "_coordinate_on_dim of its DeviceMesh")
    tensor = fields.get("mesh")
    if isinstance(tensor, SavedTensor):
        ranks = fields.get("_flatten_mesh_list")
        first = ranks[0] if isinstance(ranks, tuple | list) and ranks else None
        return tensor.shape, first if type(first) is int else None, coordinate, tensor.numel
    axes = list(_axes(fields.get("_layout")))
    shape = tuple(math.prod(sizes) for sizes, _ in axes)
    every = fields.get("_flatten_rank_map")
    world_size = len(every) if isinstance(every, tuple | list) else math.prod(shape)
    rank, origin = fields.get("_rank"), None
    if type(rank) is int and coordinate is not None and len(coordinate) == len(axes):
        origin = rank - sum(_along(axis, at) for axis, at in zip(axes, coordinate, strict=True))
    return shape, origin, coordinate, world_size


def _axes(layout: Any) -> Iterator[tuple[Sizes, Sizes]]:
    """The sizes and strides of each dimension of a mesh, which may be several of a larger mesh in one."""
    fields = _fields_of(layout, "its DeviceMesh has no tensor mesh; the _layout there")
    axes = fields.get("axes")
    if axes is None:
        # Of one dimension, they may be numbers.
        both = (fields.get("shape"), fields.get("stride"))
        sizes, steps = ((one,) if type(one) is int else one for one in both)
        if (
            not isinstance(sizes, tuple | list)
            or not isinstance(steps, tuple | list)
            or len(sizes) != len(steps)
        ):
            raise _ProblemError("the _layout of its DeviceMesh has neither axes nor shape and stride")
        each = list(zip(sizes, steps, strict=True))
    elif isinstance(axes, tuple | list):
        flat = [_fields_of(axis, "an axis of its DeviceMesh") for axis in axes]
        each = [(axis.get("shape"), axis.get("stride")) for axis in flat]
    else:
        raise _ProblemError("the axes of its DeviceMesh are no tuple")
    if len(each) > _MOST_DIMENSIONS:
        raise _ProblemError(f"its DeviceMesh has {len(each)} dimensions")
    for sizes, steps in each:
        axis = _numbers(sizes), _numbers(steps)
        if len(axis[0]) != len(axis[1]):
            raise _ProblemError("a dimension of its DeviceMesh has other sizes than strides")
        yield axis


def _numbers(value: Any) -> Sizes:
    return _sizes((value,) if type(value) is int else value, "a dimension of its DeviceMesh")


def _along(axis: tuple[Sizes, Sizes], at: int) -> int:
    """How many ranks the place `at` of an axis lies from its first."""
    found = 0
    for size, step in zip(reversed(axis[0]), reversed(axis[1]), strict=True):
        found += at % max(1, size) * step
        at //= max(1, size)
    return found


def _placement(value: Any) -> Placement:
    kind = kind_of(value).rpartition(".")[2][:80]
    if kind == REPLICATE:
        return Placement(REPLICATE)
    if kind not in (SHARD, STRIDED):
        return Placement(kind)
    fields = _fields_of(value, f"a placement {kind}")
    numbers = fields.get("dim"), fields.get("split_factor", 1)
    if not all(type(one) is int and abs(one) <= _LARGEST for one in numbers):
        raise _ProblemError(f"a placement {kind} has no dim, or no split_factor, that is a number")
    return Placement(kind, numbers[0], numbers[1])  # type: ignore[arg-type]


def _read_sharded_tensor(shard: PickledShard, state: Any) -> None:
    # As ``ShardedTensor.__setstate__`` takes it: local shards, metadata and what its process group was.
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], list):
        raise _ProblemError("its state does not begin with a list of local shards, and metadata")
    metadata = _fields_of(state[1], "its metadata")
    everywhere = metadata.get("shards_metadata")
    if not isinstance(everywhere, list) or max(len(everywhere), len(state[0])) > _MOST_SHARDS:
        raise _ProblemError("its metadata has no shards_metadata")
    shard.world_size = len(everywhere)
    shard.boxes = tuple(_local_shard(_fields_of(one, "a local shard")) for one in state[0])


def _local_shard(fields: Mapping[str, Any]) -> tuple[Box, SavedTensor]:
    tensor, metadata = fields.get("tensor"), _fields_of(fields.get("metadata"), "the metadata of a shard")
    if not isinstance(tensor, SavedTensor):
        raise _ProblemError(f"the tensor of a local shard is a {kind_of(tensor)}")
    starts, sizes = (
        _sizes(metadata.get(name), f"{name} of a shard") for name in ("shard_offsets", "shard_sizes")
    )
    return Box(starts, sizes), tensor


def _fields_of(value: Any, what: str) -> Mapping[str, Any]:
    """The fields of an object. Raises `_ProblemError` where it is none."""
    if not isinstance(value, InertObject):
        raise _ProblemError(f"{what} is a {kind_of(value)}")
    return _fields(value.state)


def _fields(state: Any) -> Mapping[str, Any]:
    """The fields in an object's pickled state, which has those of slots apart."""
    if isinstance(state, tuple) and len(state) == 2:
        return {**_fields(state[0]), **_fields(state[1])}
    return state if isinstance(state, dict) else {}


def _sizes(value: Any, what: str) -> Sizes:
    """`value` as a tuple of sizes. Raises `_ProblemError` where it is none."""
    if not isinstance(value, tuple | list) or len(value) > 64:
        raise _ProblemError(f"{what} is a {kind_of(value)}, expected at most 64 numbers")
    if not all(type(one) is int and 0 <= one <= _LARGEST for one in value):
        raise _ProblemError(f"{what} has something else than sizes")
    return tuple(value)
