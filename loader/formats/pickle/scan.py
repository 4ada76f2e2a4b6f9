"""Checks a pickle's opcodes in one pass, before anything is unpickled. Free of torch.

Python's unpickler trusts lengths, memo indices and nesting: nine bytes can ask it for gigabytes, and a few hundred
bytes of nested tuples can keep it hashing for ever. The scan follows the opcodes as the unpickler would, but with an
integer, called an entry, in place of each object. It refuses what no pickler writes, and makes no object of the file's.

An entry has the object's kind in bits 0 to 2 (`opcodes.LEAF` and so on), `opcodes.CRAFTED` in bit 3, its weight in bits
4 to 47 (for a tuple, how many objects hashing it visits), and from bit 48 on how deep the object nests others.

`_follow` keeps the stack, the marks and the memo; `_Entries` makes entries, `_Arguments` reads what follows an opcode,
and `_Faults` raises the errors. Which classes and functions the pickle names does not matter here: see `read`.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import NoReturn

from ...errors import CorruptError, RankloadError, UnsafeError
from ...saved.tree import BOUND
from .budget import MAX_CRAFTED_KEYS
from .opcodes import (
    ARGUMENT_SIZE,
    COST,
    CRAFTED,
    DICT,
    GLOBAL,
    KIND_MASK,
    LEAF,
    LENGTH_SIGNED,
    LENGTH_SIZE,
    LIST,
    MAX_NAME,
    OBJECT,
    PUSHED,
    SET,
    SHORT_TEXT,
    STACK_PLACE,
    STEPS,
    TUPLE,
    Step,
)
from .repeats import Repeats, Scanned

MAX_NUMBER_TEXT = 4300
"""Characters in a number written as text; Python's own limit for conversions."""
MAX_NUMBER_BYTES = 1785
"""Bytes of an integer that is not text: as many have fewer digits than that, so that Python can put any into words."""
MAX_PROTOCOL = 5

_REMEMBERED_BYTES = 4 << 10
"""Pickles up to this size are scanned once: in a folder with thousands of tensors of one shape, theirs are the same."""
MAX_DEPTH = 200
"""Containers inside one another; real checkpoints stay below 20."""
_WEIGHT_SHIFT = 4
_DEPTH_SHIFT = 48
_DEPTH_ONE = 1 << _DEPTH_SHIFT
_WEIGHT_MASK = (1 << (_DEPTH_SHIFT - _WEIGHT_SHIFT)) - 1
_SMALL_WEIGHT = 16
"""Of a tuple that may be used again as often as the pickle likes: `saved.tree.check_tree` lets each value be 16."""
_TOO_DEEP = (MAX_DEPTH + 1) << _DEPTH_SHIFT


@dataclass(frozen=True, slots=True)
class PickleScan:
    """A pickle that passed the scan: where it ends, and what loading it takes."""

    end: int
    """Offset just past the pickle's STOP, in the bytes that were scanned."""
    new_calls: tuple[int, ...]
    """Offsets of the opcodes that ask for ``cls.__new__``."""
    frames: tuple[int, ...]
    """Offsets of the opcodes that state how many bytes the next frame has."""
    memory: int
    """About how many bytes the unpickled objects take."""
    shares: bool
    """Whether anything but short, flat tuples is used twice. A tree where nothing is can be walked: it has no cycles,
    and no more values than the pickle has opcodes."""


def scan_pickle(
    data: bytes, *, name: str, start: int = 0, base: int = 0, memory_limit: int, inert: bool = False
) -> PickleScan:
    """Checks the pickle that begins at ``data[start]``, up to its STOP.

    ``name`` and ``base`` (the offset of ``data[0]`` in the file) are for messages. `inert`: it will be read with every
    call as an inert object (`read.read_pickle`); those hash by identity, so that any number may be keys. Takes under a
    microsecond per opcode, and memory in proportion to the bytes seen.

    Raises `UnsafeError` where the pickle asks for more memory than ``memory_limit`` bytes, nests too deeply,
    hashes without end, sets the state of a class or function, or uses opcodes that reach outside the file;
    `CorruptError` where it is no pickle, or the bytes end before it does.
    """
    made_by_call = 0 if inert else CRAFTED
    try:
        if len(data) <= _REMEMBERED_BYTES:
            # What is refused is not remembered, and refused again below, where messages have its own name.
            with contextlib.suppress(RankloadError):
                return _follow_small(data, start, memory_limit, made_by_call)
        return _follow(data, start, _Faults(name, base, len(data)), memory_limit, made_by_call)
    except _TruncatedPickleError as error:
        raise CorruptError(error.message, path=error.path) from None


