"""Collects what does not fit between a checkpoint and a job, for one error before anything is changed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...distributed.printable import Lines
from ..errors import MismatchError, MissingFrozenError
from ..plurals import counted
from .dtypes import dtype_kind, keeps_values
from .tensor import SavedTensor, same_shape
from .values import InertTensor, can_be_restored, kind_of

_OTHER_SIZES = (
    "Build the model with the sizes that were saved, or load the other weights alone: load_weights_only=True, and "
    "ignore_keys=['state/model/NAME'] with each of these names."
)
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
    frozen: list[str] = field(default_factory=list)
    """Those of `missing` that are parameters which this job does not train."""
    advice: list[str] = field(default_factory=list)
    """Sentences on what makes names fit, each of them tried."""
    weights_alone: bool = False
    """Whether the checkpoint has a model's weights and nothing else."""

    def extend(self, other: Mismatch) -> None:
        """Adds what `other` collected."""
        self.missing.extend(other.missing)
        self.unexpected.extend(other.unexpected)
        self.wrong.extend(other.wrong)
        self.frozen.extend(other.frozen)
        self.advice.extend(one for one in other.advice if one not in self.advice)
        self.weights_alone |= other.weights_alone

    def _advice(self) -> str:
        """What can help against missing and unexpected names."""
        lacks_objects = not all(map(_is_entry, self.missing))
        ways = ["strict_model_weights=False to load what fits"]
        if lacks_objects and self.weights_alone:
            ways.insert(0, "load_weights_only=True, as the checkpoint has weights alone")
        if any(map(_is_entry, (*self.missing, *self.unexpected))):
            ways.append("LoadOptions(rename={...}) to map names")
        if self.unexpected:
            ways.append("ignore_keys to leave parts of the checkpoint out")
        if lacks_objects:
            ways.append(
                "a State without the objects that the checkpoint lacks, or LoadOptions(leave_out=...) with their part"
            )
        return f"Pass {', '.join(ways[:-1])}, or {ways[-1]}." if ways[1:] else f"Pass {ways[0]}."

    def raise_if_any(
        self, path: str, *, strict: bool, allow_missing_frozen: bool = False, before: bool = True
    ) -> None:
        """Raises one `MismatchError` with everything; missing and unexpected names only where `strict`.

        With `before` it says that nothing was changed: so it is until the restore begins.

        With `allow_missing_frozen`, missing names in `frozen` are none. Where nothing but those does not fit, the error
        is a `MissingFrozenError`.
        """
        frozen = set(self.frozen)
        needed = [name for name in self.missing if name not in frozen]
        missing = needed if allow_missing_frozen else self.missing
        if not self.wrong and not (strict and (missing or self.unexpected)):
            return
        details = {"missing": list(missing), "unexpected": list(self.unexpected), "wrong": list(self.wrong)}
        if not (needed or self.unexpected or self.wrong):
            raise _missing_frozen(path, details, before=before)
        lines = [f"{path} does not fit the model and optimizer{'; nothing was changed' * before}."]
        lines += _listed("missing from the checkpoint", missing)
        lines += _listed("unexpected in the checkpoint", self.unexpected)
        lines += _listed("wrong", self.wrong)
        lines += self.advice
        if any(name.startswith("model/") and ": expected shape" in name for name in self.wrong):
            lines.append(_OTHER_SIZES)
        if not self.wrong and not self.advice:
            lines.append(self._advice())
        error = MismatchError(Lines(lines), path=path)
        error.details = details
        raise error


def _is_entry(name: str) -> bool:
    """Whether `name` is that of a weight or of its optimizer state, rather than of a whole object."""
    return name.startswith("model") or name.partition(":")[0].count("/") > 1


def _missing_frozen(path: str, details: Mapping[str, list[str]], *, before: bool) -> MissingFrozenError:
    missing = details["missing"]
    error = MissingFrozenError(
        Lines(
            [
                f"{path} has every trained weight of the model and lacks "
                f"{counted(len(missing), 'frozen parameter')} (requires_grad=False){'; nothing was changed' * before}.",
                *_listed("missing from the checkpoint, and frozen here", missing),
                "It was saved without them, as adapters are, or with exclude_frozen_parameters. Load the base model's "
                "weights first, then this checkpoint with LoadOptions(allow_missing_frozen=True): frozen parameters "
                "that it lacks keep their values, and any other missing name stays an error.",
            ]
        ),
        path=path,
    )
    error.details = dict(details)
    return error


def _listed(title: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    shown = [f"  {name}" for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        shown.append(f"  ... and {len(names) - _SHOWN} more")
    return [f"{title} ({len(names)}):", *shown]


def fits(
    value: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    mismatch: Mismatch,
    cast: dict[str, str],
    *,
    buffer: bool = False,
    made: bool = False,
) -> bool:
    """Whether `value` is a saved tensor of `shape` that can be restored as `dtype`.

    A tensor of shape (1,) fits a number, and a number a tensor of shape (1,): the caller restores `of_one_element`.
    `buffer` says that it is a buffer, no parameter: see `dtype_problem`; `made`, that the caller restores tensors that
    are made as a whole (`InertTensor`) too. `mismatch` is told where it does not fit, and `cast` where its dtype
    changes; `name` is its place in both.
    """
    if not (can_be_restored(value) if made else isinstance(value, SavedTensor)):
        expected = "an ordinary tensor" if isinstance(value, InertTensor) else "a tensor"
        mismatch.wrong.append(f"{name}: expected {expected}, got a {kind_of(value)}")
        return False
    if not same_shape(value.shape, shape):
        mismatch.wrong.append(f"{name}: expected shape {shape}, got {value.shape}")
        return False
    problem = dtype_problem(value.dtype, dtype, buffer=buffer)
    if problem:
        mismatch.wrong.append(f"{name}: {problem}")
        return False
    if value.dtype != dtype:
        cast[name] = f"{value.dtype} -> {dtype}"
    return True


def dtype_problem(source: str, target: str, *, buffer: bool = False) -> str | None:
    """Why elements of dtype `source` cannot be restored as `target`; None where they can be, as far as dtypes tell.

    A parameter is cast between floats, between complex numbers, and from an integer to one that has all its values. A
    buffer (a mask, a table of positions) is cast to any real dtype, if each of its values survives that: where
    `keeps_values` does not say so, the values do.
    """
    real = ("float", "integer")
    if buffer and dtype_kind(source) in real and dtype_kind(target) in real:
        return None
    same_kind = dtype_kind(source) == dtype_kind(target)
    if source == target or (same_kind and keeps_values(source, target)):
        return None
    return f"expected {target}, got {source}"
