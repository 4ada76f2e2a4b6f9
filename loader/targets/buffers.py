"""Compares the values of buffers that are cast to another kind of dtype: masks and tables of positions of other eras.

`check_saved` reads a saved buffer and adds what would not survive to a `Mismatch`, `check_read` raises for buffers that
were read later. Parameters are never cast so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..materialize.tensors import read_tensor
from ..saved.mismatch import Mismatch
from ..saved.tensor import SavedTensor
from .dtensor import dtype_name


def values_place(name: str) -> str:
    """The place under which a step reads the values of the buffer `name`, to compare them before it changes any."""
    return f"values of model/{name}"


def check_saved(value: SavedTensor, target: torch.Tensor, place: str, mismatch: Mismatch) -> None:
    """Tells `mismatch` where a value of the saved buffer at `place` is none of `target`'s dtype. Reads the buffer."""
    problem = _lost(read_tensor(value, name=place), target.dtype)
    if problem:
        mismatch.wrong.append(f"{place}: {problem}")


def check_read(read: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], file: str) -> None:
    """Raises one `MismatchError` for those of `read`, by name (the saved values, the target), that do not survive."""
    mismatch = Mismatch()
    for name, (value, target) in read.items():
        problem = None if target is None else _lost(value, target.dtype)
        if problem:
            mismatch.wrong.append(f"model/{name}: {problem}")
    mismatch.raise_if_any(file, strict=False, before=False)


def _lost(values: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with casting `values` to `dtype`; None where all of them survive."""
    back = _comparable(values.to(dtype).to(values.dtype))
    before = _comparable(values)
    lost = (back != before) & ~((back != back) & (before != before))
    if not lost.any():
        return None
    first = before[lost].reshape(-1)[0].item()
    return (
        f"expected {dtype_name(dtype)}, got {dtype_name(values.dtype)} with the value {first}, which "
        f"{dtype_name(dtype)} does not have"
    )


def _comparable(values: torch.Tensor) -> torch.Tensor:
    """`values` in a dtype that torch compares everywhere; of each two that differ, the results differ."""
    if values.dtype.is_floating_point:
        return values.to(torch.float64)
    return values if values.dtype == torch.bool else values.to(torch.int64)
