"""Reads the pickle of a DCP ``.metadata`` as torch writes it, many times faster than any pickle is read. Free of torch.

A folder of thousands of files lists a chunk and an entry for each part of each tensor: hundreds of thousands of objects
of two forms, one after the other. `read_usual` takes these by regular expressions, and the little that is around them
opcode by opcode. Chunks that were written before, byte for byte, are not made again: tensors that are cut alike have
the same boxes. Of entries no objects are made, but a list of each field for each key.

It knows only what torch's pickler writes there; for anything else it gives up, and the caller reads the file in the
usual way (`pickle.scan`, `pickle.read`), which says what is wrong with it. Nothing that the file names is imported,
looked up or called, and what is made takes no more memory than the scan would allow.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..saved.strided import Box
from ..saved.values import GlobalName, InertObject
from .pickle.known import canonical
from .pickle.opcodes import COST, MAX_NAME

STORAGE_DATA = "storage_data"

_CHUNK_CLASS = "torch.distributed.checkpoint.metadata.ChunkStorageMetadata"
_INDEX_CLASS = "torch.distributed.checkpoint.metadata.MetadataIndex"
_INFO_CLASS = "torch.distributed.checkpoint.filesystem._StorageInfo"
_SIZE = "torch.Size"

_REFERENCE = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6}|\x8a\x07.{7}|\x8a\x08.{8})"
_TEXT = rb"(?:" + _REFERENCE + rb"|\x8c.[ -~]{0,255}\x94)"
"""A text that there was before, or one of printable ASCII."""
_NEW_SIZE = (
    _REFERENCE + rb"(?:" + _INT + rb"{1,3}[\x85-\x87]\x94|\)|\(" + _INT + rb"{4,64}t\x94)\x85\x94R\x94"
)
_SIZES = rb"(?:" + _NEW_SIZE + rb"|" + _REFERENCE + rb")"
"""A ``torch.Size``: the class and the numbers, or one that there was before."""
_NEW = rb"\)\x81\x94}\x94\("
"""An object of the class before it, whose fields follow."""


def _group(pattern: bytes) -> bytes:
    return rb"(" + pattern + rb")"


def _chunk(group: Callable[[bytes], bytes]) -> bytes:
    return (
        group(_REFERENCE) + _NEW
        + group(_REFERENCE) + group(_SIZES)
        + group(_REFERENCE) + group(_SIZES) + rb"ub"
    )  # fmt: skip


_MOST_AT_ONCE = 1000
_CHUNK = re.compile(_chunk(_group), re.DOTALL)
_CHUNKS = re.compile(rb"(?:" + _chunk(bytes) + rb"){1,%d}" % _MOST_AT_ONCE, re.DOTALL)
_ENTRY = re.compile(
    _group(_REFERENCE + _NEW + _REFERENCE) + _TEXT
    + _group(_REFERENCE) + rb"(?:" + _INT + rb"|N)"
    + rb"(?:" + _group(_REFERENCE) + _SIZES + rb")?ub"
    + _group(_REFERENCE + _NEW + _REFERENCE) + _TEXT
    + _group(_REFERENCE) + _INT
    + _group(_REFERENCE) + _INT + rb"ub",
    re.DOTALL,
)  # fmt: skip
"""An entry; its groups are the references to classes and to the names of fields."""
_OBJECT = re.compile(_group(_REFERENCE) + _NEW + _group(_REFERENCE), re.DOTALL)
_MOST_FORMS = 16
_MOST_REMEMBERED = 1 << 16
_MOST_REMEMBERED_BYTES = 8 << 20
_DEEPEST_STACK = 10_000
_TWO_PLACES = (None, None)
"""Of an object and its state in the memo; no field refers to either."""


def _entry_form(
    head: bytes, index: bytes, at: bytes | None, place: bytes, offset: bytes, length: bytes
) -> re.Pattern[bytes]:
    """Entries with the same references as one; its groups are the key, the size, the file, its offset and length."""
    size = rb"()??" if at is None else re.escape(at) + _group(_SIZES)
    return re.compile(
        re.escape(head) + _group(_TEXT)
        + re.escape(index) + rb"(?:" + _INT + rb"|N)"
        + size + rb"ub"
        + re.escape(place) + _group(_TEXT)
        + re.escape(offset) + _group(_INT)
        + re.escape(length) + _group(_INT) + rb"ub",
        re.DOTALL,
    )  # fmt: skip


class Boxes(tuple[Box, ...]):
    """Chunks that follow each other. The same ones are one object wherever they are."""

    __slots__ = ()


@dataclass(slots=True)
class Entries:
    """Those entries of ``storage_data`` that are of one key, in the order of the file: a list of each field."""

    starts: list[tuple[int, ...] | None] = field(default_factory=list)
    """Of a chunk its offsets in the tensor, of an object None."""
    files: list[str] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Of the item in the file."""
    lengths: array[int] = field(default_factory=lambda: array("q"))


