"""Defines the values that the unpickler makes, which later opcodes of the pickle cannot change. Free of torch.

A pickle may ask to set the state, the attributes or the items of anything that it has on its stack, also of the classes
and functions that it names. A `PickledObject` records the request; a global, a tensor, a filled array or a size refuses
it with `UnsafeError`. Readers of the finished tree use these values as their base classes in `saved`; copying or
pickling one gives an instance of the base class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from ...errors import CorruptError, UnsafeError
from ...saved.regions import row_major_stride, whole_box
from ...saved.tensor import Piece, SavedTensor, StorageRef
from ...saved.values import GlobalName, InertArray, InertObject, InertShard, InertTensor


class PickledGlobal(GlobalName):
    """A class or function by name. Calling it, as the unpickler does, gives what `build.make` makes of the call."""

    __slots__ = ("_build", "_make")
    _make: Callable[[str, tuple[Any, ...], dict[str, Any], bool], Any]
    _build: Callable[..., Any] | None

    def __init__(
        self,
        name: str,
        known: bool,
        make: Callable[[str, tuple[Any, ...], dict[str, Any], bool], Any],
        build: Callable[..., Any] | None = None,
    ) -> None:
        """`build` is what `make` calls first, with the arguments alone."""
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "known", known)
        object.__setattr__(self, "_make", make)
        object.__setattr__(self, "_build", build)

    def __call__(self, *args: Any) -> Any:
        if self._build is not None:
            try:
                return self._build(*args)
            except (CorruptError, TypeError):
                pass  # what that means, `make` knows
        return self._make(self.name, args, {}, False)

    def make_new(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value that stands for ``cls.__new__(cls, *args, **kwargs)``."""
        return self._make(self.name, args, kwargs, True)

    def __setstate__(self, state: Any) -> None:
        _refuse(f"the class or function {self.name}")

    def __reduce__(self) -> tuple[Any, ...]:
        return GlobalName, (self.name, self.known)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GlobalName) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


NO_ITEMS: list[Any] = []
NO_ENTRIES: dict[Any, Any] = {}
"""What all objects that `build.make` makes begin with, which most keep: nobody changes these two."""


class PickledObject(InertObject):
    """An object as its pickle describes it; records calls, state and items, and runs nothing."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> PickledObject:
        return PickledObject(global_name=f"{self.global_name}()", args=args, kwargs=kwargs)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.entries is NO_ENTRIES:
            self.entries = {}
        self.entries[key] = value

    def append(self, item: Any) -> None:
        self.extend([item])

    def extend(self, items: list[Any]) -> None:
        if self.items is NO_ITEMS:
            self.items = []
        self.items.extend(items)

    def add(self, item: Any) -> None:
        self.extend([item])

    def __reduce__(self) -> tuple[Any, ...]:
        return InertObject, (
            self.global_name,
            self.args,
            self.kwargs,
            self.state,
            self.items,
            self.entries,
            self.known,
            self.via_new,
        )


class PickledTensor(SavedTensor):
    """A tensor in one storage, inside which it has been found to lie; it can no longer be changed.

    Its one piece is made when it is asked for, so that a file of a hundred thousand tensors takes an object for each.
    """

    __slots__ = ("_offset", "_stride", "storage")
    storage: StorageRef
    _stride: tuple[int, ...]
    _offset: int

    def __init__(
        self,
        storage: StorageRef,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int = 0,
        *,
        requires_grad: bool = False,
    ) -> None:
        keep = object.__setattr__
        keep(self, "storage", storage)
        keep(self, "dtype", dtype)
        keep(self, "shape", shape)
        keep(self, "_stride", stride)
        keep(self, "_offset", offset)
        keep(self, "requires_grad", requires_grad)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (Piece(whole_box(self.shape), self._offset, self._stride, self.storage),)

    @property
    def row(self) -> tuple[StorageRef, int] | None:
        in_order = self._stride == row_major_stride(self.shape)
        return (self.storage, self._offset) if in_order else None

    def requiring_grad(self, requires_grad: bool) -> PickledTensor:
        """The same with that ``requires_grad``."""
        return PickledTensor(
            self.storage, self.dtype, self.shape, self._stride, self._offset, requires_grad=requires_grad
        )

    def moved_to(self, storage: StorageRef) -> PickledTensor:
        """The same in another storage of that size."""
        return PickledTensor(
            storage, self.dtype, self.shape, self._stride, self._offset, requires_grad=self.requires_grad
        )

    @property
    def repeats(self) -> bool:
        """Whether it has more elements than its storage, some of them several times (``expand``)."""
        return self.nbytes > self.storage.nbytes

    def __setstate__(self, state: Any) -> None:
        _refuse("a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        return SavedTensor, (self.dtype, self.shape, self.pieces, self.requires_grad)


class QuantizedStorage(PickledTensor):
    """The integers in the storage of a quantized tensor, and the `quantized` dtype that the storage's class names."""

    __slots__ = ("quantized",)
    quantized: str

    def __init__(self, storage: StorageRef, dtype: str, shape: tuple[int, ...], *, quantized: str) -> None:
        super().__init__(storage, dtype, shape, (1,))
        object.__setattr__(self, "quantized", quantized)


