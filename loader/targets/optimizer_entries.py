"""Says what an entry of a parameter's optimizer state is: read into memory like the parameter's, or made as saved.

State that lies element by element along a parameter has the parameter's shards; everything else, such as ``step``, is
made. Nothing is changed here, and no rank waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..materialize.tensors import torch_dtype
from ..saved.tensor import SavedTensor, StorageRef
from .dtensor import dtype_name, is_dtensor, shape_of
from .module import NOT_INITIALISED
from .optimizer_kinds import STEP

ELEMENTWISE = frozenset(
    {
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "grad_avg",
        "acc_delta",
        "sum",
        "prev",
        "step_size",
        "mu_product_buffer",
        "ax",
    }
)
"""Keys of state tensors of torch's optimizers (``torch/optim``) that have an element for each of the parameter's."""


@dataclass(frozen=True)
class Zeros:
    """Zeros in place of a saved tensor that was ignored, where the optimizer needs the entry with the others."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Own:
    """This optimizer's own value in place of one that was ignored."""

    value: Any


def shape_problem(value: Any, key: str, parameter: torch.Tensor) -> str | None:
    """Why a saved `value`, which should have the shape of `parameter`, cannot be its entry `key`; else None."""
    if not isinstance(value, SavedTensor):
        return None
    in_pieces, shape = value.whole is None, shape_of(parameter)
    if shape is None:
        return NOT_INITIALISED if in_pieces else None
    if value.shape == shape:
        return None
    if not in_pieces and is_dtensor(parameter) and key != STEP and value.numel != 1:
        return (
            f"has shape {value.shape} for a parameter of shape {shape} that is sharded; only state that lies element "
            "by element along the parameters can be spread over the ranks"
        )
    if in_pieces or (key in ELEMENTWISE and not parameter.is_meta):
        return f"expected shape {shape}, got {value.shape}"
    return None


def cast_of(value: Any, key: str, parameter: torch.Tensor) -> str | None:
    """``source -> target`` where the entry will have another dtype than saved; else None."""
    if not isinstance(value, SavedTensor) or not lies_along(value, key, parameter):
        return None
    target = dtype_name(dtype_along(value, parameter))
    return None if target == value.dtype else f"{value.dtype} -> {target}"


def lies_along(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Whether the entry is read into memory like the parameter's, rather than made as it was saved.

    So are tensors saved in pieces, and what has the shape of a DTensor parameter. A tensor that is saved whole and goes
    to an ordinary parameter is made as it was saved.
    """
    if isinstance(value, SavedTensor):
        if value.whole is None:
            return True
        if not is_dtensor(parameter):
            return False
    return key != STEP and isinstance(value, SavedTensor | Zeros) and value.shape == shape_of(parameter)


def dtype_along(value: SavedTensor | Zeros, parameter: torch.Tensor) -> torch.dtype:
    """The dtype of state along `parameter`: torch's optimizers cast floating-point state to the parameter's dtype."""
    saved = torch_dtype(value.dtype)
    floats = saved.is_floating_point and parameter.is_floating_point()
    return parameter.dtype if floats else saved


def standing_alone(entries: Mapping[str, Any]) -> set[str]:
    """The keys of tensors that were saved as a tensor of their shape with memory of its own would be: contiguous, and
    in a storage that none of the other entries shares."""
    users: dict[StorageRef, list[str]] = {}
    for key, value in entries.items():
        if isinstance(value, SavedTensor):
            for storage in value.storages:
                users.setdefault(storage, []).append(key)
    shared = {key for keys in users.values() if len(keys) > 1 for key in keys}
    return {
        key
        for key, value in entries.items()
        if isinstance(value, SavedTensor)
        and value.is_contiguous
        and not value.requires_grad
        and key not in shared
    }


def new_tensor(value: SavedTensor | Zeros, key: str, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor that the entry is read into, or that is its zeros."""
    if lies_along(value, key, parameter):
        make_like = torch.zeros_like if isinstance(value, Zeros) else torch.empty_like
        return make_like(parameter.detach(), dtype=dtype_along(value, parameter))
    make = torch.zeros if isinstance(value, Zeros) else torch.empty
    return make(value.shape, dtype=torch_dtype(value.dtype))
