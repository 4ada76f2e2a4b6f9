"""Collects what does not fit between a checkpoint and a job, for one error before anything is changed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..errors import MismatchError
from .tensor import SavedTensor
from .values import kind_of

_SHOWN = 20
"""How many names of a kind a message lists; the receipt and ``MismatchError.details`` have all of them."""


@dataclass
class Mismatch:
    """Names that are missing, unexpected, or of the wrong shape, dtype or number; every check of a plan adds to it."""

    missing: list[str] = field(default_factory=list)
    """Names that the job has and the checkpoint lacks."""
    unexpected: list[str] = field(default_factory=list)
    """Names that the checkpoint has and the job lacks."""
    wrong: list[str] = field(default_factory=list)
    """``NAME: expected ..., got ...``."""

    def extend(self, other: Mismatch) -> None:
        """Adds what `other` collected."""
        self.missing.extend(other.missing)
        self.unexpected.extend(other.unexpected)
        self.wrong.extend(other.wrong)

    def raise_if_any(self, path: str, *, strict: bool) -> None:
        """Raises one `MismatchError` with everything; missing and unexpected names only where `strict`."""
        if not self.wrong and not (strict and (self.missing or self.unexpected)):
            return
        lines = [f"{path} does not fit the model and optimizer; nothing was changed."]
        lines += _listed("missing from the checkpoint", self.missing)
        lines += _listed("unexpected in the checkpoint", self.unexpected)
        lines += _listed("wrong", self.wrong)
        if not self.wrong:
            lines.append(
                "Pass strict_model_weights=False to load what fits, LoadOptions(rename={...}) to map names, or "
                "ignore_keys to leave parts out."
            )
        error = MismatchError("\n".join(lines), path=path)
        error.details = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "wrong": list(self.wrong),
        }
        raise error


def _listed(title: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    shown = [f"  {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        shown.append(f"  ... and {len(names) - _SHOWN} more")
    return [f"{title} ({len(names)}):", *shown]


def fits(
    value: Any, name: str, shape: tuple[int, ...], dtype: str, mismatch: Mismatch, cast: dict[str, str]
) -> bool:
    """Whether `value` is a saved tensor of `shape` that can be restored as `dtype`.

    `mismatch` is told where it is not, and `cast` where its dtype changes; `name` is its place in both.
    """
    if not isinstance(value, SavedTensor):
        mismatch.wrong.append(f"{name}: expected a tensor, got a {kind_of(value)}")
        return False
    if value.shape != shape:
        mismatch.wrong.append(f"{name}: expected shape {shape}, got {value.shape}")
        return False
    problem = dtype_problem(value.dtype, dtype)
    if problem:
        mismatch.wrong.append(f"{name}: {problem}")
        return False
    if value.dtype != dtype:
        cast[name] = f"{value.dtype} -> {dtype}"
    return True


def dtype_problem(source: str, target: str) -> str | None:
    """Why elements of dtype `source` cannot be restored as `target`; None where they can be.

    They are cast between dtypes of one kind only: float, complex, or integer (with bool).
    """
    if source == target or _kind(source) == _kind(target):
        return None
    return f"expected {target}, got {source}"


def _kind(dtype: str) -> str:
    if dtype.startswith(("float", "bfloat")):
        return "float"
    return "complex" if dtype.startswith("complex") else "integer"