class _UnusualError(Exception):
    """The pickle is another one than torch writes."""


def read_usual(data: bytearray, *, memory_limit: int) -> tuple[Any, dict[str, Entries]] | None:
    """The tree, as `read_pickle` with ``inert`` gives it, and most entries of its ``storage_data`` apart, by key.

    In the tree a chunk is a `Box`, or some that follow each other are `Boxes`; a ``torch.Size`` is a tuple. None for a
    pickle of which this does not know all. Changes `data`, of which a copy would double what reading takes.
    """
    try:
        _take_frames_out(data)
        reader = _Reader(data, memory_limit)
        return reader.read(), reader.entries
    except (_UnusualError, IndexError, UnicodeDecodeError):
        return None


def _take_frames_out(data: bytearray) -> None:
    """Leaves the opcodes alone."""
    if not data.startswith((b"\x80\x04", b"\x80\x05")):
        raise _UnusualError
    position, kept = 2, 0
    with memoryview(data) as view:
        while data[position : position + 1] == b"\x95":
            start = position + 9
            position = start + int.from_bytes(data[position + 1 : start], "little")
            if position > len(data):
                raise _UnusualError
            view[kept : kept + position - start] = view[start:position]
            kept += position - start
        view[kept : kept + len(data) - position] = view[position:]
    del data[kept + len(data) - position :]


def _number_at(data: bytes | bytearray, position: int) -> tuple[int, int]:
    """The number whose opcode is at `position`, and where it ends."""
    op = data[position]
    start = position + 1
    if op == 0x4B:
        return data[start], start + 1
    if op == 0x4D:
        return data[start] | data[start + 1] << 8, start + 2
    length = 4
    if op == 0x8A:
        length, start = data[start], start + 1
        if length > 8:
            raise _UnusualError
    if start + length > len(data):
        raise _UnusualError
    return int.from_bytes(data[start : start + length], "little", signed=True), start + length


