"""Defines what a target is: it says what it demands, and turns a `Saved` into a `Plan`, which `carry_out` applies.

A plan is made of steps. Each step states beforehand, as copies and trees, all that it will read; so what is fetched and
summed is what is read. `carry_out` compares: a copy or a tree that its step left out raises `InternalError`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import InternalError
from ..materialize.objects import materialize_each
from ..materialize.tensors import TensorReader
from ..options import Hyperparameters
from ..ranges.destinations import FirstWrite
from ..saved.contents import Saved
from ..saved.copies import Copy, copies_of_tree
from ..saved.demand import Demand
from ..saved.mismatch import Mismatch
from ..saved.tensor import SavedTensor, StorageRef
from ..state import AlgorithmPass

NoteChange = Callable[[str], None]
"""Called with a part's name before that part is first changed. Raises where another rank has failed before the first
change of any: nothing may be changed then."""


@dataclass(frozen=True)
class RestoreOptions:
    """What the caller of a load asked for, as far as it concerns what is done to the target."""

    weights_only: bool = False
    strict: bool = True
    rename: Mapping[str, str] = field(default_factory=dict)
    allow_missing_frozen: bool = False
    layout: Mapping[str, str] = field(default_factory=dict)
    leave_out: frozenset[str] = frozenset()
    """Parts of the state that stay as they are (``LoadOptions.leave_out``)."""
    exclude_algorithms: Collection[str] | None = None
    algorithm_passes: Sequence[AlgorithmPass] | None = None
    logger: Any = None
    hyperparameters: Hyperparameters | None = None
    """Whose hyperparameters the optimizers' groups get; None as in `LoadOptions`."""
    safe_types: Sequence[str | type] = ()
    file: str = ""
    """What messages call the checkpoint."""
    comes_in_parts: Callable[[str], bool] = lambda path: False
    """Whether bytes of the file at a local path may not be there before the restore."""

    def readable(self, tensor: SavedTensor) -> bool:
        """Whether the check can read `tensor`."""
        return not any(self.comes_in_parts(storage.file) for storage in tensor.storages)


Change = Callable[[], list[str]]
"""The rest of a step, which changes the target; returns what was restored, for the receipt."""


class Step(Protocol):
    """A part of a plan, carried out on this rank alone: no rank waits in it for another."""

    @property
    def copies(self) -> Sequence[Copy]:
        """The elements of saved tensors that it puts into memory."""

    @property
    def trees(self) -> Mapping[str, Any]:
        """The saved values that it makes real, by their places in the checkpoint."""

    def prepare(self, work: Work) -> Change:
        """Reads what goes to new memory, makes it real, allocates and compares; changes nothing. The rest is returned.

        That calls `Work.note_change` with a part's name before that part is first changed. Both raise `CorruptError`
        where bytes are missing or do not match their checksum; the rest whatever the target's own loading raises.
        """


@dataclass(frozen=True)
class Plan:
    """A target's restore, checked; nothing is changed yet."""

    steps: tuple[Step, ...] = ()
    mismatch: Mismatch = field(default_factory=Mismatch)
    """What does not fit, for the caller to raise."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Names of the checkpoint to this job's, where they differ."""
    cast: Mapping[str, str] = field(default_factory=dict)
    """Places of tensors to ``source dtype -> target dtype``."""
    reset: tuple[str, ...] = ()
    """Ignored entries that an optimizer needs with the others: they are set to zero."""
    not_restored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences for the receipt."""
    rest: Callable[[], Plan] | None = None
    """Plans what can only be planned once the steps have changed the model."""
    finish: Callable[[], None] | None = None
    """What all ranks do together once each has carried out its plan; every rank must call it, where any has it."""

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            lines.append(f"{type(step).__name__}:")
            lines += [f"  {copy}" for copy in step.copies]
            lines += [f"  {path}, made real" for path in step.trees]
        return "\n".join(lines)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Everything that the steps read, in their order."""
        return tuple(
            copy
            for step in self.steps
            for copy in (
                *step.copies,
                *(each for path, tree in step.trees.items() for each in copies_of_tree(tree, path=path)),
            )
        )

    @property
    def trees(self) -> dict[str, Any]:
        """Everything that the steps make real, by place."""
        return {path: tree for step in self.steps for path, tree in step.trees.items()}

    def joined(self, other: Plan) -> Plan:
        """Both plans as one: the steps of `other` come after."""
        mismatch = Mismatch()
        mismatch.extend(self.mismatch)
        mismatch.extend(other.mismatch)
        return Plan(
            (*self.steps, *other.steps),
            mismatch,
            {**self.renamed, **other.renamed},
            {**self.cast, **other.cast},
            (*self.reset, *other.reset),
            (*self.not_restored, *other.not_restored),
            (*self.notes, *other.notes),
            other.rest or self.rest,
            other.finish or self.finish,
        )


def join(plans: Iterable[Plan]) -> Plan:
    """All of `plans` as one, in their order."""
    return reduce(Plan.joined, plans, Plan())


class Target(Protocol):
    """What a checkpoint is restored into."""

    def demand(self, rank: int, world_size: int) -> Demand:
        """What this rank keeps, where it has the place `rank` among the job's `world_size` ranks.

        Reads the target's attributes only. Raises `LayoutError` for a target that cannot be restored.
        """

    def plan(self, saved: Saved) -> Plan:
        """Matches `saved` with the target and plans what goes where; changes nothing, and no rank waits.

        What does not fit is in the plan's ``mismatch``. Raises `LayoutError` where elements are needed that lie in
        files that were not read, or the target has a layout that cannot be restored.
        """


