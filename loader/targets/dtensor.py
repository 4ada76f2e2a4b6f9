"""Finds the part of a tensor that this rank keeps: all of an ordinary one, one box of a DTensor. Imports torch.

`local_part` finds the box by the DTensor's placements, and its memory; `kept_part` tells both before the memory is
there, as a plan needs them. For modules sharded with ``fully_shard`` (FSDP2): `show_shards` before planning,
`give_shards_memory` where shards are on the meta device. No function waits for another rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import LayoutError
from ..saved.copies import Memory
from ..saved.regions import Laid, whole_box
from ..saved.shards import chunk
from ..saved.strided import Box
from ..torch_modes import callers_device

TORCH_OWN = ("torch.distributed.",)
"""Modules of the hooks that sharding puts on a module: these run none of the user's own code."""


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is spread over a device mesh (by FSDP2 or tensor parallelism)."""
    # By name first: a job without DTensors is spared the time of importing them.
    if type(tensor).__name__ != "DTensor":
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor, name: str) -> tuple[Box, torch.Tensor]:
    """The box of the whole `tensor` that this rank keeps, and its memory, of the box's shape.

    `name` is for messages. Raises `LayoutError` for a DTensor with placements other than ``Shard``, ``Replicate`` and
    what `fully_shard` makes of a dimension that tensor parallelism shards too, or with a shard of another shape than
    they give.
    """
    if not is_dtensor(tensor):
        return whole_box(tuple(tensor.shape)), tensor.detach()
    box = dtensor_box(tensor, name)
    with torch.no_grad():
        local: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    if box.numel == 0 and local.numel() == 0:
        return box, local
    if tuple(local.shape) != box.sizes:
        raise LayoutError(
            f"{name}: this rank keeps a shard of shape {tuple(local.shape)}, expected {box.sizes} of "
            f"{tuple(tensor.shape)} by its placements {getattr(tensor, 'placements', ())}"
        )
    return box, local


def dtensor_box(tensor: Any, name: str) -> Box:
    """The box of the DTensor `tensor` on this rank, by its placements.

    As in torch (``torch/distributed/tensor/placement_types.py``), mesh dimensions apply in order, and each ``Shard``
    cuts what is left as ``torch.chunk`` does: shares of ceil(size / ranks) elements, the last ones smaller or empty. A
    ``_StridedShard`` cuts what the later mesh dimensions have left of its dimension, so it applies after them. Empty
    where the rank is not in the tensor's mesh. Raises as `local_part`.
    """
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    if coordinate is None:
        return Box(tuple(starts), (0,) * tensor.ndim)
    placements = tuple(tensor.placements)
    strided = [at for at, one in enumerate(placements) if _is_strided(one)]
    for mesh_dim in [*(at for at in range(len(placements)) if at not in strided), *reversed(strided)]:
        placement = placements[mesh_dim]
        if type(placement) is Replicate:
            continue
        if not _cuts_in_order(placements, mesh_dim, mesh):
            raise LayoutError(
                f"{name} is a DTensor placed as {placements}; only Shard and Replicate can be restored, and "
                "fully_shard over tensor parallelism. Load before the module is sharded that way"
            )
        dim = placement.dim % tensor.ndim
        first, sizes[dim] = chunk(sizes[dim], mesh.size(mesh_dim), coordinate[mesh_dim])
        starts[dim] += first
    return Box(tuple(starts), tuple(sizes))


def _is_strided(placement: Any) -> bool:
    # By name: torch has moved the class, which is not public.
    return type(placement).__name__ == "_StridedShard"


def _cuts_in_order(placements: tuple[Any, ...], mesh_dim: int, mesh: Any) -> bool:
    """Whether the placement of a mesh dimension is a ``Shard``, or strided over all later cuts of its dimension."""
    from torch.distributed.tensor import Shard

    placement = placements[mesh_dim]
    if not _is_strided(placement):
        return type(placement) is Shard
    later = [
        at
        for at in range(mesh_dim + 1, len(placements))
        if getattr(placements[at], "dim", None) == placement.dim
    ]
    return bool(placement.split_factor == math.prod(mesh.size(at) for at in later))


def unfillable(tensor: torch.Tensor, *, whole: bool = False) -> str | None:
    """Why a checkpoint's elements cannot be copied into `tensor`; None where they can be.

    Such are tensors of which several elements share memory, those that keep their data in other tensors and, unless
    `tensor` is filled as a `whole` from one of its layout, those without an element for each index.
    """
    local = getattr(tensor, "_local_tensor", tensor) if is_dtensor(tensor) else tensor
    if local.layout != torch.strided and not whole:
        return f"is a tensor of layout {str(local.layout).removeprefix('torch.')}, which cannot be filled in place"
    if local.is_quantized and not whole:
        return "is a quantized tensor, which cannot be filled in place: load before the module is quantized"
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"is a {type(local).__qualname__}, which keeps its data in other tensors and cannot be filled in place: "
            "load before the module is changed that way"
        )
    if local.layout == torch.strided and not local.is_meta and _repeats_memory(local):
        return (
            f"has several elements in one place of memory (shape {tuple(local.shape)}, strides {local.stride()}), so "
            "that they cannot all be restored: make it contiguous"
        )
    return None


def _repeats_memory(tensor: torch.Tensor) -> bool:
    """Whether two elements of `tensor` lie in one place."""
    dims = sorted((step, size) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    if not tensor.numel() or not dims:
        return False
    reach = 0
    apart = True
    for step, size in dims:
        apart = apart and step > reach
        reach += step * (size - 1)
    if apart:
        return False
    if tensor.numel() > reach + 1:
        return True
    places = torch.arange(reach + 1).as_strided(tensor.shape, tensor.stride())
    return len(set(places.flatten().tolist())) < tensor.numel()


def kept_part(tensor: Any, key: str, *, new: torch.dtype | None = None) -> tuple[Laid, Memory]:
    """The part of the whole `tensor` that this rank keeps, and the memory that it lies in.

    A tensor on the meta device has none yet: the memory is that which `give_shards_memory` or ``torch.empty_like`` will
    give it. With `new`, it is the memory of what ``torch.empty_like(tensor, dtype=new)`` will make. `key` is the
    memory's, and for messages. Raises as `local_part`.
    """
    box, local = local_part(tensor, key)
    made = new is not None or local.is_meta
    layout = torch.empty_like(local, dtype=new, device="meta") if made else local
    device = (
        torch.device(memory_device(tensor, callers_device())).type if local.is_meta else local.device.type
    )
    plain = device == "cpu" and (made or not (local.is_conj() or local.is_neg()))
    memory = Memory(key, dtype_name(layout.dtype), tuple(layout.shape), layout.stride(), plain)
    return Laid(box, 0, memory.stride), memory


def memory_device(tensor: Any, callers: torch.device) -> torch.device | str:
    """Where a tensor on the meta device gets its memory: on the caller's default device, a shard on its mesh's."""
    device: torch.device | str = tensor.device_mesh.device_type if is_dtensor(tensor) else callers
    return device


def shape_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of the whole tensor; None for a lazy module's, which has none yet."""
    lazy = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
    return None if lazy else tuple(tensor.shape)


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def show_shards(module: nn.Module) -> None:
    """Makes `module`'s parameters the shards that this rank keeps, where FSDP2 has gathered the whole weights.

    Raises `LayoutError` for a module inside FullyShardedDataParallel (FSDP1), which flattens parameters.
    """
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise LayoutError(
                "the model is wrapped in FullyShardedDataParallel: restoring into it is not supported; use "
                "fully_shard, or load before wrapping it"
            )
    for part in fsdp_modules(module):
        part.reshard()  # type: ignore[operator]


def fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """The submodules of `module` that ``fully_shard`` was called on."""
    return [
        part for part in module.modules() if any(base.__name__ == "FSDPModule" for base in type(part).__mro__)
    ]


def has_dtensors(module: nn.Module) -> bool:
    """Whether some parameter or buffer of `module` is spread over a device mesh."""
    return any(is_dtensor(tensor) for tensor in (*module.parameters(), *module.buffers()))


def give_shards_memory(module: nn.Module, made: Mapping[int, torch.Tensor]) -> None:
    """Gives the meta DTensors of `module` the memory that was `made` for them, by id; they stay the same objects.

    Raises `LayoutError` where torch replaced them by others: an optimizer would keep the old ones.
    """
    shards = {
        name: tensor for name, tensor in module.named_parameters() if is_dtensor(tensor) and tensor.is_meta
    }
    if not shards:
        return

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not (is_dtensor(tensor) and tensor.is_meta):
            return tensor
        return made[id(tensor)]

    # As ``to_empty`` does, for the meta ones only; in ``_apply`` FSDP's modules renew their own references.
    module._apply(real)  # type: ignore[no-untyped-call]
    now = dict(module.named_parameters())
    replaced = [name for name, tensor in shards.items() if now[name] is not tensor or tensor.is_meta]
    if replaced:
        raise LayoutError(
            f"giving the module memory replaced its parameters {', '.join(replaced[:8])}; call "
            "module.to_empty(device=...) before the optimizer is made and the checkpoint loaded"
        )
