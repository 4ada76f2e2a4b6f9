"""Where two checkpoints, A and B, differ. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

What = Literal["kind", "shape", "dtype", "elements", "value"]


@dataclass(frozen=True)
class Difference:
    """A place that both checkpoints have, and where they differ."""

    key: str
    """In A, as ``ignore_keys`` writes it: ``state/model/NAME``."""
    other_key: str
    """In B."""
    what: What
    """``elements`` for tensors of one shape, ``value`` for anything that is no tensor, ``kind`` where one is none."""
    a: str
    """What A has there, as text."""
    b: str
    differing: int = 0
    """How many elements differ by more than is allowed."""
    elements: int = 0
    """How many there are."""
    max_abs: float | None = None
    """The largest difference between two numbers; None where none could be taken."""
    only_a_nan: int = 0
    """How many elements are NaN in A alone."""
    only_b_nan: int = 0
    first: tuple[int, ...] | None = None
    """The index of the first element that differs."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON types: an infinite difference is the text ``inf``."""
        finite = self.max_abs is None or self.max_abs not in (float("inf"), float("-inf"))
        return {
            "key": self.key,
            "other_key": self.other_key,
            "what": self.what,
            "a": self.a,
            "b": self.b,
            "differing": self.differing,
            "elements": self.elements,
            "max_abs": self.max_abs if finite else "inf",
            "only_a_nan": self.only_a_nan,
            "only_b_nan": self.only_b_nan,
            "first": None if self.first is None else list(self.first),
        }


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two checkpoints."""

    a: str
    """What messages call A; without secrets."""
    b: str
    kind_a: str
    kind_b: str
    only_a: tuple[str, ...] = ()
    """Places that A has and B lacks."""
    only_b: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    n_equal: int = 0
    """How many places are equal in both."""
    elements: int = 0
    """How many elements of tensors were compared."""
    keys_only: bool = False
    """Whether names, shapes and dtypes alone were compared."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Names of parameters in A to those in B, of those that match and differ."""
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether no difference was found in what was compared."""
        return not (self.only_a or self.only_b or self.differences)

    def as_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "kind_a": self.kind_a,
            "kind_b": self.kind_b,
            "keys_only": self.keys_only,
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "differences": [one.as_dict() for one in self.differences],
            "equal_keys": self.n_equal,
            "elements": self.elements,
            "renamed": self.renamed,
            "notes": list(self.notes),
        }
