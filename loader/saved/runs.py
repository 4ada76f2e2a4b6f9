"""Plans copies into rows of memory, part by part; parts that follow each other there and in a file are one. Pure.

An engine's flat tensors take a hundred thousand parameters, which a file has side by side, and in the same order
mostly. `Runs` adds each to the run before it, where it goes on there; so one copy is made for them, and one read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from .copies import Copy, Memory, copies_into
from .partitions import Slot
from .regions import Laid
from .strided import Layout
from .tensor import SavedTensor, StorageRef


def laid(slot: Slot, memory: Memory) -> Laid:
    """The elements of `slot`, where they lie in `memory`: in a row, or a whole parameter where that has dimensions."""
    if len(memory.shape) != 1:
        return memory.whole
    (step,) = memory.stride
    return Laid(slot.run, slot.start * step, (step,))


class Runs:
    """The copies of one kind of tensors, such as ``fp32``; messages call that of a parameter ``fp32/NAME``."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._found: list[Copy | _Run] = []
        self._last: dict[int, _Run] = {}
        """By the ``id`` of a memory, the run that was planned into it last."""

    def add(self, name: str, tensor: SavedTensor, slot: Slot, memory: Memory) -> None:
        """Plans what fills the `slot` of a parameter in `memory`, which is as `laid` takes it.

        Raises as `copies_into`.
        """
        run = slot.run
        start, numel = run
        row = tensor.row
        if row is None or memory.stride != (1,) or start + numel > tensor.numel:
            self._found += copies_into(tensor, laid(slot, memory), memory, name=f"{self._kind}/{name}")
            return
        if not numel:
            return
        storage, first = row
        source = first + start
        last = self._last.get(id(memory))
        if (
            last is not None
            and source == last.source + last.numel
            and slot.start == last.target + last.numel
            and tensor.dtype == last.dtype
            and (storage is last.storage or storage == last.storage)
        ):
            last.numel += numel
            last.names.append(name)
            return
        new = _Run(storage, tensor.dtype, source, memory, slot.start, numel, name)
        self._last[id(memory)] = new
        self._found.append(new)

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What was planned, in the order of the first part of each copy."""
        return tuple(one if isinstance(one, Copy) else one.copy(self._kind) for one in self._found)


class _Run:
    """Parts that follow each other, the elements of all of them together."""

    __slots__ = ("dtype", "memory", "names", "numel", "source", "storage", "target")

    def __init__(
        self,
        storage: StorageRef,
        dtype: str,
        source: int,
        memory: Memory,
        target: int,
        numel: int,
        name: str,
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.source = source
        self.memory = memory
        self.target = target
        self.numel = numel
        self.names = [name]

    def copy(self, kind: str) -> Copy:
        shape = (self.numel,)
        names = _Prefixed(f"{kind}/", self.names)
        return Copy(
            names[0],
            self.storage,
            self.dtype,
            Layout(shape, (1,), self.source),
            self.memory,
            Layout(shape, (1,), self.target),
            names,
        )


class _Prefixed(Sequence[str]):
    """Names with what comes before each, which are made when they are asked for."""

    __slots__ = ("_names", "_prefix")

    def __init__(self, prefix: str, names: Sequence[str]) -> None:
        self._prefix = prefix
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self._prefix + name for name in self._names[index]]
        return self._prefix + self._names[index]