class _Held:
    """A tensor's memory, which this keeps no longer than others do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._address = tensor.data_ptr()

    def by(self, tensor: Any) -> bool:
        """Whether `tensor` has that memory; not where it was freed since, wherever its successor lies."""
        if not isinstance(tensor, torch.Tensor) or self._reference.expired():  # type: ignore[no-untyped-call]
            return False
        own = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return bool(self._reference == own) and tensor.data_ptr() == self._address


class Work:
    """What a step does its work with. It keeps account of what the step has used of its copies and trees."""

    def __init__(self, reader: TensorReader, options: RestoreOptions, note_change: NoteChange) -> None:
        self.reader = reader
        self.options = options
        self.note_change = note_change
        self._first_writes: dict[str, FirstWrite] = {}
        self.carried_out = Plan()
        """All plans that were carried out, as one, for the receipt: `Plan.rest` adds what the first could not tell."""
        self._copied: set[int] = set()
        self._made: set[str] = set()
        self._filled: dict[str, _Held] = {}
        """By `Memory.key`: the memory that was filled, whether or not it is there still."""
        self._again: Collection[StorageRef] | None = None

    def fill(
        self,
        copies: Sequence[Copy],
        memories: Mapping[str, torch.Tensor],
        changes: Mapping[str, str] | None = None,
    ) -> None:
        """Fills `memories`, by `Memory.key`. Raises as `TensorReader.copy`.

        `changes` names, by key too, the part that is changed where a memory is the user's, rather than new: it is noted
        when the first bytes for it are there. In `carry_out_again`, memory that was filled before gets only what was
        damaged then.
        """
        again = self._again
        if again is not None:
            held = {key for key, memory in memories.items() if self.has_filled(key, memory)}
            copies = [copy for copy in copies if copy.storage in again or copy.memory.key not in held]
        noted = {key: self._first_write(part) for key, part in (changes or {}).items()}
        self.reader.copy(copies, memories, noted)
        self._copied.update(map(id, copies))
        for key in {copy.memory.key for copy in copies}:
            memory = memories[key]
            self._filled[key] = _Held(memory)

    def has_filled(self, key: str, memory: Any) -> bool:
        """Whether `memory` is the very one that `fill` has filled before as `key`; False in a first restore."""
        held = self._filled.get(key)
        return self._again is not None and held is not None and held.by(memory)

    @property
    def again(self) -> bool:
        """Whether what was carried out is carried out once more."""
        return self._again is not None

    @contextmanager
    def once_more(self, damaged: Collection[StorageRef]) -> Iterator[None]:
        """A block in which `fill` reads the storages `damaged` again, and of others only what memory lacks."""
        self._again = damaged
        try:
            yield
        finally:
            self._again = None

    def _first_write(self, part: str) -> FirstWrite:
        if part not in self._first_writes:
            self._first_writes[part] = FirstWrite(partial(self.note_change, part))
        return self._first_writes[part]

    def real(self, trees: Mapping[str, Any]) -> dict[str, Any]:
        """`trees` as real values, by the same places; each is made by itself. Raises as `materialize_each`."""
        found = materialize_each(
            trees, reader=self.reader, safe_types=self.options.safe_types, file=self.options.file
        )
        self._made.update(trees)
        return found

    def account(self, step: Step) -> None:
        """Raises `InternalError` unless `step` has used all that it planned."""
        left = [copy.name for copy in step.copies if id(copy) not in self._copied]
        left += [path for path in step.trees if path not in self._made]
        if left:
            raise InternalError(
                f"{self.options.file}: {', '.join(left[:8])} were planned and not restored: this is a mistake in "
                "rankload; please report it"
            )


def carry_out(plan: Plan, work: Work) -> list[str]:
    """Carries out `plan` on this rank; returns the parts that were restored, for the receipt. No rank waits.

    All steps are prepared before the first one changes anything: what fails then is no partial restore.

    Raises `MismatchError` where what could only be planned after a change does not fit, `InternalError` where a step
    left something out, and as `Step.prepare`.
    """
    restored: list[str] = []
    work.carried_out = work.carried_out.joined(plan)
    prepared = [(step, step.prepare(work)) for step in plan.steps]
    for step, change in prepared:
        restored += change()
        work.account(step)
    if plan.rest is not None:
        rest = plan.rest()
        rest.mismatch.raise_if_any(
            work.options.file,
            strict=work.options.strict,
            allow_missing_frozen=work.options.allow_missing_frozen,
            before=False,
        )
        restored += carry_out(rest, work)
    return restored


def carry_out_again(work: Work, damaged: Collection[StorageRef]) -> None:
    """Carries out once more what `carry_out` did by `work`, from the first step on that read any of `damaged`.

    These were read damaged, and are right in their files now. So the outcome is that of a restore that read them so;
    memory that is still the same is not filled again with what was right. Raises as `carry_out`. No rank waits.
    """
    plan, begun = work.carried_out, False
    with work.once_more(damaged):
        for step in plan.steps:
            begun = begun or any(copy.storage in damaged for copy in Plan((step,)).copies)
            # Algorithms read nothing; they have changed the model by now, and would change it twice.
            if begun and (step.copies or step.trees):
                step.prepare(work)()
