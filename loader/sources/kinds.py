"""Lists the sources, and opens a checkpoint's files by the one that they are for."""

from __future__ import annotations

from dataclasses import replace

from ..errors import FormatError
from ..saved.contents import Saved, SetFile
from ..saved.demand import Demand
from .base import Files, Source
from .dcp.open import Dcp
from .rank_shards.open import RankShards
from .sharded import Sharded
from .side_files import MARKERS, with_side_files
from .single_file import SingleFile
from .slices import Slices
from .zero.open import Zero

SOURCES: tuple[Source, ...] = (Zero(), Dcp(), Sharded(), Slices(), RankShards(), SingleFile())
"""In the order in which they are asked."""


def open_saved(files: Files, demand: Demand) -> Saved:
    """What the checkpoint holds of what `demand` asks for: by its source, and what frameworks keep beside it.

    Every rank must call. Raises as `source_of`, `Source.open` and `with_side_files`.
    """
    if not demand.weights_only:
        files.will_look_beside(MARKERS)
    saved = source_of(files).open(files, demand)
    if not saved.files:
        saved = replace(saved, files=(SetFile(files.first.name),))
    return with_side_files(files, demand, saved)


def source_of(files: Files) -> Source:
    """The first source that recognises `files`; the same on every rank. Every rank must call.

    Raises `FormatError` where none does.
    """
    for source in SOURCES:
        if source.recognises(files):
            return source
    raise FormatError(f"{files.name} is a checkpoint of no kind that is known", path=files.name)
