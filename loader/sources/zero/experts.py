"""Finds the files and saved ranks that hold one rank's experts, in a mixture of experts that DeepSpeed saved. Pure.

At stages 0 to 2, with E experts in a layer and expert-parallel size ep, a rank has E / ep of them, and names them from
0 on; so the same name stands for other experts on other ranks. Expert-parallel rank r has experts
[r * E / ep, (r + 1) * E / ep). DeepSpeed saves them so:

* Weights: one file for each layer and expert. The file's name and the parameters' names in it have the expert's number
  over all ranks. The model file has the rest.
* ``param_shapes`` is rank 0's and names rank 0's experts. All ranks have groups of the same shapes and names.
* Optimizer, stages 1 and 2: a group of experts is cut like any other, but over the N / ep ranks that have the same
  experts: r, r + ep, r + 2 ep ..., or, with ``use_data_before_expert_parallelism``, N / ep neighbours
  (``_get_expert_parallel_ranks`` in DeepSpeed's ``utils/groups.py``). ``partition_count`` is N / ep for each group.
* Optimizer, stage 0: one file for each rank of the widest expert group. The one in the model file is rank 0's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import CorruptError, LayoutError
from ...plurals import counted
from ...saved.model_parallel import EXPERTS, ExpertLayer, describe_layers
from ...saved.tensor import SavedTensor
from .fields import Field, a_mapping, a_name
from .file_names import expert_file, expert_optim_file
from .model_states import ModelStates
from .optim_states import OptimStates

ExpertFiles = Mapping[str, tuple[Any, str]]
"""Names of files to (tree, what messages call the file)."""


def expert_files(layer: ExpertLayer) -> tuple[str, ...]:
    """Names, relative to the tag folder, of the files with this rank's experts of `layer`."""
    return tuple(expert_file(layer.index, expert) for expert in layer.experts)


def optimizer_file(layers: Sequence[ExpertLayer]) -> str:
    """The name of stage 0's optimizer file for this rank."""
    return expert_optim_file(max(layers, key=lambda layer: layer.ep_size).ep_rank)


def check_experts(model: ModelStates, layers: Sequence[ExpertLayer], *, weights_only: bool = False) -> None:
    """Raises `LayoutError` where the checkpoint's MoE layers have other experts than this job's `layers`.

    At stage 0 also where the saved expert-parallel size is another; at stages 1 and 2 only the optimizer's files show
    it, and `group_ranks` compares it. With `weights_only` it does not matter.
    """
    saved, here = list(model.num_experts), [layer.num_experts for layer in layers]
    if saved != here:
        raise LayoutError(
            f"{model.file} was saved by {_described_counts(saved)}, and this job has {_described_counts(here)}"
            + (f" ({describe_layers(layers)})" if layers else "")
            + ": experts are restored where their number is the same, into a DeepSpeed engine with the same MoE layers",
            path=model.file,
        )
    names = set() if weights_only else _expert_groups(model.optimizer)
    wanted = {f"ep_size_{layer.ep_size}" for layer in layers}
    if names and names != wanted:
        raise LayoutError(
            f"{model.file}: its experts were saved in groups of {', '.join(sorted(names))}, and this job has "
            f"{', '.join(sorted(wanted))} ({describe_layers(layers)}): restore with the ep_size that saved",
            path=model.file,
        )


def _expert_groups(optimizer: Any) -> set[str]:
    """Names of the groups of experts in stage 0's optimizer; DeepSpeed names them after their ep_size."""
    inner = optimizer.get("optimizer_state_dict", optimizer) if isinstance(optimizer, Mapping) else {}
    groups = inner.get("param_groups") if isinstance(inner, Mapping) else None
    return {
        group["name"]
        for group in (groups if isinstance(groups, list) else ())
        if isinstance(group, Mapping) and group.get("moe") is True and isinstance(group.get("name"), str)
    }


def _described_counts(counts: Sequence[int]) -> str:
    if not counts:
        return "a module without MoE layers"
    of = ", ".join(map(str, counts[:16])) + (", ..." if len(counts) > 16 else "")
    return f"{counted(len(counts), 'MoE layer')} of {of} experts"


def with_experts(model: ModelStates, layers: Sequence[ExpertLayer], files: ExpertFiles) -> ModelStates:
    """Rank 0's model file with this rank's experts added to its module, under the names that they have on this rank.

    `files` are the `expert_files` of all `layers`, and, where stage 0's optimizer is wanted, `optimizer_file`.
    Raises `CorruptError` where a file holds another expert's parameters, or tensors of other shapes.
    """
    module = dict(model.module)
    experts: dict[str, ExpertLayer] = {}
    shapes = {name: shape for group in model.param_shapes or () for name, shape in group.items()}
    for layer in layers:
        for local, expert in enumerate(layer.experts):
            tree, shown = files[expert_file(layer.index, expert)]
            place = Field(shown)
            for key, value in a_mapping(tree, place).items():
                prefix, name = _localised(a_name(key, place), expert, local, place)
                if experts.setdefault(prefix, layer) is not layer or name in module:
                    raise place.wrong(f"what no other file holds, beside {name}", key)
                if name in shapes and not (isinstance(value, SavedTensor) and value.shape == shapes[name]):
                    raise place.at(key).wrong(
                        f"a tensor of shape {shapes[name]}, as param_shapes tells", value
                    )
                module[name] = value
    changed = replace(model, module=module, experts=experts)
    if optimizer_file(layers) in files:
        tree, shown = files[optimizer_file(layers)]
        optimizer = a_mapping(tree, Field(shown)).get("optimizer")
        changed = replace(changed, optimizer=optimizer, optimizer_file=shown)
    return changed


