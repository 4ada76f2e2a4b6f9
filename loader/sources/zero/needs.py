"""Works out which saved ranks' files a rank reads, from layout and demand alone and before they are fetched. Pure.

At stage 3 rank 0's model file is enough to know where every element lies. At stages 1 and 2 it lacks the alignment
paddings, which every optimizer file holds. So a rank first reads one optimizer file, the one that it most likely needs
anyway (`likeliest`, in `own_files`), and then works out the others (`wanted_runs`, `files_of_runs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ...errors import LayoutError
from ...saved.demand import Demand
from ...saved.names import match_names
from ...saved.regions import CoverageError, Run
from ...saved.tensor import SavedTensor, same_shape
from .file_names import Needed
from .layout import FROZEN_GROUP, ZeroCheckpoint
from .model_states import ModelStates


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


def wanted_runs(demand: Demand, checkpoint: ZeroCheckpoint, model: ModelStates) -> dict[str, list[Run]]:
    """The elements of each saved parameter that this rank restores from the saved ranks' partitions.

    Those are what the optimizer updates here; where the module's weights do not come whole from the model file as they
    are, also what the module computes with. `model` is rank 0's model file; parameters that only the optimizer's files
    have count as well. Parameters that do not fit are left out here, and reported by the target's plan.
    """
    in_no_layer = (
        name for name, one in checkpoint.parameters.items() if name not in model.module and not one.frozen
    )
    match = match_names([*model.module, *in_no_layer], demand.names, demand.rename)
    wanted: dict[str, list[Run]] = {}
    asked_of, aliases = demand.parameters or {}, demand.aliases
    partitioned, module = checkpoint.partitioned, model.module
    for saved_name, name in match.target_of.items():
        asked = asked_of.get(aliases.get(name, name))
        parameter = checkpoint.find(saved_name)
        if parameter is None or asked is None:
            continue
        if parameter.shape != asked.shape and not same_shape(parameter.shape, asked.shape):
            continue
        runs = wanted.setdefault(parameter.name, [])
        runs += asked.updated
        saved = module.get(saved_name)
        # A module of another dtype than saved gets its weights cast from the fp32 masters.
        whole = isinstance(saved, SavedTensor) and saved.dtype == asked.dtype
        if partitioned or not whole:
            runs += asked.computed
    return wanted


def files_of_runs(checkpoint: ZeroCheckpoint, wanted: Mapping[str, Iterable[Run]]) -> Needed:
    """The files of the saved ranks that hold any element of `wanted`.

    `wanted` maps parameters of the checkpoint to what this rank keeps of them. Runs may overlap, since the same
    elements may go to more than one place. Parameters that are whole in the model file need no further file. Raises
    `LayoutError` for elements that no saved rank has.
    """
    models: set[int] = set()
    optims: set[int] = set()
    # A group, and where the partition that was found last begins and ends in its row: the next run is mostly there too.
    near = (FROZEN_GROUP, 0, 0)
    for name, runs in wanted.items():
        parameter = checkpoint.find(name)
        if parameter is None or checkpoint.stage == 0 or (parameter.frozen and not checkpoint.partitioned):
            continue
        group, begin, numel = parameter.group, parameter.offset, parameter.numel
        try:
            for run in runs:
                start, stop = begin + run.start, begin + run.stop
                if group == near[0] and near[1] <= start and stop <= near[2] and run.stop <= numel:
                    continue
                holders = checkpoint.holders(name, run)
                (models if parameter.frozen else optims).update(holders)
                if len(holders) == 1 and not checkpoint.partitioned:
                    size = checkpoint.partition_numel[group]
                    low = start // size * size
                    near = group, low, low + size
        except CoverageError as error:
            raise LayoutError(f"{name}: {error}") from error
    return Needed(frozenset(models), frozenset(optims))