class PickledInertTensor(InertTensor):
    """A tensor that is not the bytes of one storage; it can no longer be changed."""

    __slots__ = ()

    @classmethod
    def unmade(cls, kind: str, global_name: str = "") -> PickledInertTensor:
        """One that cannot be made real; `global_name` is its class, where it has one of its own.

        It keeps none of its fields: they may be gigabytes that nobody asked for.
        """
        return cls(global_name=global_name, kind=kind)

    def __setstate__(self, state: Any) -> None:
        if self.known:
            _refuse("a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_tensor, (
            self.global_name,
            self.args,
            self.known,
            self.kind,
            self.dtype,
            self.shape,
            self.layout,
        )


def _inert_tensor(
    name: str, args: tuple[Any, ...], known: bool, kind: str, dtype: str, shape: tuple[int, ...], layout: str
) -> InertTensor:
    return InertTensor(
        global_name=name, args=args, known=known, kind=kind, dtype=dtype, shape=shape, layout=layout
    )


class PickledShard(InertShard):
    """One rank's shard of a tensor; it can no longer be changed."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _refuse("a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_shard, tuple(getattr(self, field.name) for field in fields(InertShard))


def _inert_shard(*values: Any) -> InertShard:
    return InertShard(*values)


class PickledArray(InertArray):
    """A NumPy array; one that was made empty takes its contents once, by way of `fill`."""

    __slots__ = ("_fill",)
    _fill: Callable[[PickledArray, Any], None] | None

    def __init__(
        self,
        dtype: str,
        shape: tuple[int, ...],
        data: bytes,
        *,
        fortran_order: bool = False,
        scalar: bool = False,
        fill: Callable[[PickledArray, Any], None] | None = None,
    ) -> None:
        self.set(dtype, shape, data, fortran_order, scalar)
        object.__setattr__(self, "_fill", fill)

    def set(self, dtype: str, shape: tuple[int, ...], data: bytes, fortran_order: bool, scalar: bool) -> None:
        for name, value in (
            ("dtype", dtype),
            ("shape", shape),
            ("data", data),
            ("fortran_order", fortran_order),
            ("scalar", scalar),
        ):
            object.__setattr__(self, name, value)

    def __setstate__(self, state: Any) -> None:
        fill = self._fill
        if fill is None:
            _refuse("a NumPy array for a second time")
        object.__setattr__(self, "_fill", None)
        fill(self, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return InertArray, (self.dtype, self.shape, self.data, self.fortran_order, self.scalar)


class Ordered(OrderedDict[Any, Any]):
    """An ``OrderedDict``; the only attribute that it keeps is ``_metadata``, which torch's state dicts have."""

    def __setstate__(self, state: Any) -> None:
        metadata = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(metadata, dict):
            self._metadata = metadata


class TorchSize(tuple[int, ...]):
    """A ``torch.Size``: integers only."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _refuse("a torch.Size")


class Text(str):
    """A string that has a class of its own in the pickle, such as torch's version."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Its attributes are dropped."""


def _refuse(kind: str) -> NoReturn:
    raise UnsafeError(f"the pickle sets the state of {kind}. No checkpoint does: do not trust this file.")
