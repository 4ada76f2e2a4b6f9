"""Puts tensors that are made as a whole into live ones: sparse and quantized tensors, conjugated and negated views.

Their bytes cannot be read into place, as those of an ordinary tensor can. `layout_problem` says beforehand whether a
saved tensor can be copied into a live one; `set_whole` copies it, once it was made real.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..saved.values import InertShard, InertTensor
from .dtensor import is_dtensor, unfillable

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def layout_problem(value: Any, target: torch.Tensor) -> str | None:
    """Why the saved `value` cannot be copied into `target`, or None. What is no tensor is for others to tell.

    Torch copies between sparse tensors of one layout, and between quantized ones of one scheme, but not between such
    and ordinary ones. Shapes and dtypes are not compared here.
    """
    saved = "strided"
    if isinstance(value, InertTensor):
        if isinstance(value, InertShard):
            return (
                f"expected a tensor, got a {value.kind}; pass a path with {{rank}} that names the files of all ranks, "
                "save it as an ordinary tensor (its full_tensor()), or leave it out with ignore_keys"
            )
        if not value.known:
            return (
                f"expected a tensor, got a {value.kind}, which is not restored; save it as an ordinary tensor, or "
                "leave it out with ignore_keys"
            )
        if is_dtensor(target):
            return f"expected a tensor that can be spread over ranks, got a {value.kind}"
        saved = value.layout
    own = str(target.qscheme() if target.is_quantized else target.layout).removeprefix("torch.")
    if saved != own:
        return f"expected {_described(own)}, got {_described(saved)}"
    return unfillable(target, whole=own != "strided")


def set_whole(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copies all of `value` into `target`, of the same layout and number of elements, which stays the same object."""
    # What was made under inference_mode can only be changed there.
    with torch.no_grad(), torch.inference_mode() if target.is_inference() else contextlib.nullcontext():
        if target.layout in _COMPRESSED:
            # Torch copies these only where both have as many elements.
            target.resize_as_sparse_(value)
        target.copy_(value if target.shape == value.shape else value.reshape(target.shape))


def _described(layout: str) -> str:
    if layout == "strided":
        return "an ordinary tensor"
    return f"a quantized tensor ({layout})" if layout.startswith("per_") else f"a tensor of layout {layout}"
