"""Plans what the optimizer inside a DeepSpeed engine gets: state tensors, numbers such as ``step``, hyperparameters.

The optimizer keeps state for each tensor that it updates (a "flat"), a checkpoint for each parameter. So a flat's state
tensors are filled slot by slot, and its numbers are those of its parameters, which must agree. Nothing is changed here;
numbers that are saved as tensors are read, to compare them, or where they are not here yet, put off
(`OptimizerPart.unchecked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ...byte_ranges import subtract
from ...errors import LayoutError
from ...materialize.tensors import read_tensor, torch_dtype
from ...saved.contents import Saved
from ...saved.copies import Copy, Memory
from ...saved.demand import Shape
from ...saved.mismatch import Mismatch
from ...saved.partitions import Slot
from ...saved.regions import Run
from ...saved.runs import Runs
from ...saved.strided import Layout
from ...saved.tensor import SavedTensor, StorageRef, same_shape
from ..dtensor import kept_part
from ..optimizer_kinds import (
    class_note,
    kind_problem,
    lacking_state,
    merged_groups,
    taken,
    uneven_groups,
    value_problems,
)
from ..parts import missing_part
from .live import LiveEngine, flat_memory, flat_view, memory_of
from .plan import ModelPart


@dataclass(frozen=True)
class OptimizerPart:
    """What an engine's optimizer gets. Flats and parameter groups are named by their index."""

    copies: tuple[Copy, ...] = ()
    filled: tuple[tuple[int, str], ...] = ()
    """(flat, state key) of the tensors that ``copies`` fill."""
    made: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """Flat to the state keys that the optimizer needs there, with the dtype saved."""
    numbers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Flat to ``step`` and the like, as saved."""
    ignored_numbers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Those of the same flats that are not restored: a new state needs all of its keys."""
    unchecked: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """By a place for messages, two numbers that must agree, and could not be read when the restore was planned."""
    groups: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """This job's parameter group to the hyperparameters that it gets, as saved."""
    refused: bool = False
    """Whether the checkpoint has no optimizer, or one of another kind; nothing is restored of it then."""
    notes: tuple[str, ...] = ()
    mismatch: Mismatch = field(default_factory=Mismatch)

    @property
    def restores(self) -> bool:
        """Whether anything of the optimizer changes."""
        return bool(self.copies or self.numbers or self.groups)


def state_memory_key(index: int, key: str) -> str:
    """What `Memory.key` calls the state tensor `key` of a flat."""
    return f"{key} of flat {index}, the optimizer's"


def new_state(master: torch.Tensor, saved_dtype: str, filled: Iterable[Layout] = ()) -> torch.Tensor:
    """A state tensor as the optimizer makes it for `master` at its first step: zeros, but where it will be `filled`."""
    dtype = _state_dtype(master, saved_dtype)
    made = torch.empty_like(master.detach(), dtype=dtype, memory_format=torch.preserve_format)
    flat = flat_view(made)
    if flat.dim() != 1:
        return made.zero_()
    # Memory that is read into is not written twice.
    spans = [(one.offset, one.offset + one.numel) for one in filled if one.is_contiguous]
    for start, stop in subtract([(0, made.numel())], spans):
        flat[start:stop].zero_()
    return made


def _state_dtype(master: torch.Tensor, saved_dtype: str) -> torch.dtype:
    saved = torch_dtype(saved_dtype)
    return master.dtype if saved.is_floating_point else saved


