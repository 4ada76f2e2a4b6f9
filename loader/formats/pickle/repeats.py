"""Recognises stretches of a pickle that repeat, so that the scan follows each kind of them once. Free of torch.

A checkpoint's pickle says the same of each of a hundred thousand tensors. Between one text and the next, such as names
and the keys of storages, the opcodes are the same, and so is what they read of the memo; numbers differ, which the scan
does not look at, and the index at which the memo goes on. So what the scan finds of such a stretch is the same too:
which entries it takes off the stack and puts there, what it adds to the memo, and how much memory that takes.

`Repeats.follow` is called after each text. Where the bytes that follow, and the top of the stack, are those of a
`Stretch` that is known, it does at once what the scan would do opcode by opcode, and goes on with what comes after it.
What is new is scanned by itself, by the very function of the scan, with the top of the stack alone; a stretch is known
from then on if that finds no fault. It is not one where an opcode takes more text, or anything that depends on what
came before the top of the stack.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RankloadError
from .opcodes import ARGUMENT_SIZE, COST, LENGTH_SIZE, PUSHED, SHORT_TEXT, STEPS, Step

_LONGEST = 512
"""Bytes of a stretch, at most."""
_LEAST_OPCODES = 6
"""Of fewer, the scan takes no longer than a comparison."""
_MOST_MEMORY = 320
"""More bytes of memory than any byte of a stretch is counted as."""
_TEXT_WIDTH = {code: LENGTH_SIZE[code] for code in pickle.BINUNICODE + pickle.SHORT_BINUNICODE}
"""Bytes of the length of a text, by opcode."""
_KNOWN = 8
"""How many stretches are known at most; those that were met last."""
_DEPTHS = (1, 2, 4, 8, 16)
"""How much of the stack is tried as what a stretch begins with."""
_FREE_TRIES = 64
_HITS_A_TRY = 64
"""Stretches are looked for `_FREE_TRIES` times in vain, and once more for each `_HITS_A_TRY` that were met again."""
_PLAIN = frozenset(
    {
        Step.MARK,
        Step.TUPLE,
        Step.CALL,
        Step.PERSISTENT,
        Step.FILL,
        Step.FILL_ONE,
        Step.BUILD,
        Step.POP,
        Step.DUP,
        Step.STACK_GLOBAL,
    }
)
"""What opcodes do that have no argument; a stretch has these, and those that push, and read or fill the memo."""


@dataclass(slots=True)
class Scanned:
    """What the scan keeps while it follows the opcodes. All of it changes as it goes on."""

    stack: list[int]
    marks: list[int]
    memo: list[int]
    new_calls: list[int]
    memory: int = 0
    hashed: bool = False
    """Whether keys were met that take work to hash."""
    shares: bool = False
    """Whether something was used again that holds others."""


Scan = Callable[[Scanned, int, int], None]
"""Scans the bytes from one position up to another, as the part of the pickle that it is in. Raises `RankloadError`."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """Opcodes that repeat, and what the scan finds of them. Positions on the stack count from where `before` begins."""

    size: int
    """Of all its bytes."""
    memory: int
    mask: int
    """Which of its bytes count, as a number whose first byte is the lowest: all but those of numbers."""
    bytes: int
    """Those bytes, where the memo is empty before it."""
    places: int
    """Has a 1 where it states the index in the memo at which something is put, which grows with the memo."""
    most_places: int
    """How long the memo can be before it, so that the last index still has room in its bytes."""
    before: list[int]
    """What is on top of the stack."""
    marks_before: tuple[int, ...]
    after: list[int]
    marks_after: tuple[int, ...]
    memo: list[int]
    """What it adds to the memo."""
    new_calls: tuple[int, ...]
    """Offsets in it of the opcodes that ask for ``cls.__new__``."""
    shares: bool


class Repeats:
    """The stretches of one pickle that are known so far."""

    def __init__(self, data: bytes, scanned: Scanned, memory_limit: int, scan: Scan) -> None:
        self._data = data
        self._scanned = scanned
        self._limit = memory_limit
        self._scan = scan
        self._known: list[Stretch] = []
        self._hits = 0
        self._tries = 0

    def forget(self) -> None:
        """To be called where an entry of the memo changes, which stretches may read."""
        self._known.clear()

    def follow(self, pos: int, memory: int) -> tuple[int, int]:
        """Follows the stretch at `pos`, and the stretches and short texts that come after it, as far as they are known.

        `memory` is the bytes that were counted so far. The memo must have no gaps. Returns where the scan goes on, and
        what is counted up to there: what was given, where no stretch is known that fits.
        """
        data, limit, known = self._data, self._limit, self._known
        stack, memo, marks = self._scanned.stack, self._scanned.memo, self._scanned.marks
        while True:
            first = len(memo)
            for one in known:
                size = one.size
                if (
                    pos + size > len(data)
                    or memory + _MOST_MEMORY * size > limit
                    or first > one.most_places
                    or int.from_bytes(data[pos : pos + size], "little") & one.mask
                    != one.bytes + first * one.places
                ):
                    continue
                base = len(stack) - len(one.before)
                if base >= 0 and stack[base:] == one.before and _has_marks(marks, one.marks_before, base):
                    break
            else:
                if self._tries < _FREE_TRIES + self._hits // _HITS_A_TRY:
                    self._tries += 1
                    self._learn(pos)
                return pos, memory
            stack[base:] = one.after
            memo += one.memo
            if one.marks_before != one.marks_after:
                del marks[len(marks) - len(one.marks_before) :]
                marks.extend([base + each for each in one.marks_after])
            if one.new_calls:
                self._scanned.new_calls.extend([pos + each for each in one.new_calls])
            if one.shares:
                self._scanned.shares = True
            if one is not known[0]:
                known.remove(one)
                known.insert(0, one)
            self._hits += 1
            pos += size
            memory += one.memory
            op = data[pos] if pos < len(data) else 0
            width = _TEXT_WIDTH.get(op)
            if width is None:
                continue
            text = pos + 1 + width
            size = int.from_bytes(data[pos + 1 : text], "little")
            counted = memory + COST[op] + size
            if size >= SHORT_TEXT or text + size > len(data) or counted > limit:
                return pos, memory  # the scan judges it
            stack.append(PUSHED[op])
            pos, memory = text + size, counted

    def _learn(self, pos: int) -> None:
        """Looks for a stretch at `pos`, as if nothing were known of it."""
        outline = _outline(self._data, pos, len(self._scanned.memo))
        if outline is None:
            return
        stack, marks = self._scanned.stack, self._scanned.marks
        for depth in _DEPTHS:
            base = len(stack) - depth
            if base < 0:
                return
            # More marks than that have nothing between them.
            own = tuple(mark - base for mark in marks[-_DEPTHS[-1] :] if mark >= base)
            found = self._scanned_alone(pos, outline, stack[base:], own)
            if found is not None:
                self._known.insert(0, found)
                del self._known[_KNOWN:]
                return

    def _scanned_alone(
        self, pos: int, outline: _Outline, before: list[int], marks: tuple[int, ...]
    ) -> Stretch | None:
        """The stretch at `pos`, where scanning it with the stack and marks `before` alone finds no fault."""
        memo = self._scanned.memo
        first = len(memo)
        # It only adds to the memo, which is long: what it adds is taken off again.
        alone = Scanned(list(before), list(marks), memo, [])
        try:
            self._scan(alone, pos, pos + outline.size)
            added = memo[first:]
        except RankloadError:
            return None
        finally:
            del memo[first:]
        if alone.hashed or len(added) != outline.puts:
            return None
        return Stretch(
            outline.size,
            alone.memory,
            outline.mask,
            outline.bytes,
            outline.places,
            outline.most_places,
            before,
            marks,
            alone.stack,
            tuple(alone.marks),
            added,
            tuple(each - pos for each in alone.new_calls),
            alone.shares,
        )


def _has_marks(marks: list[int], wanted: tuple[int, ...], base: int) -> bool:
    """Whether the `marks` at `base` and above are those `wanted`."""
    if not wanted:
        return not marks or marks[-1] < base
    others = len(marks) - len(wanted)
    if others < 0 or (others and marks[others - 1] >= base):
        return False
    return marks[others:] == [base + each for each in wanted]


@dataclass(frozen=True, slots=True)
class _Outline:
    """The bytes of a stretch, as `Stretch` has them."""

    size: int
    puts: int
    """How many entries it adds to the memo."""
    mask: int
    bytes: int
    places: int
    most_places: int


def _outline(data: bytes, pos: int, index: int) -> _Outline | None:
    """The outline of the stretch that begins at `pos`, where the memo has `index` entries; None where there is none."""
    begin, count, puts, stated = pos, 0, 0, 0
    mask = places = 0
    widest = 4
    stop = min(len(data), pos + _LONGEST)
    while pos < stop:
        op = data[pos]
        step, width = STEPS[op], ARGUMENT_SIZE[op]
        if pos + 1 + width > stop:
            break
        at = 8 * (pos - begin)
        if step == Step.PUT and width:
            if int.from_bytes(data[pos + 1 : pos + 1 + width], "little") != index + puts:
                break
            places |= 1 << (at + 8)
            widest = min(widest, width)
            stated += 1
        elif (
            step != Step.PUSH
            and step != Step.MEMOIZE
            and step not in _PLAIN
            and not (step == Step.GET and width)
        ):
            break
        puts += step == Step.PUT or step == Step.MEMOIZE
        counted = 1 if step == Step.PUSH else 1 + width
        mask |= ((1 << 8 * counted) - 1) << at
        pos += 1 + width
        count += 1
    if count < _LEAST_OPCODES or (stated and stated != puts):
        return None
    read = int.from_bytes(data[begin:pos], "little") & mask
    return _Outline(pos - begin, puts, mask, read - index * places, places, (1 << 8 * widest) - puts)
