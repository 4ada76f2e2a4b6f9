"""Counts where two tensors' elements differ, and by how much, a piece at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_WIDE_INTEGERS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""Unsigned dtypes that torch compares little with, each with one in which equal elements are equal."""


@dataclass(frozen=True)
class Tolerance:
    """By how much elements may differ: ``|a - b| <= atol + rtol * |b|``, as in `torch.allclose`."""

    rtol: float = 0.0
    atol: float = 0.0

    def allows(self, a: float, b: float) -> bool:
        """Whether two numbers, which are not equal, are close enough."""
        return bool(self) and abs(a - b) <= self.atol + self.rtol * abs(b)

    def __bool__(self) -> bool:
        return self.rtol > 0 or self.atol > 0


@dataclass
class Differing:
    """How two tensors differ, as far as their pieces were counted."""

    differing: int = 0
    max_abs: float | None = None
    only_a_nan: int = 0
    only_b_nan: int = 0
    first: int | None = None
    """The first element that differs, in row-major order."""

    def count(self, a: torch.Tensor, b: torch.Tensor, start: int, tolerance: Tolerance) -> None:
        """Adds the elements from `start` on: `a` and `b` are flat, of one length, and of any dtypes.

        Two NaNs are equal, and so are zeros of either sign.
        """
        if a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)):
            return
        one, other = _comparable(a, b)
        differs = one != other
        if one.is_floating_point() or one.is_complex():
            nan_a, nan_b = one.isnan(), other.isnan()
            differs &= ~(nan_a & nan_b)
            self.only_a_nan += int((nan_a & ~nan_b).sum())
            self.only_b_nan += int((nan_b & ~nan_a).sum())
        if not bool(differs.any()):
            return
        where = differs.nonzero().flatten()
        mine, theirs = _numbers(a[where]), _numbers(b[where])
        distance = (mine - theirs).abs()
        if tolerance:
            close = distance <= tolerance.atol + tolerance.rtol * theirs.abs()
            where, distance = where[~close], distance[~close]
            if not len(where):
                return
        self.differing += len(where)
        if self.first is None:
            self.first = start + int(where[0])
        known = distance[~distance.isnan()]
        if len(known):
            self.max_abs = max(self.max_abs or 0.0, float(known.max()))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _comparable(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in a dtype in which elements are equal where their numbers are."""
    if a.dtype == b.dtype and a.dtype in _WIDE_INTEGERS:
        wide = _WIDE_INTEGERS[a.dtype]
        return (a.view(wide), b.view(wide)) if wide.itemsize == a.dtype.itemsize else (a.to(wide), b.to(wide))
    if a.dtype == b.dtype and not a.dtype.is_floating_point:
        return a, b
    return _numbers(a), _numbers(b)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
