"""Modules whose parameters FSDP spreads over the ranks. Imports torch."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import LayoutError
from .dtensor import is_dtensor

TORCH_OWN = ("torch.distributed.",)
"""Where hooks that sharding puts on a module come from: they run no code of the user's."""


def fsdp_modules(module: nn.Module) -> list[nn.Module]:
    """The parts of `module` that ``fully_shard`` was called on."""
    return [
        part for part in module.modules() if any(base.__name__ == "FSDPModule" for base in type(part).__mro__)
    ]


def show_shards(module: nn.Module) -> None:
    """Makes `module` show the shards that it keeps instead of gathered weights; every rank by itself.

    Raises `LayoutError` for what FullyShardedDataParallel (FSDP1) flattened: names and shapes are lost there.
    """
    for part in module.modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise LayoutError(
                "the model is wrapped in FullyShardedDataParallel: restoring into it is not supported; use "
                "fully_shard, or load before wrapping it"
            )
    for part in fsdp_modules(module):
        part.reshard()  # type: ignore[operator]


def has_dtensors(module: nn.Module) -> bool:
    """Whether some parameter or buffer of `module` is spread over a device mesh."""
    return any(is_dtensor(tensor) for tensor in (*module.parameters(), *module.buffers()))


def give_shards_memory(module: nn.Module) -> None:
    """Gives the DTensors of `module` that are on the meta device memory on their mesh's devices, as the same objects.

    Raises `LayoutError` where they could not stay the same, which an optimizer would notice.
    """
    shards = {
        name: tensor for name, tensor in module.named_parameters() if is_dtensor(tensor) and tensor.is_meta
    }
    if not shards:
        return

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not (is_dtensor(tensor) and tensor.is_meta):
            return tensor
        return torch.empty_like(tensor, device=tensor.device_mesh.device_type)  # type: ignore[attr-defined]

    # What ``to_empty`` does, but for the meta ones only; FSDP's modules renew their own references in it.
    module._apply(real)  # type: ignore[no-untyped-call]
    now = dict(module.named_parameters())
    replaced = [name for name, tensor in shards.items() if now[name] is not tensor or tensor.is_meta]
    if replaced:
        raise LayoutError(
            f"giving the module memory replaced its parameters {', '.join(replaced[:8])}; call "
            "module.to_empty(device=...) before the optimizer is made and the checkpoint loaded"
        )
