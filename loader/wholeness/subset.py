"""Chooses which bytes of a checkpoint are compared: a random share or amount, or the n-th of t parts. Pure.

What is chosen is whole units, each with a checksum of its own. So a subset has at least the bytes that were asked for,
and the parts of a checkpoint with few large tensors differ in size; together the parts are all units, each once.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError
from ..options import parse_size

_PART = re.compile(r"(\d{1,6})\s*/\s*(\d{1,6})")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Subset:
    """Which bytes are compared. One of the fields is set."""

    text: str
    """As it was asked for."""
    share: float | None = None
    """Of all bytes, above 0 and up to 1."""
    nbytes: int | None = None
    part: tuple[int, int] | None = None
    """``(n, t)``: the n-th of t parts; n counts from 1."""

    @property
    def is_random(self) -> bool:
        return self.part is None


def parse_subset(text: str) -> Subset:
    """What ``5%``, ``3/7`` or ``10GB`` stands for. Raises `OptionError` for anything else."""
    plain = text.strip()
    if (found := _PART.fullmatch(plain)) is not None:
        n, t = int(found[1]), int(found[2])
        if not 1 <= n <= t:
            raise OptionError(f"subset {text!r}: expected n/t with n from 1 to t, such as 1/7")
        return Subset(plain, part=(n, t))
    if (found := _SHARE.fullmatch(plain)) is not None:
        share = float(found[1]) / 100
        if not 0 < share <= 1:
            raise OptionError(f"subset {text!r}: expected a share above 0 % and up to 100 %")
        return Subset(plain, share=share)
    if "%" in plain or "/" in plain:
        raise OptionError(f"subset {text!r}: expected a share (5%), a part (1/7) or a size (10GB)")
    size = parse_size("subset", plain)
    if size <= 0:
        raise OptionError(f"subset {text!r}: expected more than 0 bytes")
    return Subset(plain, nbytes=size)


def choose(sizes: Sequence[int], subset: Subset, seed: int) -> list[int]:
    """The positions, in order, of the units that `subset` has of those with these `sizes`, which are in a fixed order.

    `seed` is that of a random subset: the same one gives the same units.
    """
    total = sum(sizes)
    if subset.part is not None:
        return _part_of(sizes, *subset.part)
    wanted = subset.nbytes if subset.nbytes is not None else (subset.share or 0.0) * total
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)  # noqa: S311 - nobody guards a secret by it
    chosen: list[int] = []
    have = 0
    for position in order:
        if have >= wanted:
            break
        chosen.append(position)
        have += sizes[position]
    return sorted(chosen)


def _part_of(sizes: Sequence[int], n: int, t: int) -> list[int]:
    """Each unit is of the part that its middle falls into, so that a part's units are neighbours."""
    total = sum(sizes)
    found: list[int] = []
    begun = 0
    for position, size in enumerate(sizes):
        # Twice the middle, in whole numbers: parts must not depend on how a machine rounds.
        part = min(t - 1, (2 * begun + size) * t // (2 * total)) if total else 0
        if part == n - 1:
            found.append(position)
        begun += size
    return found
