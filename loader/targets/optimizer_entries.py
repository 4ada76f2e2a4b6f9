"""The state that an optimizer keeps for each parameter, checked against the parameter and made real. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..materialize.objects import realise
from ..materialize.tensors import CopyRequest, Reader, torch_dtype
from ..saved.assembled import AssembledTensor, SavedTensor
from ..saved.mismatch import Mismatch
from ..saved.values import LazyTensor
from .dtensor import fill_requests, is_dtensor

STEP = "step"

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
"""State tensors that torch's optimizers keep with an element for each of the parameter's."""


@dataclass(frozen=True)
class Zeros:
    """An entry that was ignored and cannot be done without: zeros in place of what was saved."""

    shape: tuple[int, ...]
    dtype: str


def check_entry(value: Any, key: str, parameter: torch.Tensor, at: str, mismatch: Mismatch) -> None:
    """Notes in `mismatch` where the saved `value` does not lie along `parameter`, and should."""
    if not isinstance(value, SavedTensor) or isinstance(parameter, torch.nn.UninitializedParameter):
        return
    along = value.shape == tuple(parameter.shape)
    if isinstance(value, AssembledTensor):
        wrong = not along
    elif is_dtensor(parameter) and key != STEP and value.numel != 1:
        if not along:
            mismatch.wrong.append(
                f"{at}: has shape {value.shape} for a parameter of shape {tuple(parameter.shape)} that is sharded; "
                "only state that lies element by element along the parameters can be spread over the ranks"
            )
        return
    else:
        wrong = key in ELEMENTWISE and not along and not parameter.is_meta
    if wrong:
        mismatch.wrong.append(f"{at}: expected shape {tuple(parameter.shape)}, got {value.shape}")


def cast_of(value: Any, key: str, parameter: torch.Tensor) -> str | None:
    """``source -> target`` where the entry will have another dtype than saved."""
    if not isinstance(value, SavedTensor) or not lies_along(value, key, parameter):
        return None
    target = str(_dtype_along(value, parameter)).removeprefix("torch.")
    return None if target == value.dtype else f"{value.dtype} -> {target}"


def real_entries(
    state: Mapping[int, Mapping[str, Any]],
    parameters: Sequence[torch.Tensor],
    *,
    name: str,
    reader: Reader,
    **realising: Any,
) -> dict[int, dict[str, Any]]:
    """`state` (by position in `parameters`) as real values; `name` is the optimizer's in messages.

    What lies along a parameter in pieces, or along a DTensor, is read into new memory once, as the optimizer would
    have made it: of the parameter's device, dtype and placements. Everything else is as it was saved.
    """
    found: dict[int, dict[str, Any]] = {}
    requests: list[CopyRequest] = []
    for position, entries in state.items():
        parameter = parameters[position]
        along = {key for key, value in entries.items() if lies_along(value, key, parameter)}
        # Each parameter's own values, so that none shares a step that is counted up in place.
        real = realise({key: entries[key] for key in entries if key not in along}, reader=reader, **realising)
        for key in along:
            value = entries[key]
            dtype = _dtype_along(value, parameter)
            if isinstance(value, Zeros):
                real[key] = torch.zeros_like(parameter.detach(), dtype=dtype)
                continue
            real[key] = torch.empty_like(parameter.detach(), dtype=dtype)
            requests.extend(fill_requests(value, real[key], f"optimizers/{name}/state/{position}/{key}"))
        found[position] = {key: _zeros(real[key]) for key in entries}
    reader.copy(requests)
    return found


def lies_along(value: Any, key: str, parameter: torch.Tensor) -> bool:
    """Whether the entry is read into memory that is as the parameter's is, rather than made as it was saved."""
    if isinstance(value, AssembledTensor):
        return True
    if isinstance(value, LazyTensor) and not is_dtensor(parameter):
        return False
    return key != STEP and isinstance(value, LazyTensor | Zeros) and value.shape == tuple(parameter.shape)


def _dtype_along(value: SavedTensor | Zeros, parameter: torch.Tensor) -> torch.dtype:
    """torch's optimizers keep state of floats in the parameter's dtype, and cast to it what they load."""
    saved = torch_dtype(value.dtype)
    floats = saved.is_floating_point and parameter.is_floating_point()
    return parameter.dtype if floats else saved


def _zeros(value: Any) -> Any:
    if not isinstance(value, Zeros):
        return value
    return torch.zeros(value.shape, dtype=torch_dtype(value.dtype))