@functools.lru_cache(maxsize=64)
def _follow_small(data: bytes, start: int, memory_limit: int, made_by_call: int) -> PickleScan:
    return _follow(data, start, _Faults("", 0, len(data)), memory_limit, made_by_call)


def scan_beginning(data: bytes, *, name: str, start: int = 0, memory_limit: int) -> PickleScan | None:
    """As `scan_pickle`, for bytes that may end before the pickle does; returns None where they do."""
    try:
        return _follow(data, start, _Faults(name, 0, len(data)), memory_limit, CRAFTED)
    except _TruncatedPickleError:
        return None


def _follow(data: bytes, start: int, faults: _Faults, memory_limit: int, made_by_call: int) -> PickleScan:
    scanned = Scanned([], [], [], [])
    entries = _Entries(faults)

    def scan_part(part: Scanned, pos: int, stop: int) -> None:
        alone = _Entries(faults)
        _follow_from(data, start, pos, stop, part, None, alone, memory_limit, made_by_call)
        part.hashed = bool(alone.hash_work or alone.crafted_keys)

    repeats = Repeats(data, scanned, memory_limit, scan_part) if len(data) > _REMEMBERED_BYTES else None
    end, frames = _follow_from(
        data, start, start, None, scanned, repeats, entries, memory_limit, made_by_call
    )
    return PickleScan(end, tuple(scanned.new_calls), tuple(frames), scanned.memory, scanned.shares)


