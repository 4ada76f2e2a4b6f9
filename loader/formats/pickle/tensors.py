"""Stands in for the torch functions that pickles call to rebuild tensors. Free of torch.

Each stand-in in `TENSOR_BUILDERS` has the signature of the function of its name in ``torch/_utils.py`` or
``torch/_tensor.py``. It checks its arguments, which are the file's, and raises `CorruptError` where they do not fit.
A tensor that it cannot describe (a subclass, conjugated, of an unknown dtype) becomes an object of unknown class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...errors import CorruptError
from ...saved.dtypes import ITEMSIZE
from ...saved.values import GlobalName
from .budget import Budget
from .inert import PickledGlobal, PickledObject, PickledTensor, TorchSize
from .known import DTYPES, TENSOR_CLASSES

MAX_DIMENSIONS = 64
_LARGEST = 1 << 62


def _tensor(
    budget: Budget, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> PickledTensor | PickledObject:
    if not isinstance(storage, PickledTensor) or len(rest) > 3:
        raise CorruptError("a tensor without a storage")
    if len(rest) == 3 and rest[2]:
        return _special(rest[2])
    return lay_out(budget, storage, storage.dtype, offset, size, stride, rest[0] if rest else False)


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
) -> PickledTensor | PickledObject:
    if not isinstance(dtype, GlobalName) or dtype.name not in DTYPES:
        return PickledObject(global_name=f"{getattr(dtype, 'name', 'an unknown dtype')}", args=(storage,))
    if metadata:
        return _special(metadata)
    return lay_out(budget, storage, DTYPES[dtype.name], offset, size, stride, requires_grad)


def _special(metadata: Any) -> PickledObject:
    # Lazily conjugated or negated: its bytes are not its values.
    return PickledObject(global_name="torch._utils.set_tensor_metadata", args=(metadata,))


def _parameter(
    budget: Budget, data: Any, requires_grad: Any = True, hooks: Any = None, state: Any = None
) -> Any:
    if not isinstance(data, PickledTensor):
        return PickledObject(global_name="torch._utils._rebuild_parameter", args=(data, requires_grad))
    return data.requiring_grad(bool(requires_grad))


def _typed(budget: Budget, function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor of a subclass, or a plain one with attributes (as DeepSpeed's ``ds_id``), which are dropped."""
    if (
        isinstance(function, PickledGlobal)
        and function.name in _REBUILDERS
        and isinstance(kind, GlobalName)
        and kind.name in TENSOR_CLASSES
        and isinstance(args, tuple)
    ):
        return function(*args)
    return PickledObject(
        global_name=getattr(kind, "name", "torch._tensor._rebuild_from_type_v2"), args=(args,), state=state
    )


def _size(budget: Budget, items: Any = ()) -> TorchSize:
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
        last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if (last + 1) * itemsize > storage.nbytes:
            raise CorruptError(
                f"a {dtype} tensor of shape {sizes} reaches byte {(last + 1) * itemsize:,} of storage "
                f"{storage.key!r}, which has {storage.nbytes:,}"
            )
        if math.prod(sizes) > _LARGEST:
            raise CorruptError(f"a tensor of shape {sizes}, which nothing can hold")
    return PickledTensor(storage, dtype, sizes, steps, start, requires_grad=bool(requires_grad))


def _integers(budget: Budget, value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS:
        raise CorruptError(f"a tensor whose {what} is no tuple of at most {MAX_DIMENSIONS} integers")
    for item in value:
        _integer(item, what)
    if type(value) is tuple:
        # The pickle's own, which it may use for many tensors: a copy for each would take memory that nothing counts.
        return value
    budget.charge(56 + 8 * len(value))
    return tuple(value)


def _integer(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise CorruptError(f"a tensor whose {what} is no number of elements")
    return value


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

TENSOR_BUILDERS: dict[str, Callable[..., Any]] = {
    **_REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch._tensor._rebuild_from_type": _typed,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
}
"""By the name of the function or class that the pickle calls; the first argument is the file's `Budget`."""
