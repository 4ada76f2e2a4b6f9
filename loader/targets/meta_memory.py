"""Makes memory for a module's tensors on the meta device, which they get once it is filled: until then all stays."""

from __future__ import annotations

import torch
from torch import nn

from ..torch_modes import callers_device
from .dtensor import give_shards_memory, is_dtensor, memory_device


class MetaMemory:
    """Memory for every meta parameter and buffer of a module, on the caller's default device (shards: on their mesh's).

    It is the module's once `give` is called. The tensors stay the same objects, so that an optimizer made before keeps
    its parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        device = callers_device()
        self._tensors = {
            id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()] if tensor.is_meta
        }
        self._made = {
            key: torch.empty_like(tensor, device=memory_device(tensor, device))
            for key, tensor in self._tensors.items()
        }

    def __bool__(self) -> bool:
        return bool(self._made)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory of `tensor`: that which it will get, where it has none."""
        return self._made.get(id(tensor), tensor)

    def give(self) -> None:
        """Gives each tensor its memory. Raises as `give_shards_memory`."""
        give_shards_memory(self._module, self._made)
        for key, tensor in self._tensors.items():
            if is_dtensor(tensor):
                continue
            real = self._made[key]
            if isinstance(tensor, nn.Parameter):
                real = nn.Parameter(real, requires_grad=tensor.requires_grad)
            torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]