def _follow_from(
    data: bytes,
    start: int,
    pos: int,
    stop: int | None,
    scanned: Scanned,
    repeats: Repeats | None,
    entries: _Entries,
    memory_limit: int,
    made_by_call: int,
) -> tuple[int, list[int]]:
    """Follows the opcodes of the pickle that begins at `start`, from `pos` on: up to `stop`, else past its STOP.

    Returns where it ended, and the offsets of the frames. The memo in `scanned` must have no gaps.
    """
    # One long loop, since a call for each opcode would take longer than the opcode itself.
    faults = entries.faults
    arguments = _Arguments(data, faults)
    size = len(data) if stop is None else stop
    stack, marks, memo, new_calls = scanned.stack, scanned.marks, scanned.memo, scanned.new_calls
    fence = marks[-1] if marks else 0
    gaps = 0
    frames: list[int] = []
    memory = scanned.memory
    step_of, pushed, argument_size, cost = STEPS, PUSHED, ARGUMENT_SIZE, COST

    while True:
        if pos >= size:
            if pos == stop:
                scanned.memory = memory
                return pos, frames
            faults.truncated(pos)
        at = pos
        op = data[pos]
        pos += 1
        step = step_of[op]
        memory += cost[op]
        if memory > memory_limit:
            faults.beyond(
                at,
                f"its objects would take more than {memory_limit:,} bytes, for {size:,} bytes of pickle",
            )

        if step == Step.PUSH:
            stack.append(pushed[op])
            pos += argument_size[op]

        elif step == Step.PUT or step == Step.MEMOIZE:
            if step == Step.MEMOIZE:
                index = len(memo) - gaps
            elif width := argument_size[op]:
                index = int.from_bytes(data[pos : pos + width], "little")
                pos += width
            else:
                index, pos = arguments.index(pos)
            if len(stack) <= fence:
                faults.underflow(at)
            # A pickler numbers its memo from 0 upward, and every entry takes two bytes or more.
            if index > at - start:
                faults.unsafe(at, f"memo index {index:,} lies beyond the number of bytes so far")
            if index < len(memo):
                if memo[index] < 0:
                    gaps -= 1
                elif repeats is not None and memo[index] != stack[-1]:
                    repeats.forget()
                memo[index] = stack[-1]
            else:
                grown = index + 1 - len(memo)
                memory += 24 * grown
                if memory > memory_limit:
                    faults.beyond(at, f"memo index {index:,} would take more than {memory_limit:,} bytes")
                memo.extend([-1] * grown)
                memo[index] = stack[-1]
                gaps += grown - 1

        elif step == Step.GET:
            if width := argument_size[op]:
                index = int.from_bytes(data[pos : pos + width], "little")
                pos += width
            else:
                index, pos = arguments.index(pos)
            if index >= len(memo) or memo[index] < 0:
                faults.corrupt(at, f"memo entry {index:,} is read before it is set")
            entry = memo[index]
            if entry != LEAF and entry != GLOBAL and not _is_small(entry):
                scanned.shares = True
            stack.append(entry)

        elif step == Step.MARK:
            marks.append(len(stack))
            fence = len(stack)

        elif step == Step.COUNTED:
            width = LENGTH_SIZE[op]
            if pos + width > size:
                faults.truncated(at)
            length = int.from_bytes(data[pos : pos + width], "little", signed=LENGTH_SIGNED[op])
            pos += width
            if length < 0:
                faults.corrupt(at, f"a length of {length}")
            if length > size - pos:
                faults.truncated(at, length)
            if op in b"\x8a\x8b" and length > MAX_NUMBER_BYTES:
                faults.unsafe(at, f"a number of {length:,} bytes; expected at most {MAX_NUMBER_BYTES:,}")
            memory += (
                length if length < SHORT_TEXT or op in b"BC\x8e\x96" else arguments.text_memory(pos, length)
            )
            # Integers hash to themselves modulo a prime of 61 bits: more than a few collide only where they are longer.
            stack.append(CRAFTED if op in b"\x8a\x8b" and length > 8 else pushed[op])
            pos += length
            if repeats is not None and not gaps:
                pos, memory = repeats.follow(pos, memory)
                fence = marks[-1] if marks else 0

        elif step == Step.TUPLE:
            if op == 0x74:  # t: everything above the mark
                if not marks:
                    faults.underflow(at)
                first = marks.pop()
                fence = marks[-1] if marks else 0
            else:
                first = len(stack) - (op - 0x84)
                if first < fence:
                    faults.underflow(at)
            items = stack[first:]
            del stack[first:]
            memory -= (STACK_PLACE - 8) * len(items)
            stack.append(entries.tuple_of(at, items))

        elif step == Step.CALL:
            needed = 3 if op == 0x92 else 2
            if len(stack) - needed < fence:
                faults.underflow(at)
            callee = stack[-needed] & KIND_MASK
            if callee != GLOBAL and callee != OBJECT:
                faults.corrupt(at, "a call of something that is no class or function")
            deepest = max(stack[-needed:])
            del stack[-needed:]
            memory -= STACK_PLACE * needed
            stack.append(entries.nested(at, deepest, OBJECT | made_by_call))
            if op != 0x52:
                new_calls.append(at)

        elif step == Step.PERSISTENT:
            if len(stack) <= fence:
                faults.underflow(at)
            stack[-1] = entries.nested(at, stack[-1], OBJECT | CRAFTED)

        elif step == Step.FILL:  # many at once: APPENDS, SETITEMS, ADDITEMS
            if not marks:
                faults.underflow(at)
            first = marks.pop()
            fence = marks[-1] if marks else 0
            if first - 1 < fence:
                faults.underflow(at)
            memory += entries.fill(at, stack, first, op)

        elif step == Step.FILL_ONE:  # a: APPEND, s: SETITEM
            first = len(stack) - (1 if op == 0x61 else 2)
            if first - 1 < fence:
                faults.underflow(at)
            memory += entries.fill(at, stack, first, op)

        elif step == Step.BUILD:
            if len(stack) - 2 < fence:
                faults.underflow(at)
            state = stack.pop()
            memory -= STACK_PLACE
            if stack[-1] & KIND_MASK != OBJECT:
                # A class or function has one state for all its uses, which must not change.
                faults.unsafe(at, "it sets the state of something that is no object of its own")
            crafted = stack[-1] & CRAFTED
            stack[-1] = entries.nested(at, max(state, stack[-1] - _DEPTH_ONE), OBJECT | crafted)

        elif step == Step.STACK_GLOBAL:
            if len(stack) - 2 < fence:
                faults.underflow(at)
            stack.pop()
            stack[-1] = GLOBAL

        elif step == Step.GLOBAL:
            pos = arguments.line(arguments.line(pos, MAX_NAME), MAX_NAME)
            stack.append(GLOBAL)

        elif step == Step.LINE:
            begin = pos
            limit = MAX_NUMBER_TEXT if op in b"ILF" else size
            pos = arguments.line(pos, limit)
            memory += 4 * (pos - begin)
            stack.append(OBJECT | CRAFTED if op == 0x50 else pushed[op])

        elif step == Step.COLLECT:  # l: LIST, d: DICT, o: OBJ, i: INST, FROZENSET, 1: POP_MARK
            if op == 0x69:
                pos = arguments.line(arguments.line(pos, MAX_NAME), MAX_NAME)
            if not marks:
                faults.underflow(at)
            first = marks.pop()
            fence = marks[-1] if marks else 0
            items = stack[first:]
            del stack[first:]
            memory -= STACK_PLACE * len(items)
            if op == 0x31:
                continue
            memory += 40 * len(items)
            stack.append(entries.collected(at, items, op))

        elif step == Step.POP:
            if marks and marks[-1] == len(stack):
                marks.pop()
                fence = marks[-1] if marks else 0
            elif len(stack) <= fence:
                faults.underflow(at)
            else:
                stack.pop()
                memory -= STACK_PLACE

        elif step == Step.DUP:
            if len(stack) <= fence:
                faults.underflow(at)
            scanned.shares = scanned.shares or not _is_small(stack[-1])
            stack.append(stack[-1])

        elif step == Step.FRAME:
            if pos + 8 > size:
                faults.truncated(at)
            length = int.from_bytes(data[pos : pos + 8], "little")
            frames.append(at)
            pos += 8
            if length > size - pos:
                faults.truncated(at, length)

        elif step == Step.PROTOCOL:
            if pos < size and data[pos] > MAX_PROTOCOL:
                faults.corrupt(at, f"pickle protocol {data[pos]}; the highest known is {MAX_PROTOCOL}")
            pos += 1

        elif step == Step.STOP:
            if len(stack) != 1 or marks:
                faults.corrupt(at, f"it ends with {len(stack)} objects on its stack; expected one")
            scanned.memory = memory
            return pos, frames

        elif step == Step.REFUSED:
            faults.unsafe(at, f"opcode 0x{op:02x} takes something from outside the file")
        else:
            faults.corrupt(at, f"0x{op:02x} is no opcode of a pickle")


