"""Whose files a rank reads: worked out from the layout alone, before the files are fetched. Pure.

Nothing is listed. At stage 3 rank 0's model file tells where every element lies. At stages 1 and 2 it lacks one
thing, the alignment paddings, which any optimizer file tells; so each rank reads one first, the one that it most
likely needs anyhow (`likeliest`), and then works out the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import LayoutError
from ...saved.intervals import CoverageError, Piece, intersect
from .file_names import Needed
from .layout import FROZEN_GROUP, ZeroCheckpoint


def likeliest(rank: int, world_size: int, saved_world_size: int) -> int:
    """The saved rank that had what comes first in `rank`'s share: where both cut the same row, and equally."""
    return min(rank * saved_world_size // world_size, saved_world_size - 1)


def own_files(
    rank: int, world_size: int, saved_world_size: int, *, partitioned: bool, with_optimizer: bool
) -> Needed:
    """What `rank` reads in any case.

    Rank 0's model file; at stage 3 also its own, for buffers and client_state, where as many ranks saved; ranks
    beyond those take rank 0's. And one optimizer file (`likeliest`), where the optimizer's are needed at all.
    """
    one = likeliest(rank, world_size, saved_world_size)
    models = {0, one, *((rank,) if rank < saved_world_size else ())} if partitioned else {0}
    return Needed(frozenset(models), frozenset({one} if with_optimizer else ()))


def all_files(saved_world_size: int, *, partitioned: bool, with_optimizer: bool) -> Needed:
    """Every saved rank's: for a target whose own layout is not known before it is filled."""
    ranks = frozenset(range(saved_world_size))
    return Needed(ranks if partitioned else frozenset({0}), ranks if with_optimizer else frozenset())


def files_of_slots(checkpoint: ZeroCheckpoint, wanted: Mapping[str, Iterable[Piece]]) -> Needed:
    """The saved ranks that hold any element of `wanted`: parameters of the checkpoint to slots of this rank.

    Slots may overlap (the same elements may go to more than one place). Parameters that are whole in the model file
    need nothing more. Raises `LayoutError` for elements that no saved rank has.
    """
    models: set[int] = set()
    optims: set[int] = set()
    for name, slots in wanted.items():
        parameter = checkpoint.find(name)
        if parameter is None or checkpoint.stage == 0 or (parameter.frozen and not checkpoint.partitioned):
            continue
        try:
            pieces = checkpoint.pieces(name)
            copies = [copy for slot in slots for copy in intersect(pieces, [slot])]
        except CoverageError as error:
            raise LayoutError(f"{name}: {error}") from error
        for copy in copies:
            (models if copy.source.group == FROZEN_GROUP else optims).add(copy.source.rank)
    return Needed(frozenset(models), frozenset(optims))
