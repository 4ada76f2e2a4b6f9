"""Stands in for the torch functions that pickles call to rebuild tensors. Free of torch.

Each stand-in in `TENSOR_BUILDERS` has the signature of the function of its name in ``torch/_utils.py`` or
``torch/_tensor.py``. It checks its arguments, which are the file's, and raises `CorruptError` where they do not fit.
A tensor that is not the bytes of one storage becomes a `PickledInertTensor`: one that `materialize.objects` can make
(sparse, quantized, a conjugated or negated view, of an XLA device), or one that nobody can (a wrapper subclass, of an
unknown dtype or storage class), which does no harm unless it is used. So does one rank's shard, which `shards` reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...errors import CorruptError
from ...saved.dtypes import ITEMSIZE
from ...saved.tree import iterate
from ...saved.values import UNSUPPORTED, GlobalName, InertObject, InertTensor, is_tensor, kind_of
from .budget import Budget
from .inert import (
    PickledArray,
    PickledGlobal,
    PickledInertTensor,
    PickledObject,
    PickledTensor,
    QuantizedStorage,
    TorchSize,
)
from .known import DTYPES, TENSOR_CLASSES
from .shards import is_shard_class, read_shard

MAX_DIMENSIONS = 64
REBUILD_SPARSE = "torch._utils._rebuild_sparse_tensor"
REBUILD_QUANTIZED = "torch._utils._rebuild_qtensor"
REBUILD_VIEW = "torch._utils.set_tensor_metadata"
REBUILD_FROM_DEVICE = "torch._utils._rebuild_device_tensor_from_cpu_tensor"
"""The names by which `materialize.objects` finds how to make a `PickledInertTensor`."""
_REBUILD_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
_COMPRESSED = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_MOST_ATTRIBUTES = 1000
_LARGEST = 1 << 62
"""More elements than memory can hold. A shape with a 0 counts without it: torch steps through it all the same."""


def _tensor(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> PickledTensor | PickledInertTensor:
    if len(rest) > 3:
        raise TypeError("more arguments than any torch writes")
    odd = _odd_storage(storage)
    if odd is not None:
        return odd
    tensor = lay_out(budget, storage, storage.dtype, offset, size, stride, rest[0] if rest else False)
    return _view(tensor, rest[2] if len(rest) == 3 else None)


def _tensor_v3(
    budget: Budget,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> PickledTensor | PickledInertTensor:
    if not isinstance(dtype, GlobalName) or dtype.name not in DTYPES:
        return PickledInertTensor.unmade(f"tensor of the dtype {kind_of(dtype)[:200]}, which is not known")
    odd = _odd_storage(storage)
    if odd is not None:
        return odd
    tensor = lay_out(budget, storage, DTYPES[dtype.name], offset, size, stride, requires_grad)
    return _view(tensor, metadata)


def _odd_storage(storage: Any) -> PickledInertTensor | None:
    """What a tensor over `storage` is, where that is none of plain elements; else None."""
    if isinstance(storage, InertTensor):
        return PickledInertTensor.unmade(f"tensor in a {storage.kind}")
    if isinstance(storage, QuantizedStorage):
        return PickledInertTensor.unmade(f"{storage.quantized} tensor without its scale")
    if not isinstance(storage, PickledTensor):
        raise CorruptError("a tensor without a storage")
    return None


def _view(tensor: PickledTensor, metadata: Any) -> PickledTensor | PickledInertTensor:
    """`tensor` with torch's `metadata`: lazily conjugated or negated, its values are not its bytes."""
    if not metadata:
        return tensor
    if not isinstance(metadata, dict) or not set(metadata) <= {"conj", "neg"}:
        return PickledInertTensor.unmade("tensor with metadata that are not known")
    conjugated, negated = bool(metadata.get("conj")), bool(metadata.get("neg"))
    if conjugated and not tensor.dtype.startswith("complex"):
        raise CorruptError(f"a conjugated tensor of {tensor.dtype}")
    if negated and not tensor.dtype.startswith(("complex", "float", "bfloat")):
        raise CorruptError(f"a negated view of {tensor.dtype}")
    if not conjugated and not negated:
        return tensor
    kind = "conjugated view of a tensor" if conjugated else "negated view of a tensor"
    return _made(REBUILD_VIEW, (tensor, conjugated, negated), kind, tensor.dtype, tensor.shape)


