"""Reads the pickle of a DCP ``.metadata`` as torch writes it, many times faster than any pickle is read. Free of torch.

A folder of thousands of files lists a chunk and an entry for each part of each tensor: hundreds of thousands of objects
of two forms, one after the other. `read_usual` takes these by regular expressions, and the little that is around them
opcode by opcode. It knows only what torch's pickler writes there; for anything else it gives up, and the caller reads
the file in the usual way (`pickle.scan`, `pickle.read`), which says what is wrong with it. Nothing that the file names
is imported, looked up or called, and what is made takes no more memory than the scan would allow.
"""

from __future__ import annotations

import re
from typing import Any

from ..saved.strided import Box
from ..saved.values import GlobalName, InertObject
from .pickle.known import canonical
from .pickle.opcodes import COST, MAX_NAME

Entry = tuple[str, tuple[int, ...] | None, str, int, int]
"""One of ``storage_data``: the key, of a chunk its offsets, the file, the item's offset and length there."""
STORAGE_DATA = "storage_data"

_CHUNK_CLASS = "torch.distributed.checkpoint.metadata.ChunkStorageMetadata"
_INDEX_CLASS = "torch.distributed.checkpoint.metadata.MetadataIndex"
_INFO_CLASS = "torch.distributed.checkpoint.filesystem._StorageInfo"
_SIZE = "torch.Size"

_GET = rb"(h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6}|\x8a\x07.{7}|\x8a\x08.{8})"
_SIZES = (
    rb"(?:"
    + _GET
    + rb"(?:("
    + _INT
    + rb"{1,3})([\x85-\x87])\x94|\)|\(("
    + _INT
    + rb"{4,64})t\x94)\x85\x94R\x94"
    rb"|" + _GET + rb")"
)
"""A ``torch.Size``: the class and the numbers, or one that there was before. Five groups."""
_NEW = rb"\)\x81\x94}\x94\("
"""An object of the class before it, whose fields follow."""
_CHUNK = re.compile(_GET + _NEW + _GET + _SIZES + _GET + _SIZES + rb"ub", re.DOTALL)
_KEY = re.compile(_GET + _NEW + _GET + rb"(?:" + _GET + rb"|(?=\x8c))", re.DOTALL)
_INDEX = re.compile(_GET + rb"(?:" + _INT + rb"|N)(?:" + _GET + _SIZES + rb")?ub", re.DOTALL)
_PLACE = re.compile(_GET + rb"(" + _INT + rb")" + _GET + rb"(" + _INT + rb")ub", re.DOTALL)
_MOST_REMEMBERED = 1 << 16
_DEEPEST_STACK = 10_000


class _UnusualError(Exception):
    """The pickle is another one than torch writes."""


def read_usual(data: bytes, *, memory_limit: int) -> tuple[Any, list[Entry]] | None:
    """The tree, as `read_pickle` with ``inert`` gives it, and most of the entries of its ``storage_data`` apart.

    In the tree a chunk is a `Box`, a ``torch.Size`` a tuple. None for a pickle of which this does not know all.
    """
    try:
        reader = _Reader(_unframed(data), memory_limit)
        return reader.read(), reader.entries
    except (_UnusualError, IndexError, UnicodeDecodeError):
        return None


def _unframed(data: bytes) -> bytes:
    if data[:2] not in (b"\x80\x04", b"\x80\x05"):
        raise _UnusualError
    parts, position, view = [], 2, memoryview(data)
    while data[position : position + 1] == b"\x95":
        start = position + 9
        position = start + int.from_bytes(data[position + 1 : start], "little")
        if position > len(data):
            raise _UnusualError
        parts.append(view[start:position])
    parts.append(view[position:])
    return b"".join(parts)


