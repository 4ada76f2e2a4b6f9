"""What the scan of a pickle says when it stops. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ...errors import CorruptError, UnsafeError


class TruncatedPickleError(CorruptError):
    """The pickle goes on past the bytes at hand. Never leaves the modules that scan."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Raises errors that name the file and the byte; positions count from the first scanned byte."""

    name: str
    base: int
    """Offset of the first scanned byte in the file."""
    size: int

    def where(self, pos: int) -> str:
        return f"{self.name}: the pickle at byte {self.base + pos:,}"

    def corrupt(self, pos: int, text: str) -> NoReturn:
        raise CorruptError(f"{self.where(pos)}: {text}. The file is damaged; fetch it again.", path=self.name)

    def underflow(self, pos: int) -> NoReturn:
        self.corrupt(pos, "it takes more from its stack than it put there")

    def truncated(self, pos: int, length: int | None = None) -> NoReturn:
        wants = "goes on" if length is None else f"asks for {length:,} bytes"
        raise TruncatedPickleError(
            f"{self.where(pos)}: {wants}, but only {max(0, self.size - pos):,} bytes are left. "
            "The file is truncated or damaged; fetch it again.",
            path=self.name,
        )

    def unsafe(self, pos: int, text: str) -> NoReturn:
        raise UnsafeError(
            f"{self.where(pos)}: {text}. No checkpoint is written that way: do not trust this file.",
            path=self.name,
        )
