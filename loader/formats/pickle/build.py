"""Makes what a call in a pickle stands for: a saved tensor, an array, a plain value, or an inert record of the call.
Free of torch.

`BUILDERS` has the stand-ins by name: this module's own for Python's types (dicts, sets, bytes, dates), and those of
`tensors` and `arrays`. A stand-in checks its arguments, which are the file's, and raises `CorruptError` where they do
not fit; none runs anything of the file's choosing. The call of a name without a stand-in, or with arguments that it
does not know, becomes a `PickledObject`, or a `PickledInertTensor` where it rebuilds a tensor: nothing is refused here
for being unknown.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import CorruptError, UnsafeError
from ...saved.values import GlobalName, InertObject, kind_of
from .arrays import NUMPY_BUILDERS
from .budget import Budget
from .inert import NO_ENTRIES, NO_ITEMS, Ordered, PickledGlobal, PickledObject, Text
from .known import KNOWN_OBJECTS, KNOWN_VALUES
from .opcodes import MAX_NAME
from .tensors import TENSOR_BUILDERS, rebuilds_tensors, rebuilt_by, torch_size

_TIME_PARTS = (datetime.timedelta, datetime.tzinfo)


def make(
    budget: Budget,
    builders: Mapping[str, Callable[..., Any]],
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    via_new: bool,
) -> Any:
    """The value that stands for the call of the class or function ``name``; `builders` are `BUILDERS`, or some of them.

    `via_new`: the pickle asks for ``cls.__new__(cls, *args, **kwargs)`` instead of ``cls(*args, **kwargs)``.
    """
    function = builders.get(name)
    if function is not None and not kwargs:
        try:
            return function(budget, *args)
        except CorruptError:
            # What an argument that cannot be made would have been, the stand-in cannot know.
            if not any(isinstance(arg, InertObject) and not arg.known for arg in args):
                raise
        except TypeError:
            pass  # a call in a form that this version does not know, as of a newer torch's function
    if name == "builtins.getattr" and len(args) == 2 and not kwargs:
        return _attribute(budget, builders, *args)
    if _rebuilds(name):
        return rebuilt_by(name)
    return record(name in KNOWN_OBJECTS, name, args, kwargs, via_new)


def maker_of(
    budget: Budget, builders: Mapping[str, Callable[..., Any]], name: str
) -> Callable[[str, tuple[Any, ...], dict[str, Any], bool], Any]:
    """`make` for calls of the class or function `name`; `record`, where that is all that it would do."""
    if name in builders or name == "builtins.getattr" or _rebuilds(name):
        return functools.partial(make, budget, builders)
    return functools.partial(record, name in KNOWN_OBJECTS)


def record(
    known: bool, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], via_new: bool
) -> PickledObject:
    """The call of a name that has no stand-in, as an object that only says what was called."""
    return PickledObject(name, args, kwargs, None, NO_ITEMS, NO_ENTRIES, known, via_new)


def _rebuilds(name: str) -> bool:
    return name in TENSOR_BUILDERS or rebuilds_tensors(name)


def _attribute(
    budget: Budget, builders: Mapping[str, Callable[..., Any]], owner: Any, name: Any
) -> PickledGlobal | PickledObject:
    """A class inside another, or a function of a class or an object, by its name: so pickles before protocol 4 name
    them."""
    if not isinstance(owner, GlobalName | InertObject) or not isinstance(name, str):
        raise CorruptError("an attribute of something that has none")
    full = f"{kind_of(owner)}.{name}"
    budget.charge(100 + len(full))
    if len(full) > 4 * MAX_NAME:
        raise UnsafeError(f"a class or function whose name has {len(full)} characters")
    known = full in KNOWN_VALUES
    if isinstance(owner, GlobalName):
        return PickledGlobal(full, known, maker_of(budget, builders, full))
    return PickledObject(global_name=full, args=() if known else (owner,), known=known)


def new_object(kind: Any, args: Any, kwargs: Any) -> Any:
    """The value that stands for ``kind.__new__(kind, *args, **kwargs)``. Raises `CorruptError` for no such call."""
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise CorruptError("an object whose arguments are no tuple")
    if kwargs and not all(isinstance(key, str) for key in kwargs):
        raise CorruptError("an object whose keyword arguments are not named by text")
    if isinstance(kind, PickledGlobal):
        return kind.make_new(args, kwargs)
    if isinstance(kind, PickledObject):
        return kind(*args, **kwargs)
    raise CorruptError("an object of something that is no class")


def _newobj(budget: Budget, kind: Any, *args: Any) -> Any:
    return new_object(kind, args, {})


def _newobj_ex(budget: Budget, kind: Any, args: Any, kwargs: Any) -> Any:
    return new_object(kind, args, kwargs)


def _reconstructor(budget: Budget, kind: Any, base: Any, state: Any = None) -> PickledObject:
    name = getattr(kind, "name", "copyreg._reconstructor")
    plain = isinstance(base, GlobalName) and base.name == "builtins.object"
    return PickledObject(
        global_name=name, args=() if plain else (state,), known=name in KNOWN_OBJECTS, via_new=True
    )


def _ordered(budget: Budget, pairs: Any = ()) -> Ordered:
    # Every tensor comes with an empty one.
    return Ordered(_pairs(budget, pairs)) if pairs != () else Ordered()


def _dict(budget: Budget, pairs: Any = ()) -> dict[Any, Any]:
    return dict(_pairs(budget, pairs))


def _defaultdict(budget: Budget, factory: Any = None, pairs: Any = ()) -> dict[Any, Any]:
    return _dict(budget, pairs)


def _pairs(budget: Budget, pairs: Any) -> list[tuple[Any, Any]]:
    found = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not isinstance(found, (list, tuple)):
        raise CorruptError("a dict that is made from neither a dict nor pairs")
    budget.charge(120 * len(found))
    result = []
    for pair in found:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise CorruptError("a dict that is made from something other than pairs")
        result.append((pair[0], pair[1]))
    budget.charge_keys(key for key, _ in result)
    return result


def _list(budget: Budget, items: Any = ()) -> list[Any]:
    return _members(budget, items)


def _set(budget: Budget, items: Any = ()) -> set[Any]:
    members = _members(budget, items)
    budget.charge_keys(members)
    return set(members)


def _frozenset(budget: Budget, items: Any = ()) -> frozenset[Any]:
    return frozenset(_set(budget, items))


def _members(budget: Budget, items: Any) -> list[Any]:
    if not isinstance(items, (list, tuple, set, frozenset)):
        raise CorruptError("a set or list that is made from neither")
    budget.charge(60 * len(items))
    return list(items)


def _bytes(budget: Budget, value: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(value, str):
        return _encode(budget, value, encoding)
    if not isinstance(value, (bytes, bytearray)):
        raise CorruptError("bytes that are made from neither bytes nor text")
    budget.charge(len(value))
    return bytes(value)


def _bytearray(budget: Budget, value: Any = b"", encoding: Any = None) -> bytearray:
    return bytearray(_bytes(budget, value, encoding))


def _encode(budget: Budget, text: Any, encoding: Any = "latin1", errors: Any = "strict") -> bytes:
    if not isinstance(text, str):
        raise CorruptError("bytes that are made from something other than text")
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise TypeError("an encoding that no pickler uses")
    budget.charge(len(text))
    return text.encode("latin1")


def _complex(budget: Budget, real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if type(real) not in (int, float) or type(imaginary) not in (int, float):
        raise CorruptError("a complex number that is made from something other than numbers")
    return complex(real, imaginary)


def _text(budget: Budget, text: Any = "") -> Text:
    if not isinstance(text, str):
        raise CorruptError("a version that is no text")
    budget.charge(len(text))
    return Text(text)


def _time(kind: type) -> Callable[..., Any]:
    def build(budget: Budget, *args: Any) -> Any:
        for arg in args:
            if arg is not None and not isinstance(arg, (int, float, str, bytes, *_TIME_PARTS)):
                raise CorruptError(f"a {kind.__name__} that is made from something else")
        first = args[0] if args else None
        if isinstance(first, str) and kind is not datetime.timezone:
            # Python 2 wrote the state as text.
            args = (_encode(budget, first), *args[1:])
        return kind(*args)

    return build


BUILDERS: dict[str, Callable[..., Any]] = {
    **TENSOR_BUILDERS,
    **NUMPY_BUILDERS,
    "torch.Size": torch_size,
    "torch.torch_version.TorchVersion": _text,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _defaultdict,
    "collections.Counter": _dict,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.set": _set,
    "builtins.frozenset": _frozenset,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytearray,
    "builtins.complex": _complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _newobj,
    "copyreg.__newobj_ex__": _newobj_ex,
    "datetime.timedelta": _time(datetime.timedelta),
    "datetime.datetime": _time(datetime.datetime),
    "datetime.date": _time(datetime.date),
    "datetime.time": _time(datetime.time),
    "datetime.timezone": _time(datetime.timezone),
}
"""By the name of the function or class that the pickle calls; the first argument is the file's `Budget`."""
