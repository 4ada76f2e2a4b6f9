"""Loads once more where an index may have come damaged: no checksum proves it by itself, as a zip's CRC-32 does.

A safetensors file's header and a DCP folder's ``.metadata`` are such. One bit that flipped on the way makes a name or a
shape another one, and then the checkpoint does not fit the model, or all of a file differs from its manifest's checksum
when all of it was fetched. `errors.UNPROVED` marks such an error, where the file is from a store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from .errors import UNPROVED, PartialRestoreError, RankloadError
from .request import LoadRequest

T = TypeVar("T")
RENEWED = "the checkpoint's index came damaged, or did not fit, when it first came: it was fetched again"
"""A note of the receipt."""


def with_right_indexes(request: LoadRequest, load: Callable[[LoadRequest], T]) -> T:
    """What `load` makes of `request`; where an index may have come damaged, once these were fetched again.

    Every rank must call: all raise the same error, so that all load again. Raises as `load` the second time, which
    finds the same where everything had come right; a `PartialRestoreError` of the first stays one.
    """
    try:
        return load(request)
    except RankloadError as error:
        if not error.details.get(UNPROVED):
            raise
        first = error
    try:
        return load(replace(request, renew_indexes=True))
    except RankloadError as second:
        if isinstance(first, PartialRestoreError) and not isinstance(second, PartialRestoreError):
            raise first from second
        raise
