"""Turns values into JSON types, and back by their type hints, for ranks to send to each other. Pure.

A dataclass or NamedTuple is the list of its fields, in order; a tuple, list or set is a list; a mapping is a list of
pairs. `encode` goes by the value alone, `decode` by type hints: those of dataclasses and NamedTuples, ``list[X]``,
``tuple[X, ...]``, ``tuple[X, Y]``, ``Sequence[X]`` (a tuple), ``frozenset[X]``, ``dict[K, V]``, ``Mapping[K, V]`` (a
dict), ``X | None``, ``Literal``, the plain types None, bool, int, float and str, and unions of these.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Json = Any
"""What ``json.dumps`` takes."""
T = TypeVar("T")

_NONE = type(None)
_PLAIN = frozenset({_NONE, bool, int, float, str})
_EXACT: Mapping[type, Callable[[Any], Json]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
}
"""What makes a plain value of one whose class is derived from a plain type, as NumPy's are and enumerations may be."""
_LISTS: Mapping[Any, Callable[[Iterable[Any]], Any]] = {
    list: list,
    tuple: tuple,
    collections.abc.Sequence: tuple,
    frozenset: frozenset,
}
"""Hints for items that are all of one type, and what is made of these."""
_MAPPINGS = (dict, collections.abc.Mapping)

_Decoder = Callable[[Json], Any]


def encode(value: Any) -> Json:
    """`value` as JSON types. Raises `TypeError` for what `decode` could not make again."""
    kind: Any = type(value)
    return _encoder(kind)(value)


def decode(kind: type[T], record: Json) -> T:
    """The value of type `kind` that `encode` made `record` of.

    Raises `ValueError` that names the class and field where `record` has another length or other types than `kind`: a
    rank with another version of this package may have sent it. Raises `TypeError` for a hint that it does not know.
    """
    hint: Any = kind
    decoded: T = _decoder(hint)(record)
    return decoded


@functools.cache
def _encoder(kind: Any) -> Callable[[Any], Json]:
    if kind in _PLAIN:
        return _same
    for plain, exact in _EXACT.items():
        if issubclass(kind, plain):
            return exact
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        return lambda value: [encode(getattr(value, name)) for name in names]
    if issubclass(kind, list | tuple | set | frozenset):
        return _encode_items
    if issubclass(kind, collections.abc.Mapping):
        return lambda value: [[encode(key), encode(item)] for key, item in value.items()]
    raise TypeError(f"a value of type {kind.__qualname__} cannot be sent to other ranks")


def _same(value: Any) -> Any:
    return value


def _encode_items(items: Iterable[Any]) -> list[Json]:
    items = list(items)
    kinds = set(map(type, items))
    if kinds <= _PLAIN:
        return items
    if len(kinds) == 1:
        return list(map(_encoder(kinds.pop()), items))
    return list(map(encode, items))


@functools.cache
def _decoder(hint: Any) -> _Decoder:
    """What makes a value of type `hint` of its record; raises `ValueError` where it cannot."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments)
    if origin is typing.Literal:
        return _literal(arguments)
    if origin is tuple and arguments[-1:] != (...,):
        return _fixed(arguments)
    if origin in _LISTS:
        return _items(_LISTS[origin], _decoder(arguments[0]))
    if origin in _MAPPINGS:
        return _pairs(_fixed(arguments))
    if hint is None or hint in _PLAIN:
        return _plain(frozenset({_NONE if hint is None else hint}))
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_fields")):
        return _fields(hint)
    raise TypeError(f"values of type {hint} cannot be made of what another rank has sent")


def _plain(kinds: frozenset[type]) -> _Decoder:
    # A value declared as a float may be an int, as for type checkers; a bool is neither.
    taken = kinds | {int} if float in kinds else kinds
    expected = " or ".join(sorted("None" if kind is _NONE else kind.__name__ for kind in kinds))

    def run(record: Json) -> Any:
        if type(record) not in taken:
            raise ValueError(f"expected {expected}, got {_shown(record)}")
        return record

    return run


def _union(hints: tuple[Any, ...]) -> _Decoder:
    kinds = frozenset(hints)
    if kinds <= _PLAIN:
        return _plain(kinds)
    others = [hint for hint in hints if hint is not _NONE]
    if len(others) > 1:
        raise TypeError(f"values of any of {others} cannot be told apart once they are sent")
    inner = _decoder(others[0])
    return lambda record: None if record is None else inner(record)


def _literal(values: tuple[Any, ...]) -> _Decoder:
    known = {(type(value), value) for value in values}

    def run(record: Json) -> Any:
        if type(record) not in _PLAIN or (type(record), record) not in known:
            raise ValueError(f"expected one of {', '.join(map(repr, values))}, got {_shown(record)}")
        return record

    return run


def _items(make: Callable[[Iterable[Any]], Any], inner: _Decoder) -> _Decoder:
    def run(record: Json) -> Any:
        if type(record) is not list:
            raise ValueError(f"expected a list, got {_shown(record)}")
        return make(map(inner, record))

    return run


def _fixed(hints: tuple[Any, ...]) -> _Decoder:
    inner = [_decoder(hint) for hint in hints]

    def run(record: Json) -> Any:
        if type(record) is not list or len(record) != len(inner):
            raise ValueError(f"expected a list of {len(inner)} items, got {_shown(record)}")
        return tuple(decode_one(one) for decode_one, one in zip(inner, record, strict=True))

    return run


def _pairs(pair: _Decoder) -> _Decoder:
    decode_all = _items(dict, pair)

    def run(record: Json) -> Any:
        made = decode_all(record)
        if len(made) != len(record):
            raise ValueError(f"has a key twice among {len(record)}")
        return made

    return run


def _fields(kind: Any) -> _Decoder:
    hints = typing.get_type_hints(kind)
    names = (
        [field.name for field in dataclasses.fields(kind)]
        if dataclasses.is_dataclass(kind)
        else list(kind._fields)
    )
    try:
        fields = [(name, _decoder(hints[name])) for name in names]
    except TypeError as error:
        raise TypeError(f"{kind.__qualname__}: {error}") from error
    exact = [hints[name] for name in names]
    plain = all(hint in _PLAIN for hint in exact)

    def make(values: dict[str, Any]) -> Any:
        try:
            return kind(**values)
        except ValueError as error:
            raise ValueError(f"{kind.__qualname__}: {error}") from error

    def run(record: Json) -> Any:
        # Thousands of byte ranges arrive at once: those whose fields are just as declared need no look at each.
        if plain and type(record) is list and list(map(type, record)) == exact:
            return make(dict(zip(names, record, strict=True)))
        if type(record) is not list or len(record) != len(fields):
            raise ValueError(
                f"{kind.__qualname__}: expected its {len(fields)} fields as a list, got {_shown(record)}"
            )
        values = {}
        for (name, decode_field), one in zip(fields, record, strict=True):
            try:
                values[name] = decode_field(one)
            except ValueError as error:
                raise ValueError(f"{kind.__qualname__}.{name}: {error}") from error
        return make(values)

    return run


def _shown(record: Json) -> str:
    """What messages call a record: never its text, which may be long, or a secret."""
    if isinstance(record, list):
        return f"a list of {len(record)}"
    return "None" if record is None else f"a value of type {type(record).__name__}"