def _is_small(entry: int) -> bool:
    """Whether using it again adds few values to the tree: what holds no others, or a flat tuple of a few of those."""
    kind = entry & KIND_MASK
    if kind == TUPLE:
        return entry < 2 * _DEPTH_ONE and (entry >> _WEIGHT_SHIFT) & _WEIGHT_MASK <= _SMALL_WEIGHT
    return kind in (LEAF, GLOBAL)


class _Entries:
    """Makes the entries of containers from those of their items, and counts what hashing would take."""

    def __init__(self, faults: _Faults) -> None:
        self.faults = faults
        self.hash_work = 0
        self.crafted_keys = 0

    def tuple_of(self, at: int, items: list[int]) -> int:
        """The entry of a tuple of `items`; it can be a key, so that it weighs what hashing it would visit."""
        weight = len(items) + 1
        crafted = 0
        deepest = 0
        for item in items:
            if item:
                weight += (item >> _WEIGHT_SHIFT) & _WEIGHT_MASK
                crafted |= item & CRAFTED
                deepest = max(deepest, item)
        return self.nested(at, deepest, min(weight, _WEIGHT_MASK) << _WEIGHT_SHIFT | crafted | TUPLE)

    def nested(self, at: int, deepest: int, outer: int) -> int:
        """The entry `outer`, one level above `deepest`, the largest entry of what it holds."""
        inside = (deepest >> _DEPTH_SHIFT) << _DEPTH_SHIFT if deepest > 0 else 0
        result = inside + _DEPTH_ONE + outer
        if result >= _TOO_DEEP:
            self.faults.beyond(at, f"it nests deeper than {MAX_DEPTH} levels")
        return result

    def fill(self, at: int, stack: list[int], first: int, op: int) -> int:
        """Puts ``stack[first:]`` into the container below; returns the bytes of memory that this takes."""
        items = stack[first:]
        del stack[first:]
        target = stack[-1]
        kind = target & KIND_MASK
        keyed = op == 0x75 or op == 0x73
        if kind != OBJECT and kind != (DICT if keyed else SET if op == 0x90 else LIST):
            self.faults.corrupt(at, "it fills something that is no container of that kind")
        if keyed:
            if len(items) % 2:
                self.faults.corrupt(at, "it sets a key without a value")
            self.hashed(at, items[::2])
        elif op == 0x90:
            self.hashed(at, items)
        if items:
            stack[-1] = max(target, self.nested(at, max(items), target & (_DEPTH_ONE - 1)))
        return ((60 if keyed or op == 0x90 else 9) - STACK_PLACE) * len(items)

    def collected(self, at: int, items: list[int], op: int) -> int:
        """The entry of what LIST, DICT, FROZENSET, OBJ or INST makes of `items`."""
        kind = {0x6C: LIST, 0x64: DICT, 0x91: OBJECT | CRAFTED}.get(op, OBJECT | CRAFTED)
        if op == 0x64:
            if len(items) % 2:
                self.faults.corrupt(at, "it makes a dict with a key without a value")
            self.hashed(at, items[::2])
        elif op == 0x91:
            self.hashed(at, items)
        elif op == 0x6F and (not items or items[0] & KIND_MASK not in (GLOBAL, OBJECT)):
            self.faults.corrupt(at, "a call of something that is no class or function")
        return self.nested(at, max(items, default=0), kind)

    def hashed(self, at: int, keys: list[int]) -> None:
        """Counts what hashing `keys` takes; refuses the pickle where that is beyond reason."""
        if not any(keys):
            return
        for key in keys:
            if key:
                self.hash_work += 1 + ((key >> _WEIGHT_SHIFT) & _WEIGHT_MASK)
                self.crafted_keys += bool(key & CRAFTED)
        if self.hash_work > 1_000_000 + 16 * self.faults.size or self.crafted_keys > MAX_CRAFTED_KEYS:
            self.faults.beyond(at, "its dict keys or set members would take too long to hash")