def _made(
    name: str, args: tuple[Any, ...], kind: str, dtype: str, shape: tuple[int, ...], layout: str = "strided"
) -> PickledInertTensor:
    return PickledInertTensor(
        global_name=name, args=args, known=True, kind=kind, dtype=dtype, shape=shape, layout=layout
    )


def _sparse(budget: Budget, layout: Any, data: Any) -> PickledInertTensor:
    """A sparse tensor of the tensors in `data`: indices and values. Making it takes no more than those have bytes."""
    text = layout.args[0] if isinstance(layout, InertObject) and len(layout.args) == 1 else None
    name = text.removeprefix("torch.") if isinstance(text, str) else "unknown"
    parts, tensors = 4 if name in _COMPRESSED else 3, 3 if name in _COMPRESSED else 2
    if name not in (*_COMPRESSED, "sparse_coo"):
        return PickledInertTensor.unmade(f"tensor of the layout {name[:80]}, which is not known")
    if not isinstance(data, tuple) or len(data) not in (parts, 4):
        raise CorruptError("a sparse tensor without its parts")
    members, shape = data[:tensors], _integers(budget, data[tensors], "shape")
    if not all(_is_plain(member) for member in members):
        return PickledInertTensor.unmade(f"{_sparse_kind(name)} of parts that are no plain tensors")
    if math.prod(filter(None, shape)) > _LARGEST:
        raise CorruptError(f"a tensor of shape {shape}, which nothing can hold")
    budget.charge_rebuilt(sum(member.nbytes for member in members))
    values = members[-1]
    if name == "sparse_coo":
        indices = members[0]
        sizes, dense = indices.shape, values.shape
        if len(sizes) != 2 or not dense or sizes[1] != dense[0] or dense[1:] != shape[sizes[0] :]:
            raise CorruptError(
                f"a sparse tensor of shape {shape} with indices of shape {sizes} and values of shape {dense}"
            )
        coalesced = bool(data[3]) if len(data) == 4 else False
        args: tuple[Any, ...] = (name, *members, shape, coalesced)
    else:
        args = (name, *members, shape)
    return _made(REBUILD_SPARSE, args, _sparse_kind(name), values.dtype, shape, name)


def _sparse_kind(layout: str) -> str:
    return f"sparse {layout.removeprefix('sparse_').upper()} tensor"


def _is_plain(value: Any) -> bool:
    """Whether `value` is a tensor whose elements are the bytes of its storage, each at most once."""
    return isinstance(value, PickledTensor) and not isinstance(value, QuantizedStorage) and not value.repeats


def _quantized(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, scheme: Any, *rest: Any
) -> PickledInertTensor:
    """A quantized tensor: integers, and one scale and zero point for all of them or for each index of one dimension."""
    if not isinstance(storage, QuantizedStorage):
        if isinstance(storage, PickledTensor):
            raise CorruptError(f"a quantized tensor in a storage of {storage.dtype}")
        odd = _odd_storage(storage)
        return odd if odd is not None else PickledInertTensor.unmade("quantized tensor")
    integers = lay_out(budget, storage, storage.dtype, offset, size, stride, False)
    name = kind_of(scheme[0]) if isinstance(scheme, tuple) and scheme else ""
    if integers.repeats or name not in ("torch.per_tensor_affine", "torch.per_channel_affine"):
        return PickledInertTensor.unmade(f"quantized tensor of the scheme {name[:80]}")
    budget.charge_rebuilt(integers.nbytes)
    if name == "torch.per_tensor_affine":
        if len(scheme) != 3 or type(scheme[1]) is not float or type(scheme[2]) is not int:
            raise CorruptError("a quantized tensor without its scale and zero point")
    else:
        if len(scheme) != 4 or type(scheme[3]) is not int or not 0 <= scheme[3] < len(integers.shape):
            raise CorruptError("a quantized tensor without its scales, zero points and their dimension")
        if not all(_is_plain(each) for each in scheme[1:3]):
            return PickledInertTensor.unmade("quantized tensor whose scales are no plain tensors")
        expected = (integers.shape[scheme[3]],)
        if scheme[1].shape != expected or scheme[2].shape != expected:
            raise CorruptError(
                f"a quantized tensor of shape {integers.shape} with scales of shape {scheme[1].shape} and zero points "
                f"of shape {scheme[2].shape}; expected {expected}"
            )
        budget.charge_rebuilt(scheme[1].nbytes + scheme[2].nbytes)
    layout = name.removeprefix("torch.")
    args = (integers, layout, storage.quantized, *scheme[1:])
    if layout == "per_channel_affine" and scheme[2].dtype.startswith("float"):
        layout += "_float_qparams"  # as torch calls it, which pickles both alike
    return _made(REBUILD_QUANTIZED, args, "quantized tensor", storage.quantized, integers.shape, layout)


