"""Parses JSON that a file holds: within bounds, with no key twice and no number that JSON lacks. Free of torch."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ..errors import CorruptError, UnsafeError

_MOST_VALUES = 4_000_000
"""How many values a text may have: each takes up to some hundred bytes of memory once it is parsed."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, *, name: str, what: str, finite: bool = True) -> Any:
    """The value of the JSON text `data`, which messages call `what` of the file `name`.

    Unless `finite`, numbers may be ``NaN`` and ``Infinity``, which Python writes for floats that are.

    Raises `CorruptError` where it is no JSON in UTF-8, or an object has a key twice, and `UnsafeError` where it has
    more values than a checkpoint can need.
    """
    # Every value but the first follows one of these bytes, which strings may hold too.
    if data.count(b",") + data.count(b"[") + data.count(b"{") > _MOST_VALUES:
        raise UnsafeError(
            f"{name}: {what} has more than {_MOST_VALUES:,} values. No checkpoint is written that way: do not trust "
            "this file.",
            path=name,
        )
    try:
        text = data.decode("utf-8")
        refuse = _refuse_constant if finite else None
        value = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=refuse)
        if _SURROGATE.search(text):
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # raises for a half of a pair, which no text can hold
    except (ValueError, RecursionError) as error:
        problem = "it nests too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise CorruptError(
            f"{name}: {what} is no JSON that can be read: {problem}. The file is damaged; take another copy of it.",
            path=name,
        ) from None
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
    return found


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
