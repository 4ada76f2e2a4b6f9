"""Plans what a DeepSpeed engine's weights, buffers and fp32 masters are filled from: all is checked, nothing changed.

Parameters are matched by name; the rest is arithmetic between the saved pieces and the engine's slots (`copies_into`),
so any two layouts fit as long as the files that it leads to were read. Words are those of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...saved.contents import Saved
from ...saved.copies import Copy, Memory, copies_into
from ...saved.dtypes import keeps_values
from ...saved.mismatch import Mismatch, fits
from ...saved.names import match_names
from ...saved.partitions import Slot
from ...saved.runs import Runs
from ...saved.tensor import SavedTensor, of_one_element
from ..buffers import check_saved
from ..dtensor import dtype_name, unfillable
from ..module import rename_advice
from .live import LiveEngine, Memories, memory_of
from .parameter_sources import choose_sources


class ParameterPart(NamedTuple):
    """What one parameter's weights and masters are filled from on this rank."""

    low: SavedTensor | None = None
    """What fills this rank's elements of the weights that the module computes with; None where it has none, or casts
    them from masters."""
    masters: SavedTensor | None = None
    """What fills this rank's elements of the masters; None where it has none, or casts them from the weights."""
    low_from_master: tuple[tuple[int, Slot], ...] = ()
    """Stage 3: (index of the flat, slot in it) of shares that are cast from this rank's own masters."""
    master_from_low: tuple[tuple[int, Slot], ...] = ()
    """(index of the flat, slot in it) of masters that are cast from the module's weights."""
    from_saved_masters: bool = False
    """Whether saved masters fill the masters."""
    low_is_master: bool = False
    """Whether ``low`` is a saved master."""

    @property
    def restored(self) -> bool:
        """Whether weights change."""
        return self.low is not None or bool(self.low_from_master)


@dataclass(frozen=True)
class ModelPart:
    """What a module's state and the masters of its parameters are filled from; by the engine's names."""

    parameters: Mapping[str, ParameterPart] = field(default_factory=dict)
    low: tuple[Copy, ...] = ()
    """Into the weights that the module computes with, of all parameters."""
    masters: tuple[Copy, ...] = ()
    """Into the masters."""
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
            or self.masters
            or any(part.restored for part in self.parameters.values())
        )

    def low_of(self, live: LiveEngine, names: Collection[str]) -> tuple[Copy, ...]:
        """Those copies of `low` that are into the weights of the parameters `names`."""
        runs, memories = Runs("model"), Memories()
        for name, part in self.parameters.items():
            if name in names and part.low is not None:
                _add_low(live, name, part.low, runs, memories)
        return runs.copies


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
    planned = _Planned(live)
    for name, shape in live.shapes.items():
        for left in saved_names.get(name, ()):
            if left in wanted:
                break
        else:
            continue
        value, master, dtype = whole[left], saved.masters.get(left), live.dtypes[name]
        problem = planned.problem(name)
        if problem:
            mismatch.wrong.append(f"model/{name}: {problem}")
        elif (isinstance(value, SavedTensor) and value.shape == shape and value.dtype == dtype) or fits(
            value, f"model/{name}", shape, dtype, mismatch, {} if value is master else cast
        ):
            planned.add(name, value, master)
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
        planned.parameters,
        planned.low.copies,
        planned.masters.copies,
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


class _Planned:
    """Collects what fills the parameters, one after another."""

    def __init__(self, live: LiveEngine) -> None:
        self._live = live
        self._memories = Memories()
        self._masters: dict[int, Memory] = {}
        self._problems: dict[str, str | None] = {}
        self.parameters: dict[str, ParameterPart] = {}
        self.low = Runs("model")
        self.masters = Runs("fp32")

    def problem(self, name: str) -> str | None:
        """Why the weights of parameter `name` cannot be filled; None where they can be."""
        for low in self._live.low[name]:
            if low.key not in self._problems:
                self._problems[low.key] = unfillable(low.flat)
            if self._problems[low.key]:
                return self._problems[low.key]
        return None

    def add(self, name: str, value: SavedTensor, master: SavedTensor | None) -> None:
        """Plans parameter `name`, given its saved weights and, where the checkpoint has it, its saved master."""
        live = self._live
        slots = live.slots_of.get(name, ())
        apart, trained = name not in live.shared_memory, name in live.owned
        chosen = choose_sources(
            value, master, live.dtypes[name], apart=apart, trained_in_shares=trained and live.kind == "zero3"
        )
        if chosen.masters is not None:
            for index, slot in slots:
                if index not in self._masters:
                    key = f"fp32 of flat {index}"
                    self._masters[index] = self._memories.of(key, live.flats[index].master)
                self.masters.add(name, chosen.masters, slot, self._masters[index])
        if chosen.low is not None:
            _add_low(live, name, chosen.low, self.low, self._memories)
        # No slot is empty but those of a parameter without elements.
        is_empty = 0 in live.shapes[name]
        filled, computed = bool(slots) and not is_empty, bool(live.low[name]) and not is_empty
        self.parameters[name] = ParameterPart(
            chosen.low if computed else None,
            chosen.masters if filled else None,
            slots if apart and chosen.low is None else (),
            slots if apart and chosen.low is not None and chosen.masters is None else (),
            apart and master is not None and trained,
            chosen.low is not None and chosen.low is master,
        )


def _add_low(live: LiveEngine, name: str, source: SavedTensor, runs: Runs, memories: Memories) -> None:
    for one in live.low[name]:
        runs.add(name, source, one.slot, memories.of(one.key, one.flat))