def plan_states(
    live: LiveEngine,
    saved: Saved,
    model: ModelPart,
    optimizer_class: str,
    hyperparameters: str | None = None,
    readable: Callable[[SavedTensor], bool] = lambda tensor: True,
) -> OptimizerPart:
    """Plans state, numbers and hyperparameters of the parameters that `model` found in `saved`, for its one optimizer.

    `optimizer_class` is for messages, `hyperparameters` and `readable` as in `RestoreOptions`. Raises `LayoutError` for
    state that is neither a number nor lies element by element along its parameter, or lies in files that were not read.
    """
    whole = _first(saved.whole.state.get("optimizers"))
    at = f"optimizers/{optimizer_class}"
    mismatch = Mismatch()
    if not whole:
        if live.optimizer is not None:
            mismatch.missing.append(missing_part(at, ()))
        return OptimizerPart(refused=bool(mismatch.missing), mismatch=mismatch)
    kept = _first(saved.state.get("optimizers"))
    if not kept:
        return OptimizerPart()
    if live.optimizer is not None:
        (name,) = saved.whole.state["optimizers"]
        problem = kind_problem(live.optimizer, whole, name if name != optimizer_class else None)
        if problem is not None:
            mismatch.missing.append(
                f"{at}: the checkpoint's optimizer is of {problem}; use the optimizer that was saved, or leave it out "
                "with LoadOptions(leave_out=['optimizer'])"
            )
            return OptimizerPart(refused=True, mismatch=mismatch)
    groups = _Groups(saved, whole, kept)
    note = class_note(live.optimizer.param_groups, groups.whole) if live.optimizer is not None else None
    states = _match(live, saved, model, f"{at}/state", mismatch)
    planned = _Planned(live, f"{at}/state", mismatch, readable)
    for index, flat in enumerate(live.flats):
        for name, slot in flat.slots or _padding(live, index, states):
            if name in states:
                planned.add(index, name, slot, states[name])
    return OptimizerPart(
        planned.copies,
        tuple(planned.filled),
        planned.made,
        planned.numbers,
        planned.ignored_numbers,
        planned.unchecked,
        _plan_groups(live, groups, states, f"{at}/param_groups", hyperparameters, mismatch),
        notes=() if note is None else (note,),
        mismatch=mismatch,
    )


class _State(NamedTuple):
    """What the checkpoint's optimizer has for one parameter."""

    owner: str
    """The parameter's name there; of tied ones, the one that has the state."""
    tensors: Mapping[str, SavedTensor]
    """Those that lie element by element along the parameter."""
    numbers: Mapping[str, Any]
    kept: Set[str]
    """The keys that ``ignore_keys`` left."""


def _match(
    live: LiveEngine, saved: Saved, model: ModelPart, at: str, mismatch: Mismatch
) -> dict[str, _State]:
    """The saved state of this rank's parameters that both jobs trained; others are added to `mismatch`."""
    whole = _mapping(_first(saved.whole.state.get("optimizers")).get("state"))
    kept = _mapping(_first(saved.state.get("optimizers")).get("state"))
    weights = _mapping(saved.whole.state.get("model"))
    found: dict[str, _State] = {}
    owned = live.owned
    for name, shape in live.shapes.items():
        saved_name = model.saved_names.get(name, "")
        owner = saved.aliases.get(saved_name, saved_name)
        if owner not in whole:
            if name in owned:
                mismatch.missing.append(f"{at}/{name}")
            continue
        saved_shape = getattr(weights.get(saved_name), "shape", None)
        state = _state(owner, _mapping(whole[owner]), _mapping(kept.get(owner)), saved_shape)
        if name not in owned:
            if not state.kept.isdisjoint(state.tensors):
                mismatch.unexpected.append(f"{at}/{owner}")
        elif saved_shape is not None and same_shape(saved_shape, shape):
            for key, value in state.numbers.items():
                if isinstance(value, SavedTensor) and value.shape and value.numel != 1:
                    raise LayoutError(
                        f"{at}/{owner}/{key} has shape {value.shape}, and its parameter {shape}: only numbers and "
                        "state that lies element by element along the parameters can be restored"
                    )
            found[name] = state
    return found


