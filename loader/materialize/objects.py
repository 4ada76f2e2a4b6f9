"""Turns a tree of saved values into real objects: tensors, arrays, and objects of types that are known or allowed.

`materialize` refuses unknown types first (`safe_types`), reads the tree's storages, and then makes each value once.
`_KNOWN_OBJECTS`, at the end, says how an object of a known type is made.
"""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import CorruptError, FormatError, RankloadError
from ..formats.pickle.arrays import PickledDtype
from ..formats.pickle.inert import Ordered, Text, TorchSize
from ..formats.pickle.known import (
    ATTRIBUTE_DICT,
    BIT_GENERATORS,
    DTYPES,
    ENUMS,
    NUMPY_RANDOM,
    OWN_FUNCTIONS,
    PLAIN_TYPES,
)
from ..formats.pickle.tensors import REBUILD_FROM_DEVICE, REBUILD_QUANTIZED, REBUILD_SPARSE, REBUILD_VIEW
from ..saved.copies import apart, copies_of_tree, shared
from ..saved.random_states import check_generator_state
from ..saved.tensor import SavedTensor, StorageRef
from ..saved.tree import join_path, unknown_values
from ..saved.values import UNSUPPORTED, GlobalName, InertArray, InertObject, InertTensor, kind_of
from .safe_types import SafeTypes, require_safe
from .tensors import TensorReader, torch_dtype

MAX_DEPTH = 300
"""More than `saved.tree.MAX_DEPTH`, which does not count the levels of objects' fields."""
_PLAIN_TYPES: dict[str, Any] = {
    **{
        f"builtins.{kind.__name__}": kind
        for kind in (int, float, str, bool, bytes, complex, list, dict, tuple, set, object)
    },
    "typing.Any": Any,
}


def materialize(
    tree: Any,
    *,
    reader: TensorReader,
    safe_types: Sequence[str | type] = (),
    path: str = "",
    file: str = "",
    device: str | torch.device = "cpu",
    keep_unknown: bool = False,
) -> Any:
    """`tree` as real objects, with its tensors read by `reader` onto `device`.

    Tensors that share a storage share memory, one in several pieces has its own, and a value that the file holds once
    is made once. Arrays become NumPy's, ``torch.Size``, dtypes and devices torch's; enumerations of known classes
    become their values; other known objects stay `InertObject`, with real fields. A type in `safe_types` is constructed
    as its pickle asks. Sparse and quantized tensors, and conjugated and negated views, are what they were. `file` and
    `path` (the tree's own place in the file) are for messages.

    With `keep_unknown`, what cannot be made real stays what it is, with real fields: an `InertObject`, a `GlobalName`,
    an `InertTensor` or `InertArray`.

    Raises as `require_safe`, before anything is read, unless `keep_unknown`; `CorruptError` where bytes are missing or
    differ from their checksum, or a known object's fields do not fit it; `FormatError` where constructing an allowed
    type fails; `LayoutError` where elements were saved in files not read.
    """
    trees = {path: tree}
    made = materialize_each(
        trees, reader=reader, safe_types=safe_types, file=file, device=device, keep_unknown=keep_unknown
    )
    return made[path]


def materialize_each(
    trees: Mapping[str, Any],
    *,
    reader: TensorReader,
    safe_types: Sequence[str | type] = (),
    file: str = "",
    device: str | torch.device = "cpu",
    keep_unknown: bool = False,
) -> dict[str, Any]:
    """Each of `trees`, by its place in the file, as `materialize` makes it by itself: two of them share no memory.

    All are read together, in the order of the file. Raises as `materialize`.
    """
    allowed = SafeTypes(safe_types)
    if not keep_unknown:
        require_safe(trees, safe_types=allowed, file=file)
    owners = {path: f"{number}: " for number, path in enumerate(trees)}
    read = _read(trees, owners, reader, device)
    return {
        path: _Materializer(read, owners[path], allowed, file, device, keep_unknown).real(tree, path, 0)
        for path, tree in trees.items()
    }


def hashable(made: Any, *, path: str, file: str) -> Any:
    """`made`, a key or a set's member at `path`: where a saved value has a hash, what it stands for may have none.

    Raises `CorruptError` where it has none.
    """
    try:
        hash(made)
    except TypeError as error:
        raise CorruptError(
            f"{file}: {path or 'its top level'} has a key, or a set a member, that can be neither ({error}); no "
            "program that writes checkpoints saves one",
            path=file,
        ) from error
    return made