class _Reader:
    """Follows the opcodes, as Python's unpickler would, with inert objects."""

    def __init__(self, data: bytes, memory_limit: int) -> None:
        self.entries: list[Entry] = []
        self._data = data
        self._left = memory_limit
        self._memo: list[Any] = []
        self._globals: dict[str, GlobalName] = {}
        self._chunks_seen: set[tuple[bytes | None, ...]] = set()
        """The references of chunks that were found to be the right classes and names; so for the parts of entries."""
        self._keys_seen: set[tuple[bytes, bytes]] = set()
        self._indexes_seen: set[tuple[bytes | None, ...]] = set()
        self._infos_seen: set[tuple[bytes, bytes]] = set()
        self._places_seen: set[tuple[bytes, bytes]] = set()
        self._numbers: dict[bytes, tuple[int, ...]] = {}

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
                number, position = self._number(position - 1)
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
                stack.append(self._made(function, args, via_new=op == 0x81))
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

    def _number(self, position: int) -> tuple[int, int]:
        data = self._data
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

    def _global(self, module: Any, name: Any) -> GlobalName:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise _UnusualError
        full = canonical(module, name)
        return self._globals.setdefault(full, GlobalName(full))

    @staticmethod
    def _made(function: Any, args: Any, *, via_new: bool) -> Any:
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
        match_at, memo, data = _CHUNK.match, self._memo, self._data
        while (found := match_at(data, position)) is not None:
            (
                kind,
                offsets,
                one,
                first,
                tuple_1,
                longer,
                shared,
                sizes,
                two,
                second,
                tuple_2,
                longer_2,
                shared_2,
            ) = found.groups()
            seen = (kind, offsets, one, sizes, two)
            if seen not in self._chunks_seen:
                self._check(kind, _CHUNK_CLASS)
                self._check(offsets, "offsets")
                self._check(sizes, "sizes")
                for size in filter(None, (one, two)):
                    self._check(size, _SIZE)
                self._chunks_seen.add(seen)
            memo += (None, None)
            starts = self._sizes(first, tuple_1, longer, shared)
            stack.append(Box(starts, self._sizes(second, tuple_2, longer_2, shared_2)))
            position = found.end()
            if len(stack) > _DEEPEST_STACK:
                raise _UnusualError
        return position

    def _entries(self, position: int) -> int:
        data, memo = self._data, self._memo
        while (key := _KEY.match(data, position)) is not None:
            kind, fqn, known = key.groups()
            if (kind, fqn) not in self._keys_seen:
                if not (self._is(kind, _INDEX_CLASS) and self._is(fqn, "fqn")):
                    return position
                self._keys_seen.add((kind, fqn))
            name, after, names_memo = self._name(known, key.end())
            index = _INDEX.match(data, after)
            if index is None:
                return position
            index_key, offset, size, numbers, count, longer, shared = index.groups()
            if (index_key, offset, size) not in self._indexes_seen:
                self._check(index_key, "index")
                if offset is not None:
                    self._check(offset, "offset")
                if size is not None:
                    self._check(size, _SIZE)
                self._indexes_seen.add((index_key, offset, size))
            info = _KEY.match(data, index.end())
            if info is None:
                return position
            kind, path, known = info.groups()
            if (kind, path) not in self._infos_seen:
                if not (self._is(kind, _INFO_CLASS) and self._is(path, "relative_path")):
                    return position
                self._infos_seen.add((kind, path))
            file, after, files_memo = self._name(known, info.end())
            place = _PLACE.match(data, after)
            if place is None:
                return position
            offset_key, start, length_key, length = place.groups()
            if (offset_key, length_key) not in self._places_seen:
                self._check(offset_key, "offset")
                self._check(length_key, "length")
                self._places_seen.add((offset_key, length_key))
            memo += (None, None, *names_memo)
            starts = None if offset is None else self._sizes(numbers, count, longer, shared)
            memo += (None, None, *files_memo)
            self.entries.append((name, starts, file, self._one(start), self._one(length)))
            position = place.end()
        return position

    def _name(self, known: bytes | None, position: int) -> tuple[str, int, tuple[str, ...]]:
        """The text that was `known` before, or that is at `position`; where it ends, and what it adds to the memo."""
        if known is not None:
            text = self._value(known)
            if type(text) is not str:
                raise _UnusualError
            return text, position, ()
        text, after = self._text(position)
        if self._data[after] != 0x94:
            raise _UnusualError
        return text, after + 1, (text,)

    def _sizes(
        self, numbers: bytes | None, count: bytes | None, longer: bytes | None, shared: bytes | None
    ) -> tuple[int, ...]:
        """A size, and its places in the memo."""
        if shared is not None:
            found = self._value(shared)
            if type(found) is not tuple:
                raise _UnusualError
            return found
        written = numbers or longer
        if written is None:
            self._memo += (None, ())
            return ()
        found = self._numbers.get(written)
        if found is None:
            found = self._all_numbers(written)
            if len(self._numbers) < _MOST_REMEMBERED:
                self._numbers[written] = found
        if count is not None and len(found) != count[0] - 0x84:
            raise _UnusualError
        self._memo += (None, None, found)
        return found

    @staticmethod
    def _all_numbers(written: bytes) -> tuple[int, ...]:
        reader = _Reader(written, 0)
        position, found = 0, []
        while position < len(written):
            number, position = reader._number(position)
            found.append(number)
        return tuple(found)

    @staticmethod
    def _one(written: bytes) -> int:
        if written[0] == 0x8A:
            return int.from_bytes(written[2:], "little", signed=True)
        return int.from_bytes(written[1:], "little", signed=written[0] == 0x4A)

    def _value(self, reference: bytes) -> Any:
        return self._memo[int.from_bytes(reference[1:], "little")]

    def _is(self, reference: bytes, expected: str) -> bool:
        """Whether the memo has the class or the text `expected` there."""
        value = self._value(reference)
        return bool((value.name if type(value) is GlobalName else value) == expected)

    def _check(self, reference: bytes, expected: str) -> None:
        if not self._is(reference, expected):
            raise _UnusualError
