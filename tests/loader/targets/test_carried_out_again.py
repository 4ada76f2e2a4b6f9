"""What is carried out again, once storages that came damaged are right: only what needs it, and all that needs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.copies import Copy, Memory
from rankload.loader.saved.strided import Layout
from rankload.loader.saved.tensor import StorageRef
from rankload.loader.targets.base import Change, Plan, RestoreOptions, Work, carry_out, carry_out_again

FIRST, SECOND, THIRD = (StorageRef("f", f"data/{number}", 64 * number, 8, 0) for number in range(3))


def copy_of(storage: StorageRef) -> Copy:
    layout = Layout((2,), (1,), 0)
    memory = Memory(f"of {storage.key}", "float32", (2,), (1,), plain=True)
    return Copy(storage.key, storage, "float32", layout, memory, layout)


class Reader:
    """Notes the storages that are read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def copy(self, copies: Sequence[Copy], memories: Mapping[str, torch.Tensor], noted: Any) -> None:
        self.read += [copy.storage.key for copy in copies]


@dataclass
class Filling:
    """A step that fills memory which stays, or memory of its own each time."""

    copies: tuple[Copy, ...]
    stays: bool
    trees: dict[str, Any] = field(default_factory=dict)
    memories: dict[str, torch.Tensor] = field(default_factory=dict)
    applied: int = 0

    def prepare(self, work: Work) -> Change:
        made = {copy.memory.key: torch.zeros(4)[1:3] for copy in self.copies}
        self.memories = self.memories if self.stays and self.memories else made
        work.fill(self.copies, self.memories)
        return self.change

    def change(self) -> list[str]:
        self.applied += 1
        return []


@pytest.mark.parametrize(("stays", "read"), [(True, ["data/1"]), (False, ["data/0", "data/1", "data/2"])])
def test_memory_that_is_still_there_gets_only_what_was_damaged(stays: bool, read: list[str]) -> None:
    step = Filling(tuple(map(copy_of, (FIRST, SECOND, THIRD))), stays)
    reader = Reader()
    work = Work(cast(TensorReader, reader), RestoreOptions(), lambda _: None)
    carry_out(Plan((step,)), work)
    assert reader.read == ["data/0", "data/1", "data/2"]
    reader.read.clear()
    carry_out_again(work, {SECOND})
    assert reader.read == read
    assert step.applied == 2


def test_steps_are_carried_out_again_from_the_first_that_read_damage_on() -> None:
    """Not those that read nothing: an algorithm would change the model twice."""
    before, damaged, after = (Filling((copy_of(one),), True) for one in (FIRST, SECOND, THIRD))
    nothing = Filling((), True)
    reader = Reader()
    work = Work(cast(TensorReader, reader), RestoreOptions(), lambda _: None)
    carry_out(Plan((before, damaged), rest=lambda: Plan((nothing, after))), work)
    reader.read.clear()
    carry_out_again(work, {SECOND})
    assert [step.applied for step in (before, damaged, nothing, after)] == [1, 2, 1, 2]
    assert reader.read == ["data/1"]