def _read(
    trees: Mapping[str, Any], owners: Mapping[str, str], reader: TensorReader, device: str | torch.device
) -> dict[str, tuple[int, torch.Tensor]]:
    """Reads what `copies_of_tree` plans for `trees`: by the memory's key, (first byte of its storage, the memory)."""
    copies = [
        copy for path, tree in trees.items() for copy in copies_of_tree(tree, path=path, owner=owners[path])
    ]
    found: dict[str, tuple[int, torch.Tensor]] = {}
    for copy in copies:
        memory = copy.memory
        if memory.key not in found:
            tensor = torch.empty(memory.shape, dtype=torch_dtype(memory.dtype), device=device)
            found[memory.key] = (copy.source.offset, tensor)
    reader.copy(copies, {key: tensor for key, (_, tensor) in found.items()})
    return found


class _Materializer:
    """Makes one tree: the memory that was read, and what was made so far, by id of the saved value."""

    def __init__(
        self,
        read: Mapping[str, tuple[int, torch.Tensor]],
        owner: str,
        allowed: SafeTypes,
        file: str,
        device: str | torch.device,
        keep_unknown: bool,
    ) -> None:
        self.read = read
        self.owner = owner
        """What the keys of its memory begin with."""
        self.keep_unknown = keep_unknown
        self.device = device
        self.allowed = allowed
        self.file = file
        self.made: dict[int, Any] = {}
        self.open: set[int] = set()

    def real(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in (int, float, str, bool, bytes, type(None)):
            return value
        if id(value) in self.made:
            return self.made[id(value)]
        if self.keep_unknown and depth > MAX_DEPTH:
            return value
        if id(value) in self.open or depth > MAX_DEPTH:
            raise CorruptError(
                f"{self.file}: {path} contains itself, or nests deeper than {MAX_DEPTH} levels",
                path=self.file,
            )
        self.open.add(id(value))
        result = self._make(value, path, depth + 1)
        self.open.discard(id(value))
        self.made[id(value)] = result
        return result

    def _make(self, value: Any, path: str, depth: int) -> Any:
        if isinstance(value, dict):
            return self._dict(value, path, depth)
        if isinstance(value, TorchSize):
            return torch.Size(value)
        if isinstance(value, (list, tuple)):
            items: list[Any] = []
            if isinstance(value, list):
                # As for dicts, an object among its items may refer to it.
                self.made[id(value)] = items
            items.extend(self.real(item, join_path(path, index), depth) for index, item in enumerate(value))
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, (set, frozenset)):
            members = [self._hashable(item, path, depth) for item in value]
            return set(members) if isinstance(value, set) else frozenset(members)
        if isinstance(value, SavedTensor):
            return self._tensor(value)
        if isinstance(value, InertArray):
            return _array(value)
        if isinstance(value, GlobalName):
            return self._global(value)
        if isinstance(value, InertTensor):
            return self._inert_tensor(value, path, depth)
        if isinstance(value, InertObject):
            return self._object(value, path, depth)
        return str(value) if isinstance(value, Text) else value

    def _dict(self, value: dict[Any, Any], path: str, depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = collections.OrderedDict() if isinstance(value, Ordered) else {}
        # Set before its items are made, because an object among them may refer to it.
        self.made[id(value)] = result
        for key, item in value.items():
            if isinstance(item, GlobalName | InertObject) and kind_of(item) in OWN_FUNCTIONS:
                continue
            result[self._hashable(key, path, depth)] = self.real(item, join_path(path, key), depth)
        metadata = getattr(value, "_metadata", None)
        if metadata is not None:
            result._metadata = self.real(metadata, path, depth)  # type: ignore[attr-defined]
        return result

    def _hashable(self, value: Any, path: str, depth: int) -> Any:
        return hashable(self.real(value, path, depth), path=path, file=self.file)

    def _tensor(self, value: SavedTensor) -> torch.Tensor:
        dtype = torch_dtype(value.dtype)
        piece = value.whole
        if value.numel == 0:
            result = torch.empty(value.shape, dtype=dtype, device=self.device)
        elif piece is None or not isinstance(piece.storage, StorageRef):
            _, result = self.read[self.owner + apart(value)]
        else:
            low, memory = self.read[self.owner + shared(piece.storage)]
            result = torch.empty(0, dtype=dtype, device=memory.device)
            offset = piece.offset - low // value.itemsize
            result.set_(memory.untyped_storage(), offset, value.shape, piece.stride)
        return result.requires_grad_(value.requires_grad)

    def _inert_tensor(self, value: InertTensor, path: str, depth: int) -> Any:
        make = _TENSORS.get(value.global_name)
        if make is None or not value.known:
            return value
        try:
            return make(*(self.real(arg, path, depth) for arg in value.args))
        except RankloadError:
            raise
        except Exception as error:
            raise CorruptError(
                f"{self.file}: {path} holds a {value.kind} whose parts do not fit each other ({str(error)[:200]})",
                path=self.file,
            ) from error

    def _global(self, value: GlobalName) -> Any:
        if value.name in self.allowed:
            return self.allowed.type(value.name)
        if value.name in DTYPES:
            return torch_dtype(DTYPES[value.name])
        return _PLAIN_TYPES[value.name] if value.name in PLAIN_TYPES else value

    def _object(self, value: InertObject, path: str, depth: int) -> Any:
        name = value.global_name
        if name in self.allowed and not (self.keep_unknown and self._holds_unknown(value)):
            return self._construct(value, path, depth)
        if isinstance(value, PickledDtype) and value.text != UNSUPPORTED:
            return np.dtype(value.text)
        if isinstance(value, PickledDtype) and not self.keep_unknown:
            raise FormatError(
                f"{self.file}: {path} holds a numpy.dtype of Python objects or of several fields, which is not "
                f"restored; leave it out with ignore_keys=[{path!r}]",
                path=self.file,
            )
        fields = InertObject(name, known=value.known, via_new=value.via_new)
        if not value.known:
            # Nothing is made of it, so that what it holds may refer to it.
            self.made[id(value)] = fields
        fields.args = self.real(value.args, path, depth)
        fields.kwargs = self.real(value.kwargs, path, depth)
        fields.state = self.real(value.state, path, depth)
        fields.items = self.real(value.items, path, depth)
        fields.entries = self.real(value.entries, path, depth)
        if not value.known:
            return fields
        try:
            make = _KNOWN_OBJECTS.get(name)
            return fields if make is None else make(fields)
        except RankloadError:
            raise
        except Exception as error:
            raise CorruptError(
                f"{self.file}: {path} holds a {name} that cannot be made ({type(error).__name__}: "
                f"{str(error)[:200]})",
                path=self.file,
            ) from error

    def _holds_unknown(self, value: InertObject) -> bool:
        """Whether an object of an allowed type holds what cannot be made real, so that it cannot either."""
        fields = (value.args, value.kwargs, value.state, value.items, value.entries)
        return any(not self.allowed.allows(each) for _, each in unknown_values(fields))

    def _construct(self, value: InertObject, path: str, depth: int) -> Any:
        """An object of an allowed type, made as Python's unpickler would make it."""
        kind = self.allowed.type(value.global_name)
        args = self.real(value.args, path, depth)
        kwargs = self.real(value.kwargs, path, depth)
        try:
            result = kind.__new__(kind, *args, **kwargs) if value.via_new else kind(*args, **kwargs)
            self.made[id(value)] = result
            for item in self.real(value.items, path, depth):
                result.append(item) if hasattr(result, "append") else result.add(item)
            for key, item in self.real(value.entries, path, depth).items():
                result[key] = item
            if value.state is not None:
                _set_state(result, self.real(value.state, path, depth))
        except RankloadError:
            raise
        except Exception as error:
            raise FormatError(
                f"{self.file}: {path} holds a {value.global_name}, whose construction failed "
                f"({type(error).__name__}: {str(error)[:200]})",
                path=self.file,
            ) from error
        return result


def _set_state(target: Any, state: Any) -> None:
    """Does what pickle's BUILD opcode does."""
    setter = getattr(target, "__setstate__", None)
    if setter is not None:
        setter(state)
        return
    slots: Any = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state:
        target.__dict__.update(state)
    for key, item in (slots or {}).items():
        setattr(target, key, item)


def _array(value: InertArray) -> Any:
    if value.dtype == UNSUPPORTED:
        return value
    array = np.frombuffer(bytearray(value.data), dtype=np.dtype(value.dtype))
    array = array.reshape(value.shape, order="F" if value.fortran_order else "C")
    return array[()] if value.scalar else array


def _attributes(value: InertObject) -> dict[str, Any]:
    return dict(value.state) if isinstance(value.state, dict) else {}


def _slice(value: InertObject) -> slice:
    return slice(*value.args)


def _path(value: InertObject) -> pathlib.PurePath:
    # A Windows path becomes a pure one, which works on any system.
    kind = pathlib.PureWindowsPath if "Windows" in value.global_name else pathlib.PurePosixPath
    return (
        kind(*value.args)
        if "Pure" in value.global_name or "Windows" in value.global_name
        else pathlib.Path(*value.args)
    )


def _deque(value: InertObject) -> collections.deque[Any]:
    start = list(value.args[0]) if value.args else []
    return collections.deque([*start, *value.items], value.args[1] if len(value.args) > 1 else None)


def _bytes_io(value: InertObject) -> io.BytesIO:
    """What torch's modules of extra state, and Transformer Engine's, saved as a file in memory."""
    data, position = value.state[:2] if value.state else (b"", 0)
    if not isinstance(data, bytes) or type(position) is not int or not 0 <= position <= len(data):
        raise CorruptError("a BytesIO without its bytes")
    stream = io.BytesIO(data)
    stream.seek(position)
    return stream


def _layout(value: InertObject) -> torch.layout:
    # Not by getattr, by which torch imports some of its modules.
    found = vars(torch).get(str(value.args[0]).removeprefix("torch."))
    if not isinstance(found, torch.layout):
        raise FormatError(f"the checkpoint names {value.args[0]!r}, which torch does not know as a layout")
    return found


def _random_generator(value: InertObject) -> Any:
    """The NumPy generator or bit generator that `value`, which has real fields, describes; without its seed sequence.

    Any other object of ``numpy.random`` is returned as it is. Raises as NumPy does where the state does not fit.
    """
    name = value.global_name.rpartition(".")[2]
    if name == "__randomstate_ctor":
        made: Any = np.random.RandomState(_bit_generator(value.args[0] if value.args else "MT19937"))
    elif name == "__generator_ctor":
        made = np.random.Generator(_bit_generator(value.args[0] if value.args else "MT19937"))
    elif name == "__bit_generator_ctor" or name in BIT_GENERATORS:
        made = _bit_generator(value.args[0] if value.args else name)
    else:
        return value
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    if isinstance(state, dict):
        check_generator_state(state)
        target = made.bit_generator if isinstance(made, np.random.Generator) else made
        if isinstance(made, np.random.RandomState):
            made.set_state(state)
        else:
            target.state = state
    return made


def _bit_generator(kind: Any) -> Any:
    if isinstance(kind, np.random.BitGenerator):
        return kind
    name = kind.name.rpartition(".")[2] if isinstance(kind, GlobalName) else kind
    if name not in BIT_GENERATORS:
        raise CorruptError("a NumPy generator of an unknown kind")
    return getattr(np.random, name)()


def _sparse(layout: str, *parts: Any) -> torch.Tensor:
    """A sparse tensor; torch checks that every index lies inside its shape."""
    if layout == "sparse_coo":
        indices, values, shape, coalesced = parts
        return torch.sparse_coo_tensor(
            indices, values, shape, check_invariants=True, is_coalesced=coalesced or None
        )
    return torch.sparse_compressed_tensor(*parts, layout=vars(torch)[layout], check_invariants=True)


def _quantized(integers: torch.Tensor, scheme: str, dtype: str, *quantizer: Any) -> torch.Tensor:
    """A quantized tensor over the memory of `integers`."""
    # Made without elements, then laid over them: torch would allocate a tensor of the shape that the file claims.
    element = torch_dtype(dtype)
    if scheme == "per_tensor_affine":
        scale, zero_point = quantizer
        made = torch._empty_affine_quantized([0], scale=scale, zero_point=zero_point, dtype=element)
    else:
        scales, zero_points, axis = quantizer
        empty = [0] * integers.dim()
        empty[axis] = integers.shape[axis]
        made = torch._empty_per_channel_affine_quantized(
            empty, scales=scales, zero_points=zero_points, axis=axis, dtype=element
        )
    return made.set_(integers.untyped_storage(), integers.storage_offset(), integers.shape, integers.stride())


def _conjugated_or_negated(tensor: torch.Tensor, conjugated: bool, negated: bool) -> torch.Tensor:
    """A view as it was saved; it takes no memory of its own."""
    view = tensor.detach()
    view = view.conj() if conjugated else view
    view = torch._neg_view(view) if negated else view
    return view.requires_grad_(tensor.requires_grad)


def _from_device(array: Any, dtype: str, requires_grad: bool) -> torch.Tensor:
    native = np.asarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(native).to(torch_dtype(dtype)).requires_grad_(requires_grad)


_TENSORS: dict[str, Callable[..., torch.Tensor]] = {
    REBUILD_SPARSE: _sparse,
    REBUILD_QUANTIZED: _quantized,
    REBUILD_VIEW: _conjugated_or_negated,
    REBUILD_FROM_DEVICE: _from_device,
}

_KNOWN_OBJECTS: dict[str, Callable[[InertObject], Any]] = {
    "argparse.Namespace": lambda value: argparse.Namespace(**_attributes(value)),
    "types.SimpleNamespace": lambda value: types.SimpleNamespace(**_attributes(value)),
    "builtins.range": lambda value: range(*value.args),
    "builtins.slice": _slice,
    "collections.deque": _deque,
    "_io.BytesIO": _bytes_io,
    "torch.device": lambda value: torch.device(*value.args),
    "torch.serialization._get_layout": _layout,
    ATTRIBUTE_DICT: lambda value: dict(value.entries),
    **{
        f"pathlib.{name}": _path
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    },
    **dict.fromkeys(ENUMS, lambda value: value.args[0]),
    **dict.fromkeys(NUMPY_RANDOM, _random_generator),
}
