"""The arguments that follow a pickle's opcodes: lines of text, memo indices, strings. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from .faults import Faults


@dataclass(frozen=True, slots=True)
class Arguments:
    """Reads arguments from the scanned bytes."""

    data: bytes
    faults: Faults

    def text_memory(self, pos: int, length: int) -> int:
        """Bytes that a string takes in memory: one character beyond Latin-1 widens all of them."""
        return length if self.data[pos : pos + length].isascii() else 4 * length

    def index(self, pos: int, width: int) -> tuple[int, int]:
        """The memo index at `pos`, of that many bytes or, for 0, a line of text; and where it ends."""
        if width:
            return int.from_bytes(self.data[pos : pos + width], "little"), pos + width
        end = self.line(pos, 20)
        text = self.data[pos : end - 1]
        if not text.isdigit():
            self.faults.corrupt(pos, "a memo index that is no number")
        return int(text), end

    def line(self, pos: int, limit: int) -> int:
        """Offset just past the line that begins at `pos`."""
        end = self.data.find(b"\n", pos, pos + limit + 1)
        if end < 0:
            if pos + limit + 1 >= len(self.data):
                self.faults.truncated(pos)
            self.faults.corrupt(pos, f"a line of more than {limit} bytes")
        return end + 1