@dataclass(frozen=True, slots=True)
class _Arguments:
    """Reads opcodes' arguments from the scanned bytes."""

    data: bytes
    faults: _Faults

    def text_memory(self, pos: int, length: int) -> int:
        """Bytes that a string takes in memory: one character beyond Latin-1 widens all of them."""
        return length if self.data[pos : pos + length].isascii() else 4 * length

    def index(self, pos: int) -> tuple[int, int]:
        """The memo index in the line of text at `pos`, and where it ends."""
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


@dataclass(frozen=True, slots=True)
class _Faults:
    """Raises errors that name the file and the byte; positions are indices of ``data``."""

    name: str
    base: int
    """Offset of ``data[0]`` in the file."""
    size: int

    def where(self, pos: int) -> str:
        return f"{self.name}: the pickle at byte {self.base + pos:,}"

    def corrupt(self, pos: int, text: str) -> NoReturn:
        raise CorruptError(
            f"{self.where(pos)}: {text}. The file is damaged; take another copy of it.", path=self.name
        )

    def underflow(self, pos: int) -> NoReturn:
        self.corrupt(pos, "it takes more from its stack than it put there")

    def truncated(self, pos: int, length: int | None = None) -> NoReturn:
        wants = "goes on" if length is None else f"asks for {length:,} bytes"
        raise _TruncatedPickleError(
            f"{self.where(pos)}: {wants}, but only {max(0, self.size - pos):,} bytes are left. "
            "The file is truncated or damaged; take another copy of it.",
            path=self.name,
        )

    def beyond(self, pos: int, text: str) -> NoReturn:
        raise UnsafeError(f"{self.where(pos)}: {text}, {BOUND}", path=self.name)

    def unsafe(self, pos: int, text: str) -> NoReturn:
        raise UnsafeError(
            f"{self.where(pos)}: {text}. No checkpoint is written that way: do not trust this file.",
            path=self.name,
        )


class _TruncatedPickleError(CorruptError):
    """The pickle goes on past the bytes at hand. Never leaves this module."""