def _state(owner: str, entries: Mapping[str, Any], kept: Mapping[str, Any], shape: Shape | None) -> _State:
    tensors: dict[str, SavedTensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in entries.items():
        # What ZeRO partitioned lies along the parameter; an ordinary tensor does where it has the same shape.
        along = (
            isinstance(value, SavedTensor) and key != "step" and (value.shape == shape or value.whole is None)
        )
        (tensors if along else numbers)[key] = value
    return _State(
        owner, tensors, numbers, frozenset(kept) if kept is entries else kept.keys() & entries.keys()
    )


def _padding(live: LiveEngine, index: int, states: Mapping[str, _State]) -> Iterator[tuple[str, Slot]]:
    """For a partition that is padding alone, an empty slot of one of its group's parameters.

    DeepSpeed's optimizer keeps state for such a partition too, and counts its steps.
    """
    for name in live.groups[live.flats[index].param_group]:
        if name in states:
            yield name, Slot(live.position.rank, 0, Run(0, 0))
            return


class _Planned:
    """Collects what the flats get, slot by slot."""

    def __init__(
        self, live: LiveEngine, at: str, mismatch: Mismatch, readable: Callable[[SavedTensor], bool]
    ) -> None:
        self._live = live
        self._at = at
        self._mismatch = mismatch
        self._readable = readable
        self.unchecked: dict[str, tuple[Any, Any]] = {}
        self._known: dict[int, dict[str, Any]] = {}
        """Flat to all of its numbers, ignored ones too."""
        self._runs: dict[str, Runs] = {}
        """Key of the state to the copies that fill it."""
        self.filled: dict[tuple[int, str], Memory] = {}
        self.made: dict[int, dict[str, str]] = {}
        self.numbers: dict[int, dict[str, Any]] = {}

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What fills the state tensors."""
        return tuple(copy for runs in self._runs.values() for copy in runs.copies)

    @property
    def ignored_numbers(self) -> dict[int, dict[str, Any]]:
        return {
            index: {key: value for key, value in known.items() if key not in self.numbers.get(index, {})}
            for index, known in self._known.items()
        }

    def add(self, index: int, name: str, slot: Slot, state: _State) -> None:
        """Plans what the slot of parameter `name` in a flat gets."""
        kept, filled = state.kept, slot.run.length > 0
        if kept:
            made = self.made.setdefault(index, {})
            for key, tensor in state.tensors.items():
                if key not in made:
                    made[key] = tensor.dtype
        for key, tensor in state.tensors.items():
            if filled and key in kept:
                if key not in self._runs:
                    self._runs[key] = Runs(key)
                self._runs[key].add(name, tensor, slot, self._memory(index, key))
        for key, value in state.numbers.items():
            known = self._known.setdefault(index, {})
            before = known.get(key, value)
            if before is not value and not _surely_same(before, value):
                place = f"{self._at}/{name}/{key}"
                if all(self._readable(one) for one in (before, value) if isinstance(one, SavedTensor)):
                    self._mismatch.wrong += number_problem(place, _number(before), _number(value))
                else:
                    self.unchecked[place] = before, value
            known[key] = value
            if key in state.kept:
                self.numbers.setdefault(index, {})[key] = value

    def _memory(self, index: int, key: str) -> Memory:
        """The state tensor that the optimizer has, or will have once it is made."""
        if (index, key) not in self.filled:
            master = self._live.flats[index].master
            place = state_memory_key(index, key)
            own = self._live.optimizer.state.get(master, {}).get(key)
            if not isinstance(own, torch.Tensor):
                dtype = _state_dtype(master, self.made[index][key])
                memory = flat_memory(kept_part(master, place, new=dtype)[1])
            elif own.numel() == master.numel():
                memory = memory_of(place, flat_view(own))
            else:
                raise LayoutError(
                    f"the engine's optimizer keeps {key} in {own.numel()} elements for {master.numel()} of a "
                    "parameter or partition: only state that lies element by element along it can be restored"
                )
            self.filled[index, key] = memory
        return self.filled[index, key]


def number_problem(place: str, before: Any, value: Any) -> list[str]:
    """What is wrong where two numbers that must agree do not: the one at `place`, and one `before` it."""
    if before == value:
        return []
    return [
        f"{place}: the engine updates it together with parameters for which the checkpoint has {before}, but here it "
        f"has {value}"
    ]


def _surely_same(one: Any, other: Any) -> bool:
    """Whether two numbers are the same by what their file says of them, without being read.

    No two contents of up to 4 bytes have the same CRC-32.
    """
    if not isinstance(one, SavedTensor) or not isinstance(other, SavedTensor) or one.dtype != other.dtype:
        return False
    pieces = [*one.pieces, *other.pieces]
    stored = [piece.storage for piece in pieces if isinstance(piece.storage, StorageRef)]
    if len(one.pieces) != 1 or len(pieces) != 2 or len(stored) != 2:
        return False
    first, second = stored
    return first.nbytes == second.nbytes == one.nbytes <= 4 and first.crc32 == second.crc32 is not None


def _number(value: Any) -> Any:
    return read_tensor(value).item() if isinstance(value, SavedTensor) else value


class _Groups:
    """A checkpoint's parameter groups, whole and as ``ignore_keys`` left them."""

    def __init__(self, saved: Saved, whole: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
        groups = [_mapping(group) for group in _list(whole.get("param_groups"))]
        self.whole = [_without_params(group) for group in groups]
        self.of = {name: index for index, group in enumerate(groups) for name in _list(group.get("params"))}
        """A parameter's name to its group's index."""
        self.kept: dict[int, dict[str, Any]] = {}
        """A group's index to what is left of its hyperparameters. A group is known by its first parameter, because
        ignored ones shift the indices."""
        for group in map(_mapping, _list(kept.get("param_groups"))):
            for name in _list(group.get("params"))[:1]:
                owner = saved.aliases.get(name, name)
                if owner in self.of:
                    self.kept[self.of[owner]] = _without_params(group)


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _plan_groups(
    live: LiveEngine,
    groups: _Groups,
    states: Mapping[str, _State],
    at: str,
    hyperparameters: str | None,
    mismatch: Mismatch,
) -> dict[int, dict[str, Any]]:
    """The hyperparameters that each of this job's groups gets: those of the saved group with its parameters."""
    if live.optimizer is None or not any(groups.whole):
        return {}
    group_from: list[int | None] = []
    gets: list[dict[str, Any]] = []
    own_groups = live.optimizer.param_groups
    for index, names in enumerate(live.groups):
        own = own_groups[index]
        of_group = [states[name] for name in names if name in states]
        saved_groups = sorted({groups.of[one.owner] for one in of_group if one.owner in groups.of})
        whole = [taken(own, groups.whole[each], hyperparameters) for each in saved_groups]
        if any(other != whole[0] for other in whole[1:]):
            mismatch.wrong.append(f"{at}: {merged_groups(index, saved_groups)}")
        if hyperparameters == "job":
            problems = (lacking_state(own, {*one.tensors, *one.numbers}) for one in of_group)
            mismatch.wrong += dict.fromkeys(f"{at}/{index}: {one}" for one in problems if one is not None)
        source = saved_groups[0] if saved_groups else None
        group_from.append(source)
        gets.append({} if source is None else taken(own, groups.kept.get(source, {}), hyperparameters))
    if hyperparameters is None:
        mismatch.wrong += [f"{at}: {problem}" for problem in uneven_groups(own_groups, group_from, gets)]
    mismatch.wrong += value_problems(at, own_groups, gets)
    return {index: values for index, values in enumerate(gets) if values}


def lacks_learning_rates(saved: Saved) -> bool:
    """Whether the checkpoint has an optimizer whose groups hold no ``lr`` (``elastic_checkpoint``)."""
    groups = [_mapping(one) for one in _list(_first(saved.whole.state.get("optimizers")).get("param_groups"))]
    return any(group.get("params") for group in groups) and not any("lr" in group for group in groups)


def _first(parts: Any) -> Mapping[str, Any]:
    """The one optimizer of an engine's checkpoint; {} where there is none."""
    return _mapping(next(iter(_mapping(parts).values()), None))


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if type(value) is dict or isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
