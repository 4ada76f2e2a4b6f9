"""Tabulates what each opcode of a pickle does to the stack, for `scan`. Free of torch.

The tables are indexed by the opcode's byte. The scan keeps an integer in place of each object; its lowest bits are one
of the kinds from `LEAF` to `GLOBAL`, and `CRAFTED`.
"""

from __future__ import annotations

import pickle
from typing import Final

LEAF: Final = 0
TUPLE: Final = 1
LIST: Final = 2
DICT: Final = 3
SET: Final = 4
OBJECT: Final = 5
"""The result of a call or of a persistent id."""
GLOBAL: Final = 6
"""A class or function, by name."""
KIND_MASK: Final = 7
CRAFTED: Final = 8
"""Set where the writer of the file can choose the object's hash."""

MAX_NAME: Final = 512
"""Characters in a global's module or name."""

SHORT_TEXT: Final = 64
"""A text of fewer bytes counts as them, whatever its characters."""
STACK_PLACE: Final = 18
"""Bytes that an object's place on the stack takes, here and in the unpickler; part of ``COST``."""


class Step:
    """What the scan does for an opcode; opcodes of the same step differ only in the tables below."""

    UNKNOWN: Final = 0
    PUSH: Final = 1
    PUT: Final = 2
    GET: Final = 3
    MARK: Final = 4
    COUNTED: Final = 5
    TUPLE: Final = 6
    CALL: Final = 7
    PERSISTENT: Final = 8
    FILL: Final = 9
    FILL_ONE: Final = 10
    BUILD: Final = 11
    STACK_GLOBAL: Final = 12
    GLOBAL: Final = 13
    LINE: Final = 14
    COLLECT: Final = 15
    POP: Final = 16
    DUP: Final = 17
    FRAME: Final = 18
    PROTOCOL: Final = 19
    STOP: Final = 20
    REFUSED: Final = 21
    MEMOIZE: Final = 22


STEPS: Final = [Step.UNKNOWN] * 256
PUSHED: Final = [LEAF] * 256
"""Kind of the pushed object."""
ARGUMENT_SIZE: Final = [0] * 256
"""Bytes after the opcode, for pushes, puts and gets; 0 for a put or get whose index is text."""
LENGTH_SIZE: Final = [0] * 256
"""Bytes of the length that follows the opcode."""
LENGTH_SIGNED: Final = [False] * 256
COST: Final = [0] * 256
"""Bytes of memory that the opcode takes at most, apart from its argument's."""


def _set(opcode: bytes, step: int, cost: int, *, size: int = 0, pushed: int = LEAF) -> None:
    code = opcode[0]
    STEPS[code] = step
    COST[code] = cost
    ARGUMENT_SIZE[code] = size
    PUSHED[code] = pushed


def _counted(opcode: bytes, width: int, *, signed: bool = False, pushed: int = LEAF) -> None:
    _set(opcode, Step.COUNTED, 80, pushed=pushed)
    LENGTH_SIZE[opcode[0]] = width
    LENGTH_SIGNED[opcode[0]] = signed


_set(pickle.NONE, Step.PUSH, 18)
_set(pickle.NEWTRUE, Step.PUSH, 18)
_set(pickle.NEWFALSE, Step.PUSH, 18)
_set(pickle.BININT, Step.PUSH, 50, size=4)
_set(pickle.BININT1, Step.PUSH, 18, size=1)
_set(pickle.BININT2, Step.PUSH, 50, size=2)
_set(pickle.BINFLOAT, Step.PUSH, 42, size=8, pushed=CRAFTED)
_set(pickle.EMPTY_TUPLE, Step.PUSH, 18)
_set(pickle.EMPTY_LIST, Step.PUSH, 90, pushed=LIST)
_set(pickle.EMPTY_DICT, Step.PUSH, 250, pushed=DICT)
_set(pickle.EMPTY_SET, Step.PUSH, 250, pushed=SET)

_set(pickle.BINPUT, Step.PUT, 0, size=1)
_set(pickle.LONG_BINPUT, Step.PUT, 0, size=4)
_set(pickle.PUT, Step.PUT, 0)
_set(pickle.MEMOIZE, Step.MEMOIZE, 0)
_set(pickle.BINGET, Step.GET, 18, size=1)
_set(pickle.LONG_BINGET, Step.GET, 18, size=4)
_set(pickle.GET, Step.GET, 18)
_set(pickle.MARK, Step.MARK, 50)

_counted(pickle.BINUNICODE, 4)
_counted(pickle.SHORT_BINUNICODE, 1)
_counted(pickle.BINUNICODE8, 8)
_counted(pickle.BINSTRING, 4, signed=True)
_counted(pickle.SHORT_BINSTRING, 1)
_counted(pickle.BINBYTES, 4)
_counted(pickle.SHORT_BINBYTES, 1)
_counted(pickle.BINBYTES8, 8)
# Not a container here, so that the scan refuses opcodes which would extend a bytearray.
_counted(pickle.BYTEARRAY8, 8, pushed=LEAF)
_counted(pickle.LONG1, 1)
_counted(pickle.LONG4, 4, signed=True)

_set(pickle.TUPLE, Step.TUPLE, 66)
_set(pickle.TUPLE1, Step.TUPLE, 66)
_set(pickle.TUPLE2, Step.TUPLE, 66)
_set(pickle.TUPLE3, Step.TUPLE, 66)

_set(pickle.REDUCE, Step.CALL, 250)
_set(pickle.NEWOBJ, Step.CALL, 250)
_set(pickle.NEWOBJ_EX, Step.CALL, 250)
_set(pickle.BINPERSID, Step.PERSISTENT, 250)
_set(pickle.BUILD, Step.BUILD, 0)
_set(pickle.APPENDS, Step.FILL, 0)
_set(pickle.SETITEMS, Step.FILL, 0)
_set(pickle.ADDITEMS, Step.FILL, 0)
_set(pickle.APPEND, Step.FILL_ONE, 0)
_set(pickle.SETITEM, Step.FILL_ONE, 0)

_set(pickle.STACK_GLOBAL, Step.STACK_GLOBAL, 250)
_set(pickle.GLOBAL, Step.GLOBAL, 250)
_set(pickle.INT, Step.LINE, 50, pushed=CRAFTED)
_set(pickle.LONG, Step.LINE, 50, pushed=CRAFTED)
_set(pickle.FLOAT, Step.LINE, 50, pushed=CRAFTED)
_set(pickle.STRING, Step.LINE, 80)
_set(pickle.UNICODE, Step.LINE, 80)
_set(pickle.PERSID, Step.LINE, 250)

_set(pickle.LIST, Step.COLLECT, 90)
_set(pickle.DICT, Step.COLLECT, 250)
_set(pickle.OBJ, Step.COLLECT, 250)
_set(pickle.INST, Step.COLLECT, 250)
_set(pickle.FROZENSET, Step.COLLECT, 250)
_set(pickle.POP_MARK, Step.COLLECT, 0)
_set(pickle.POP, Step.POP, 0)
_set(pickle.DUP, Step.DUP, 18)

_set(pickle.FRAME, Step.FRAME, 0)
_set(pickle.PROTO, Step.PROTOCOL, 0)
_set(pickle.STOP, Step.STOP, 0)
for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
    _set(_code, Step.REFUSED, 0)
