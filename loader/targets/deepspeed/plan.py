"""Plans what a DeepSpeed engine's weights, buffers and fp32 masters are filled from: all is checked, nothing changed.

Parameters are matched by name; the rest is arithmetic between the saved pieces and the engine's slots (`copies_into`),
so any two layouts fit as long as the files that it leads to were read. Words are those of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...saved.contents import Saved
from ...saved.copies import Copy, copies_into
from ...saved.dtypes import keeps_values
from ...saved.mismatch import Mismatch, fits
from ...saved.names import match_names
from ...saved.partitions import Slot
from ...saved.tensor import SavedTensor, of_one_element
from ..buffers import check_saved
from ..dtensor import dtype_name, unfillable
from ..module import rename_advice
from .live import LiveEngine, Memories, laid, memory_of
from .parameter_sources import choose_sources


@dataclass(frozen=True)
class ParameterPart:
    """What one parameter's weights and masters are filled from on this rank."""

    low: tuple[Copy, ...] = ()
    """Into the weights that the module computes with."""
    masters: tuple[Copy, ...] = ()
    low_from_master: tuple[tuple[int, Slot], ...] = ()
    """Stage 3: (index of the flat, slot in it) of shares that are cast from this rank's own masters."""
    master_from_low: tuple[tuple[int, Slot], ...] = ()
    """(index of the flat, slot in it) of masters that are cast from the module's weights."""
    source: SavedTensor | None = None
    """What all of the weights are filled from, where this rank computes with all of them and they lie in a row."""
    from_saved_masters: bool = False
    """Whether saved masters fill the masters."""
    low_is_master: bool = False
    """Whether ``source`` is a saved master."""

    @property
    def restored(self) -> bool:
        """Whether weights change."""
        return bool(self.low or self.low_from_master)


@dataclass(frozen=True)
class ModelPart:
    """What a module's state and the masters of its parameters are filled from; by the engine's names."""

    parameters: Mapping[str, ParameterPart] = field(default_factory=dict)
    buffers: Mapping[str, tuple[Copy, ...]] = field(default_factory=dict)
    extra_state: Mapping[str, Any] = field(default_factory=dict)
    """Saved values."""
    unchecked: Mapping[str, tuple[SavedTensor, torch.Tensor]] = field(default_factory=dict)
    """Buffers whose values must survive a cast and could not be read yet, as saved and the engine's."""
    saved_names: Mapping[str, str] = field(default_factory=dict)
    """Every parameter's name in the checkpoint, where it has the parameter."""
    found: bool = True
    """Whether the checkpoint has a model."""
    mismatch: Mismatch = field(default_factory=Mismatch)
    renamed: Mapping[str, str] = field(default_factory=dict)
    cast: Mapping[str, str] = field(default_factory=dict)
    """``model/NAME`` to ``source dtype -> target dtype``."""

    @property
    def restores(self) -> bool:
        """Whether anything of the module or the masters changes."""
        return bool(
            self.buffers
            or self.extra_state
            or any(part.restored or part.masters for part in self.parameters.values())
        )