def _from_device(
    budget: Budget, data: Any, dtype: Any, device: Any, requires_grad: Any
) -> PickledTensor | PickledInertTensor:
    """A tensor of XLA and the like, which was saved from the CPU: a tensor or an array, and the dtype it had there."""
    known = isinstance(dtype, GlobalName) and dtype.name in DTYPES
    if known and isinstance(data, PickledTensor) and data.dtype == DTYPES[dtype.name]:
        return data.requiring_grad(_requires(data.dtype, requires_grad))
    kind = f"tensor of the device {str(device)[:80]}"
    if known and isinstance(data, PickledArray) and data.dtype != UNSUPPORTED and data.dtype[1] in "biufc":
        budget.charge_rebuilt(math.prod(data.shape) * ITEMSIZE[DTYPES[dtype.name]])
        name = DTYPES[dtype.name]
        return _made(REBUILD_FROM_DEVICE, (data, name, bool(requires_grad)), kind, name, data.shape)
    return PickledInertTensor.unmade(kind)


def _wrapper(budget: Budget, kind: Any, *rest: Any) -> PickledInertTensor:
    return _of_class(kind)


def _of_class(kind: Any) -> PickledInertTensor:
    """A tensor of a class that keeps its values elsewhere than in a storage of its own."""
    name = kind_of(kind)[:200]
    return PickledInertTensor.unmade(f"tensor of the class {name}, which wraps other tensors", name)


def _nested(budget: Budget, *rest: Any) -> PickledInertTensor:
    return PickledInertTensor.unmade("nested tensor")


def _meta(budget: Budget, *rest: Any) -> PickledInertTensor:
    return PickledInertTensor.unmade("tensor on the meta device, which has no values")


def _uninitialised(budget: Budget, *rest: Any) -> PickledInertTensor:
    return PickledInertTensor.unmade("parameter that was not initialised when it was saved")


def _parameter(
    budget: Budget, data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None
) -> PickledTensor | InertTensor:
    if isinstance(data, InertTensor):
        return data
    if not isinstance(data, PickledTensor):
        raise CorruptError("a parameter without a tensor")
    return data.requiring_grad(_requires(data.dtype, requires_grad))


def _requires(dtype: str, requires_grad: Any) -> bool:
    """Whether a tensor of `dtype` requires gradients. Raises `CorruptError` where none of it can."""
    if requires_grad and not dtype.startswith(("float", "bfloat", "complex")):
        raise CorruptError(f"a tensor of {dtype} that requires gradients")
    return bool(requires_grad)