class _Reader:
    """Follows the opcodes, as Python's unpickler would, with inert objects."""

    def __init__(self, data: bytes | bytearray, memory_limit: int) -> None:
        self.entries: dict[str, Entries] = {}
        self._data = data
        self._left = memory_limit
        self._memo: list[Any] = []
        self._globals: dict[str, GlobalName] = {}
        # What the memo has at a place stays there. So the same bytes mean the same wherever they are.
        self._made: dict[bytes, tuple[Boxes, list[Any]]] = {}
        """By the bytes of chunks: the chunks, and what they add to the memo."""
        self._made_bytes = 0
        self._chunk_forms: set[tuple[bytes, ...]] = set()
        """The references of chunks that were found to be the right classes and names; so for the parts of entries."""
        self._entry_forms: list[re.Pattern[bytes]] = []
        self._sizes: dict[bytes, tuple[tuple[int, ...], tuple[Any, ...]]] = {}
        """By the bytes of a size that is not in the memo: it, and what it adds to the memo."""
        self._texts: dict[bytes, str] = {}
        self._numbers: dict[bytes, int] = {}

    def read(self) -> Any:
        data, memo, cost = self._data, self._memo, COST
        stack: list[Any] = []
        marks: list[int] = []
        position = 0
        while True:
            op = data[position]
            position += 1
            self._left -= cost[op]
            if self._left < 0 or len(stack) > _DEEPEST_STACK:
                raise _UnusualError
            if op == 0x94:  # MEMOIZE
                memo.append(self._last(stack, marks))
            elif op == 0x68 or op == 0x6A:  # BINGET, LONG_BINGET
                width = 1 if op == 0x68 else 4
                value = memo[int.from_bytes(data[position : position + width], "little")]
                if type(value) is GlobalName and marks:
                    after = self._many(value.name, position - 1, stack, marks[-1])
                    if after >= position:
                        position = after
                        continue
                stack.append(value)
                position += width
            elif op == 0x8C:  # SHORT_BINUNICODE
                text, position = self._text(position - 1)
                stack.append(text)
            elif op == 0x4B or op == 0x4D or op == 0x4A or op == 0x8A:  # BININT1, BININT2, BININT, LONG1
                number, position = _number_at(data, position - 1)
                stack.append(number)
            elif op == 0x28:  # MARK
                marks.append(len(stack))
            elif op == 0x29:
                stack.append(())
            elif op == 0x7D:
                stack.append({})
            elif op == 0x5D:
                stack.append([])
            elif op == 0x4E:
                stack.append(None)
            elif op == 0x88 or op == 0x89:
                stack.append(op == 0x88)
            elif 0x85 <= op <= 0x87:  # TUPLE1 to TUPLE3
                stack.append(tuple(self._popped(stack, len(stack) - (op - 0x84), marks)))
            elif op == 0x74:  # TUPLE
                first = marks.pop()
                stack.append(tuple(self._popped(stack, first, marks)))
            elif op == 0x81 or op == 0x52:  # NEWOBJ, REDUCE
                function, args = self._popped(stack, len(stack) - 2, marks)
                stack.append(self._called(function, args, via_new=op == 0x81))
            elif op == 0x62:  # BUILD
                owner, state = self._popped(stack, len(stack) - 2, marks)
                if not isinstance(owner, InertObject) or owner.state is not None:
                    raise _UnusualError
                owner.state = state
                stack.append(owner)
            elif op == 0x75 or op == 0x73:  # SETITEMS, SETITEM
                first = marks.pop() if op == 0x75 else len(stack) - 2
                items = self._popped(stack, first, marks)
                self._set(self._last(stack, marks), items)
            elif op == 0x65 or op == 0x61:  # APPENDS, APPEND
                first = marks.pop() if op == 0x65 else len(stack) - 1
                items = self._popped(stack, first, marks)
                target = self._last(stack, marks)
                if type(target) is not list:
                    raise _UnusualError
                target.extend(items)
            elif op == 0x93:  # STACK_GLOBAL
                module, name = self._popped(stack, len(stack) - 2, marks)
                stack.append(self._global(module, name))
            elif op == 0x2E:  # STOP
                if len(stack) != 1 or marks:
                    raise _UnusualError
                return stack[0]
            else:
                raise _UnusualError

    @staticmethod
    def _popped(stack: list[Any], first: int, marks: list[int]) -> list[Any]:
        if first < (marks[-1] if marks else 0):
            raise _UnusualError
        items = stack[first:]
        del stack[first:]
        return items

    @staticmethod
    def _last(stack: list[Any], marks: list[int]) -> Any:
        if len(stack) <= (marks[-1] if marks else 0):
            raise _UnusualError
        return stack[-1]

    def _text(self, position: int) -> tuple[str, int]:
        """The text whose opcode is at `position`, and where it ends."""
        start = position + 2
        stop = start + self._data[position + 1]
        if stop > len(self._data):
            raise _UnusualError
        self._left -= 4 * (stop - start)
        return self._data[start:stop].decode(), stop

    def _global(self, module: Any, name: Any) -> GlobalName:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise _UnusualError
        full = canonical(module, name)
        return self._globals.setdefault(full, GlobalName(full))

    @staticmethod
    def _called(function: Any, args: Any, *, via_new: bool) -> Any:
        if type(function) is not GlobalName or type(args) is not tuple:
            raise _UnusualError
        if function.name == _SIZE and len(args) == 1 and type(args[0]) is tuple:
            return args[0]
        return InertObject(function.name, args, via_new=via_new)

    @staticmethod
    def _set(target: Any, items: list[Any]) -> None:
        if len(items) % 2 or type(target) is not dict:
            raise _UnusualError
        for key in items[::2]:
            if type(key) is not str and type(key) is not int and type(key) is not InertObject:
                raise _UnusualError
        target.update(zip(items[::2], items[1::2], strict=True))

    def _many(self, name: str, position: int, stack: list[Any], mark: int) -> int:
        """Takes the chunks or the entries that begin at `position` and follow each other; returns where they end."""
        if name == _CHUNK_CLASS and type(stack[mark - 1]) is list:
            return self._chunks(position, stack)
        if (
            name == _INDEX_CLASS
            and mark >= 2
            and type(stack[mark - 1]) is dict
            and stack[mark - 2] == STORAGE_DATA
            and (len(stack) - mark) % 2 == 0
        ):
            return self._entries(position)
        return -1

    def _chunks(self, position: int, stack: list[Any]) -> int:
        data, memo, made, begin = self._data, self._memo, self._made, position
        while (found := _CHUNKS.match(data, position)) is not None:
            written = found.group()
            known = made.get(written)
            if known is not None:
                boxes = known[0]
                memo += known[1]
            else:
                first = len(memo)
                boxes = self._boxes(written)
                self._made_bytes += len(written)
                if self._made_bytes < _MOST_REMEMBERED_BYTES:
                    made[written] = boxes, memo[first:]
            stack.append(boxes)
            position = found.end()
            if len(stack) > _DEEPEST_STACK:
                raise _UnusualError
        # Several chunks are one object here, which no other opcode may take for one of them.
        if position > begin and data[position] != 0x65:
            raise _UnusualError
        return position

    def _boxes(self, written: bytes) -> Boxes:
        """The chunks that are `written`; adds to the memo what they do."""
        boxes, position = [], 0
        for found in _CHUNK.finditer(written):
            if found.start() != position:
                raise _UnusualError
            position = found.end()
            kind, offsets, starts, lengths, sizes = found.groups()
            form = (kind, offsets, lengths)
            if form not in self._chunk_forms:
                self._check(kind, _CHUNK_CLASS)
                self._check(offsets, "offsets")
                self._check(lengths, "sizes")
                self._chunk_forms.add(form)
            self._memo += _TWO_PLACES
            begins = self._size(starts)
            boxes.append(Box(begins, self._size(sizes)))
        if position != len(written):
            raise _UnusualError
        return Boxes(boxes)

    def _entries(self, position: int) -> int:
        while True:
            for form in self._entry_forms:
                after = self._entries_of(form, position)
                if after > position:
                    position = after
                    break
            else:
                found = _ENTRY.match(self._data, position)
                if (
                    found is None
                    or len(self._entry_forms) == _MOST_FORMS
                    or not self._is_entry(*found.groups())
                ):
                    return position
                self._entry_forms.append(_entry_form(*found.groups()))

    def _entries_of(self, form: re.Pattern[bytes], position: int) -> int:
        """Takes the entries of one form that begin at `position` and follow each other; returns where they end."""
        data, memo, entries, match = self._data, self._memo, self.entries, form.match
        texts, numbers = self._texts, self._numbers
        while (found := match(data, position)) is not None:
            key, size, name, offset, length = found.groups()
            memo += _TWO_PLACES
            text = texts.get(key)
            if text is None:
                text = self._text_of(key)
            if key[0] == 0x8C:
                memo.append(text)
            starts = None if size is None else self._size(size)
            memo += _TWO_PLACES
            file = texts.get(name)
            if file is None:
                file = self._text_of(name)
            if name[0] == 0x8C:
                memo.append(file)
            own = entries.get(text)
            if own is None:
                own = entries[text] = Entries()
            own.starts.append(starts)
            own.files.append(file)
            number = numbers.get(offset)
            own.offsets.append(self._number_of(offset) if number is None else number)
            number = numbers.get(length)
            own.lengths.append(self._number_of(length) if number is None else number)
            position = found.end()
        return position

    def _is_entry(
        self, head: bytes, index: bytes, at: bytes | None, place: bytes, offset: bytes, length: bytes
    ) -> bool:
        """Whether the classes and the names of fields are those of an entry."""
        return (
            self._is_object(head, _INDEX_CLASS, "fqn")
            and self._is(index, "index")
            and (at is None or self._is(at, "offset"))
            and self._is_object(place, _INFO_CLASS, "relative_path")
            and self._is(offset, "offset")
            and self._is(length, "length")
        )

    def _is_object(self, head: bytes, kind: str, field_name: str) -> bool:
        found = _OBJECT.fullmatch(head)
        return found is not None and self._is(found[1], kind) and self._is(found[2], field_name)

    def _text_of(self, written: bytes) -> str:
        """The text that is `written`, or is in the memo."""
        if written[0] == 0x8C:
            if written[1] != len(written) - 3:
                raise _UnusualError
            text = written[2:-1].decode("ascii")
        else:
            text = self._memo[int.from_bytes(written[1:], "little")]
            if type(text) is not str:
                raise _UnusualError
        if len(self._texts) < _MOST_REMEMBERED:
            self._texts[written] = text
        return text

    def _number_of(self, written: bytes) -> int:
        found, _ = _number_at(written, 0)
        if len(self._numbers) < _MOST_REMEMBERED:
            self._numbers[written] = found
        return found

    def _size(self, written: bytes) -> tuple[int, ...]:
        """The size that is in the memo, or that is `written`, which is added to it."""
        if len(written) <= 5:
            found = self._value(written)
            if type(found) is not tuple:
                raise _UnusualError
            return found
        known = self._sizes.get(written)
        if known is None:
            known = self._new_size(written)
            if len(self._sizes) < _MOST_REMEMBERED:
                self._sizes[written] = known
        self._memo += known[1]
        return known[0]

    def _new_size(self, written: bytes) -> tuple[tuple[int, ...], tuple[Any, ...]]:
        """The size that is `written`, from its class on, and what it adds to the memo."""
        position = 2 if written[0] == 0x68 else 5
        self._check(written[:position], _SIZE)
        if written[position] == 0x29:  # an empty tuple, which no memo has
            return (), (None, ())
        position += written[position] == 0x28
        end = len(written) - len(b"\x86\x94\x85\x94R\x94")
        numbers: list[int] = []
        while position < end:
            number, position = _number_at(written, position)
            numbers.append(number)
        if position != end or written[end] not in (0x74, 0x84 + len(numbers)):
            raise _UnusualError
        found = tuple(numbers)
        return found, (None, None, found)

    def _value(self, reference: bytes) -> Any:
        return self._memo[int.from_bytes(reference[1:], "little")]

    def _is(self, reference: bytes, expected: str) -> bool:
        """Whether the memo has the class or the text `expected` there."""
        value = self._value(reference)
        return bool((value.name if type(value) is GlobalName else value) == expected)

    def _check(self, reference: bytes, expected: str) -> None:
        if not self._is(reference, expected):
            raise _UnusualError
