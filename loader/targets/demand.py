"""Says what a job without a DeepSpeed engine asks of a checkpoint: all of every tensor, but of DTensors its shards."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..errors import LayoutError
from ..saved.demand import Demand, Shape, ShardDemand
from ..saved.model_parallel import Position
from ..state import as_list, by_class_name, unwrap
from .base import RestoreOptions
from .dtensor import dtensor_box, has_dtensors, is_dtensor, shape_of
from .module import module_tensors, parameter_names


def demand_of(
    state: Any, options: RestoreOptions, rank: int, world_size: int, *, by_shards: bool = False
) -> Demand:
    """What a `State` or a foreign state demands on this rank; `by_shards`: of DTensors no more than its shards."""
    shards = _shards(getattr(state, "model", None)) if by_shards else {}
    names = module_tensors(unwrap(state.model)) if shards else ()
    return Demand(
        Position(rank, world_size),
        weights_only=options.weights_only,
        model=getattr(state, "model", None) is not None and "model" not in options.leave_out,
        optimizer="optimizers" not in options.leave_out,
        optimizers=_classes(state, "optimizers"),
        schedulers=_classes(state, "schedulers"),
        scaler=next(iter(_classes(state, "scaler")), "GradScaler"),
        layout=options.layout,
        rename=options.rename,
        shards=shards,
        others=tuple(name for name in names if name not in shards),
    )


def _shards(model: Any) -> dict[str, ShardDemand]:
    """What this rank keeps of each DTensor of the module; those that cannot be restored are left out."""
    module = unwrap(model)
    if not isinstance(module, torch.nn.Module) or not has_dtensors(module):
        return {}
    found = {}
    for name, tensor in module_tensors(module).items():
        if tensor is not None and is_dtensor(tensor):
            with contextlib.suppress(LayoutError):  # the plan says so
                found[name] = ShardDemand(tuple(tensor.shape), dtensor_box(tensor, name))
    return found


def _classes(state: Any, part: str) -> tuple[str, ...]:
    """Class names of a part's objects, in order."""
    return tuple(by_class_name(as_list(getattr(state, part, None))))


def optimizer_groups(state: Any) -> tuple[tuple[tuple[str, Shape], ...], ...]:
    """Name and shape of each parameter of each group of the first optimizer; () where there is none."""
    first = next(iter(as_list(getattr(state, "optimizers", None))), None)
    groups = getattr(first, "param_groups", ())
    model = unwrap(getattr(state, "model", None))
    if not groups or not isinstance(model, torch.nn.Module):
        return ()
    names = parameter_names(model)
    return tuple(
        tuple((names.get(id(one), "(unnamed)"), shape_of(one) or ()) for one in group["params"])
        for group in groups
    )