def _typed(budget: Budget, function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor of a subclass, or a plain one with attributes (as DeepSpeed's ``ds_id``).

    A subclass's values are those of its storage where a function rebuilds it that rebuilds plain tensors too. Its class
    and attributes are dropped; but one with tensors among its attributes cannot do without them.
    """
    if not isinstance(function, PickledGlobal) or not isinstance(args, tuple):
        return _of_class(kind)
    if function.name == _REBUILD_WRAPPER and isinstance(kind, GlobalName) and is_shard_class(kind.name):
        return read_shard(budget, kind.name, args, state)
    if function.name not in TENSOR_BUILDERS:
        known = rebuilds_tensors(function.name)
        return _of_class(kind) if known else PickledObject(global_name=function.name, args=args)
    tensor = function(*args)
    if not is_tensor(tensor) or (isinstance(tensor, InertTensor) and not tensor.known):
        return tensor if isinstance(tensor, InertTensor) else _of_class(kind)
    if (isinstance(kind, GlobalName) and kind.name in TENSOR_CLASSES) or not _has_tensors(budget, state):
        return tensor
    return PickledInertTensor.unmade(
        f"tensor of the class {kind_of(kind)[:200]}, which has further tensors", kind_of(kind)
    )


def _has_tensors(budget: Budget, state: Any) -> bool:
    """Whether there are tensors in the attributes of a subclass, or more of those than can be looked through."""
    for count, (_, value) in enumerate(iterate(state)):
        budget.charge(60)
        if is_tensor(value) or count > _MOST_ATTRIBUTES:
            return True
    return False


def rebuilt_by(name: str) -> PickledInertTensor:
    """What a call of the function `name` gives, which rebuilds tensors in a way that has no stand-in."""
    return PickledInertTensor.unmade(f"tensor that only {name[:200]} can rebuild")


def rebuilds_tensors(name: str) -> bool:
    """Whether the function of that name is one of torch's that rebuild tensors."""
    return name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))


def torch_size(budget: Budget, items: Any = ()) -> TorchSize:
    """The stand-in of ``torch.Size``."""
    budget.charge(8 * len(items))
    return TorchSize(_integers(budget, items, "size"))


def lay_out(
    budget: Budget,
    base: Any,
    dtype: str,
    offset: Any,
    shape: Any,
    stride: Any,
    requires_grad: Any,
) -> PickledTensor:
    """A tensor over ``base``'s storage; ``offset`` and ``stride`` count elements of ``dtype``.

    Raises `CorruptError` unless every element lies inside the storage.
    """
    if not isinstance(base, PickledTensor):
        raise CorruptError("a tensor without a storage")
    storage = base.storage
    sizes, steps = _integers(budget, shape, "shape"), _integers(budget, stride, "stride")
    start = _integer(offset, "storage offset")
    if len(sizes) != len(steps):
        raise CorruptError(f"a tensor of {len(sizes)} dimensions with {len(steps)} strides")
    itemsize = ITEMSIZE[dtype]
    if 0 not in sizes:
        last = start
        for size, step in zip(sizes, steps):  # noqa: B905  # as many: compared above
            last += (size - 1) * step
        if (last + 1) * itemsize > storage.nbytes:
            raise CorruptError(
                f"a {dtype} tensor of shape {sizes} reaches byte {(last + 1) * itemsize:,} of storage "
                f"{storage.key!r}, which has {storage.nbytes:,}"
            )
    if len(sizes) > 1 and math.prod(filter(None, sizes)) > _LARGEST:
        raise CorruptError(f"a tensor of shape {sizes}, which nothing can hold")
    return PickledTensor(storage, dtype, sizes, steps, start, requires_grad=_requires(dtype, requires_grad))


def _integers(budget: Budget, value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise CorruptError(f"a tensor whose {what} is no tuple of at most {MAX_DIMENSIONS} integers")
    for item in value:
        if type(item) is not int or not 0 <= item <= _LARGEST:
            raise _no_number(what)
    if type(value) is tuple:
        # The pickle's own, which it may use for many tensors: a copy for each would take memory that nothing counts.
        return value
    budget.charge(56 + 8 * len(value))
    return tuple(value)


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise _no_number(what)
    return value


def _no_number(what: str) -> CorruptError:
    return CorruptError(f"a tensor whose {what} is no number of elements")


TENSOR_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    REBUILD_SPARSE: _sparse,
    REBUILD_QUANTIZED: _quantized,
    REBUILD_FROM_DEVICE: _from_device,
    "torch._utils._rebuild_device_tensor_from_numpy": _from_device,
    "torch._utils._rebuild_xla_tensor": _from_device,
    _REBUILD_WRAPPER: _wrapper,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._tensor._rebuild_from_type": _typed,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.nn.parameter.UninitializedParameter": _uninitialised,
    "torch.nn.parameter.UninitializedBuffer": _uninitialised,
}
"""By the name of the function or class that the pickle calls; the first argument is the file's `Budget`."""
