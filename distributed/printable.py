"""Makes text fit for a terminal and a log: what others chose (keys, file names, hosts, answers) may hold anything.

`printable` escapes what could change what is shown, or end a line and begin another in our name. Every `RankloadError`
does so with its message, `warn` with a warning, and the package's logger (`package_logger`) with what it is given.
Text of several lines is `Lines`: each of them was made printable before they were joined.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line breaks, marks that turn the direction of what follows, and halves of surrogate pairs, which
no stream takes."""


class Lines(str):
    """Text of several lines, each of which is printable."""

    __slots__ = ()

    def __new__(cls, lines: Iterable[str]) -> Lines:
        return super().__new__(cls, "\n".join(map(_escaped, lines)))

    @classmethod
    def of(cls, text: str) -> Lines:
        """`text` whose line breaks are our own: what others chose was made printable before."""
        return cls(text.split("\n"))

    def __add__(self, more: str) -> Lines:
        return Lines.of(f"{self!s}{printable(more)}")


def printable(text: str) -> str:
    """`text` with control characters, line breaks too, as Python writes them; `Lines` stay as they are."""
    return text if isinstance(text, Lines) else _escaped(text)


def warn(message: str, stacklevel: int = 1) -> None:
    """As ``warnings.warn``, with a printable `message`."""
    warnings.warn(printable(message), stacklevel=stacklevel + 1)


def package_logger() -> logging.Logger:
    """The logger ``rankload``, which makes its arguments printable."""
    logger = logging.getLogger("rankload")
    logger.addFilter(_ESCAPING)  # once, however often it is called
    return logger


class _Escaping(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(map(_argument, record.args))
        return True


_ESCAPING = _Escaping()


def _argument(value: Any) -> Any:
    return printable(str(value)) if isinstance(value, str | BaseException) else value


def _escaped(text: str) -> str:
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)
