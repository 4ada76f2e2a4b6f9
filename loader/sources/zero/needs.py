"""Works out which saved ranks' files a rank reads, from the layout alone and before they are fetched. Pure.

At stage 3 rank 0's model file is enough to know where every element lies. At stages 1 and 2 it lacks the alignment
paddings, which every optimizer file holds. So a rank first reads one optimizer file, the one that it most likely needs
anyway (`likeliest`, in `own_files`), and then works out the others (`files_of_slots`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import LayoutError
from ...saved.intervals import CoverageError, Piece, intersect
from .file_names import Needed
from .layout import FROZEN_GROUP, ZeroCheckpoint


def likeliest(rank: int, world_size: int, saved_world_size: int) -> int:
    """The saved rank that had the first elements of `rank`'s partition, if both jobs cut the same elements evenly."""
    return min(rank * saved_world_size // world_size, saved_world_size - 1)


def own_files(
    rank: int, world_size: int, saved_world_size: int, *, partitioned: bool, with_optimizer: bool
) -> Needed:
    """The files that `rank`, of a data-parallel group of `world_size`, reads in any case.

    The model file of saved rank 0; at stage 3 (`partitioned`) also that of `likeliest` and that of `rank` itself, for
    buffers and client_state (a rank beyond the saved ones takes rank 0's). With `with_optimizer`, the optimizer file of
    `likeliest`.
    """
    one = likeliest(rank, world_size, saved_world_size)
    models = {0, one, *((rank,) if rank < saved_world_size else ())} if partitioned else {0}
    return Needed(frozenset(models), frozenset({one} if with_optimizer else ()))


def all_files(saved_world_size: int, *, partitioned: bool, with_optimizer: bool) -> Needed:
    """The files of all saved ranks, for a target whose layout is not known before it is filled."""
    ranks = frozenset(range(saved_world_size))
    return Needed(ranks if partitioned else frozenset({0}), ranks if with_optimizer else frozenset())


def files_of_slots(checkpoint: ZeroCheckpoint, wanted: Mapping[str, Iterable[Piece]]) -> Needed:
    """The files of the saved ranks that hold any element of `wanted`.

    `wanted` maps parameters of the checkpoint to the slots that this rank keeps of them. Slots may overlap, since the
    same elements may go to more than one place. Parameters that are whole in the model file need no further file.
    Raises `LayoutError` for elements that no saved rank has.
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
