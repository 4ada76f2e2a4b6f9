"""Names the fp32 masters that a checkpoint keeps in the order of its optimizer's groups, without names. Pure.

DeepSpeed's stage 0 saves them so. Only the job's optimizer has the names of its parameters, and algorithms may change
the model before it is restored; so a target names the masters when it plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import LayoutError
from .contents import Saved
from .demand import Shape
from .names import match_names
from .tensor import same_shape

Groups = Sequence[Sequence[tuple[str, Shape]]]
"""For each of an optimizer's groups, the name and shape of each parameter."""


def name_masters(saved: Saved, groups: Groups, rename: Mapping[str, str] | None = None) -> Saved:
    """`saved` with its `Saved.unnamed_masters` among its ``masters``, by the names that the weights have in it.

    `groups` are the job's. They are matched by position, and their names with those of the weights after `rename`.
    Without any, or where the weights were left out, `saved` is returned as it is. Raises `LayoutError` where a group's
    size or a parameter's shape differs.
    """
    model = saved.state.get("model")
    if not saved.unnamed_masters or not groups or not isinstance(model, dict):
        return saved
    expected, got = [len(group) for group in groups], [len(group) for group in saved.unnamed_masters]
    if expected != got:
        raise LayoutError(
            f"{saved.name}: its optimizer has parameter groups of {got} parameters, this job's of {expected}. Stage "
            "0 does not keep their names, so they can only be matched by position",
            path=saved.name,
        )
    named = {}
    pairs = zip(
        (master for group in saved.unnamed_masters for master in group),
        (parameter for group in groups for parameter in group),
        strict=True,
    )
    for position, (master, (name, shape)) in enumerate(pairs):
        if not same_shape(master.shape, shape):
            raise LayoutError(
                f"{saved.name}: fp32 of the optimizer's parameter {position} has shape {master.shape}, but {name}, "
                f"which is at this position here, has {shape}. Stage 0 does not keep names: give the optimizer its "
                "parameters in the order of the job that saved",
                path=saved.name,
            )
        named[name] = master
    found = {source: named[target] for source, target in match_names(model, named, rename).target_of.items()}
    return replace(saved, masters={**saved.masters, **found})