def plan_model(
    live: LiveEngine,
    saved: Saved,
    rename: Mapping[str, str],
    readable: Callable[[SavedTensor], bool] = lambda tensor: True,
) -> ModelPart:
    """Plans weights, buffers, extra state and masters; names are matched as the checkpoint has them.

    `readable` says of a saved tensor whether it can be read now: a buffer of another kind is, to see whether its values
    survive.

    Raises `LayoutError` where elements are wanted that lie in files that were not read.
    """
    whole = saved.whole.state.get("model")
    if not isinstance(whole, Mapping):
        return ModelPart(found=False, mismatch=Mismatch(missing=["model: the checkpoint has no weights"]))
    kept = saved.state.get("model")
    wanted = frozenset(kept) if isinstance(kept, Mapping) else frozenset()
    match = match_names(whole, live.names, rename)
    saved_name = {new: old for old, new in match.target_of.items()}
    first_of = {name: live.aliases.get(name, name) for name in live.names}
    matched = {first_of[name] for name in saved_name}
    mismatch = Mismatch(
        missing=[f"model/{name}" for name in match.missing if first_of[name] not in matched],
        unexpected=[
            f"model/{name}"
            for name in match.unexpected
            if name in wanted and not _tied(saved, name).intersection(match.target_of)
        ],
    )
    _explain(live, whole, rename, mismatch)
    # The first name of tied parameters comes before the others in `LiveEngine.names`, and counts before them.
    saved_names: dict[str, list[str]] = {}
    for name, first in first_of.items():
        if name in saved_name:
            saved_names.setdefault(first, []).append(saved_name[name])
    cast: dict[str, str] = {}
    memories = Memories()
    parameters: dict[str, ParameterPart] = {}
    for name in live.shapes:
        left = [one for one in saved_names.get(name, ()) if one in wanted]
        if left:
            value, master = whole[left[0]], saved.masters.get(left[0])
            problem = next((found for low in live.low[name] if (found := unfillable(low.flat))), None)
            if problem:
                mismatch.wrong.append(f"model/{name}: {problem}")
            elif fits(
                value,
                f"model/{name}",
                live.shapes[name],
                live.dtypes[name],
                mismatch,
                {} if value is master else cast,
            ):
                parameters[name] = _plan_parameter(live, name, value, master, memories)
    buffers: dict[str, tuple[Copy, ...]] = {}
    unchecked: dict[str, tuple[SavedTensor, torch.Tensor]] = {}
    for name, buffer in live.buffers.items():
        if saved_name.get(name) in wanted:
            value, place = whole[saved_name[name]], f"model/{name}"
            shape, dtype, problem = tuple(buffer.shape), dtype_name(buffer.dtype), unfillable(buffer)
            if problem:
                mismatch.wrong.append(f"{place}: {problem}")
            elif fits(value, place, shape, dtype, mismatch, cast, buffer=True):
                value = of_one_element(value, shape)
                memory = memory_of(place, buffer.detach())
                buffers[name] = tuple(copies_into(value, memory.whole, memory, name=place))
                if not keeps_values(value.dtype, dtype):
                    if readable(value):
                        check_saved(value, buffer, place, mismatch)
                    else:
                        unchecked[name] = value, buffer
    return ModelPart(
        parameters,
        buffers,
        {name: whole[saved_name[name]] for name in live.extra_state if saved_name.get(name) in wanted},
        unchecked,
        {name: saved_names[name][0] for name in live.shapes if name in saved_names},
        mismatch=mismatch,
        renamed=match.renamed,
        cast=cast,
    )


def _explain(
    live: LiveEngine,
    whole: Mapping[str, Any],
    rename: Mapping[str, str],
    mismatch: Mismatch,
) -> None:
    """Notes which missing names are frozen parameters, and the ``rename`` that makes names match, if there is one."""
    missing = set(mismatch.missing)
    mismatch.frozen.extend(f"model/{name}" for name in live.frozen if f"model/{name}" in missing)
    if mismatch.missing and mismatch.unexpected:
        shapes: dict[str, tuple[int, ...] | None] = {
            name: live.shapes.get(live.aliases.get(name, name)) for name in live.names
        }
        shapes.update((name, tuple(buffer.shape)) for name, buffer in live.buffers.items())
        mismatch.advice.extend(rename_advice(whole, shapes, rename))


def _tied(saved: Saved, name: str) -> frozenset[str]:
    """`name`, and the names that are tied to it in the checkpoint."""
    owner = saved.aliases.get(name, name)
    return frozenset((owner, *(alias for alias, one in saved.aliases.items() if one == owner)))


def _plan_parameter(
    live: LiveEngine, name: str, value: SavedTensor, master: SavedTensor | None, memories: Memories
) -> ParameterPart:
    """Plans parameter `name`, given its saved weights and, where the checkpoint has it, its saved master."""
    slots = live.slots_of.get(name, ())
    apart, trained = name not in live.shared_memory, name in live.owned
    chosen = choose_sources(
        value, master, live.dtypes[name], apart=apart, trained_in_shares=trained and live.kind == "zero3"
    )
    masters: tuple[Copy, ...] = ()
    if chosen.masters is not None:
        masters = tuple(_into_masters(live, name, chosen.masters, slots, memories))
    from_saved_masters = apart and master is not None and trained
    if chosen.low is None:
        return ParameterPart(
            masters=masters,
            low_from_master=slots if apart else (),
            from_saved_masters=from_saved_masters,
        )
    low: list[Copy] = []
    for one in live.low[name]:
        memory = memories.of(one.key, one.flat)
        low += copies_into(chosen.low, laid(one.slot, memory), memory, name=f"model/{name}")
    whole = all(one.flat.dim() == 1 and one.slot.run.length == one.flat.numel() for one in live.low[name])
    return ParameterPart(
        tuple(low),
        masters,
        master_from_low=slots if apart and chosen.masters is None else (),
        source=chosen.low if whole else None,
        from_saved_masters=from_saved_masters,
        low_is_master=chosen.low is master,
    )


def _into_masters(
    live: LiveEngine,
    name: str,
    source: SavedTensor,
    slots: Sequence[tuple[int, Slot]],
    memories: Memories,
) -> Iterator[Copy]:
    for index, slot in slots:
        memory = memories.of(f"fp32 of flat {index}", live.flats[index].master)
        yield from copies_into(source, laid(slot, memory), memory, name=f"fp32/{name}")
