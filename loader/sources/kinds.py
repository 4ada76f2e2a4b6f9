"""Lists the sources, and says which of them a checkpoint's files are for."""

from __future__ import annotations

from ..errors import FormatError
from .base import Files, Source
from .sharded import Sharded
from .single_file import SingleFile
from .slices import Slices
from .zero.open import Zero

SOURCES: tuple[Source, ...] = (Zero(), Sharded(), Slices(), SingleFile())
"""In the order in which they are asked."""


def source_of(files: Files) -> Source:
    """The first source that recognises `files`; the same on every rank. Raises `FormatError` where none does."""
    for source in SOURCES:
        if source.recognises(files):
            return source
    raise FormatError(f"{files.name} is a checkpoint of no kind that is known", path=files.name)