def _localised(key: str, expert: int, local: int, place: Field) -> tuple[str, str]:
    """The layer's name, and the parameter's with the number `local` that the expert has on this rank."""
    layer, found, rest = key.partition(EXPERTS)
    number, dot, tail = rest.partition(".")
    if not found or not dot or number != str(expert):
        raise place.wrong(f"parameters of expert {expert} alone", key)
    return layer, f"{layer}{EXPERTS}{local}.{tail}"


def group_ranks(model: ModelStates, optim: OptimStates) -> tuple[tuple[int, ...], ...]:
    """Stages 1, 2: for each parameter group, the saved ranks over which it is cut, in order.

    Of a group of experts, those are the saved ranks that had this rank's experts. () without experts: every group is
    cut over all ranks.

    Raises `LayoutError` where experts were spread over another number of ranks than here, or groups are cut over a
    number of ranks that experts cannot have, and `CorruptError` where an expert's file lacks a parameter.
    """
    world_size = model.world_size
    groups = model.param_shapes or ()
    counts = optim.partition_count or (world_size,) * len(groups)
    if not model.experts:
        if any(count != world_size for count in counts):
            raise _uneven(optim, counts, world_size)
        return ()
    locals_of = _locals_of(name for shapes in groups for name in shapes)
    found: list[tuple[int, ...]] = []
    apart: dict[str, tuple[ExpertLayer, int]] = {}
    for shapes, count in zip(groups, counts, strict=True):
        if count < 1 or world_size % count:
            raise _uneven(optim, counts, world_size)
        ep_size = world_size // count
        layers = {name.partition(EXPERTS)[0] for name in shapes if EXPERTS in name}
        if not layers and ep_size == 1:
            found.append(tuple(range(world_size)))
            continue
        if not layers or any(EXPERTS not in name for name in shapes) or not layers <= model.experts.keys():
            raise _uneven(optim, counts, world_size)
        here = {name: model.experts[name] for name in sorted(layers)}
        for name, layer in here.items():
            # There may be fewer: frozen experts are in no group. In a wrong order some layer has more.
            if len(locals_of[name]) * ep_size > layer.num_experts:
                raise LayoutError(
                    f"{optim.file}: {name} has {layer.num_experts} experts, of which rank 0 had "
                    f"{len(locals_of[name])}, in a group that is cut over {count} of {world_size} ranks here: its "
                    "groups of experts are in another order than rank 0's. DeepSpeed leaves the order of several "
                    "ep_size in one module to chance, unless all ranks have the same PYTHONHASHSEED",
                    path=optim.file,
                )
        apart.update({name: (layer, ep_size) for name, layer in here.items() if layer.ep_size != ep_size})
        one = next(iter(here.values()))
        found.append(expert_ranks(world_size, ep_size, one.ep_rank % ep_size, model.data_before_experts))
    if apart:
        each = [
            f"{name}: {layer.num_experts} experts, ep_size {saved} saved and {layer.ep_size} here"
            for name, (layer, saved) in sorted(apart.items())
        ]
        more = f"; and {counted(len(each) - 4, 'more layer')}" if len(each) > 4 else ""
        raise LayoutError(
            f"{optim.file}: experts are restored at the expert-parallel size that saved them ({'; '.join(each[:4])}"
            f"{more}); at another one their weights alone can be, with load_weights_only",
            path=optim.file,
        )
    lost = sorted(
        name for shapes in groups for name in shapes if EXPERTS in name and name not in model.module
    )
    if lost:
        raise CorruptError(
            f"{model.file} tells of the expert's parameter {lost[0]}, which no expert's file holds",
            path=model.file,
        )
    return tuple(found)


def _locals_of(names: Iterable[str]) -> dict[str, set[str]]:
    """MoE layers to the numbers of their experts on rank 0, taken from the parameters' names."""
    found: dict[str, set[str]] = {}
    for name in names:
        layer, experts, rest = name.partition(EXPERTS)
        if experts:
            found.setdefault(layer, set()).add(rest.partition(".")[0])
    return found


def _uneven(optim: OptimStates, counts: Sequence[int], world_size: int) -> LayoutError:
    return LayoutError(
        f"{optim.file}: its groups are partitioned over {list(counts)} ranks, and {world_size} saved it; only a "
        "group of experts may be over fewer, of the model file's MoE layers and of a size that divides them",
        path=optim.file,
    )


def expert_ranks(world_size: int, ep_size: int, ep_rank: int, data_first: bool) -> tuple[int, ...]:
    """The ranks that have the experts of expert-parallel rank `ep_rank`; `ep_size` divides `world_size`."""
    if data_first:
        share = world_size // ep_size
        return tuple(range(ep_rank * share, (ep_rank + 1) * share))
    return tuple(range(ep_rank, world_size, ep_size))
