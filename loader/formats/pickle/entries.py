"""The numbers that stand for a pickle's objects while `pickle_scan` follows it. Free of torch.

What stands for an object packs, from the low bits: its kind, whether its hash can be chosen by the file's
writer, the number of tuples and leaves that hashing it visits, and how deeply it nests. Strings, bytes and
small numbers are 0, so that the common cases are a few operations of Python's own ``any`` and ``max``.
"""

from __future__ import annotations

from .budget import MAX_CRAFTED_KEYS
from .faults import Faults
from .opcodes import CRAFTED, DICT, GLOBAL, KIND_MASK, LIST, OBJECT, SET, STACK_PLACE, TUPLE

MAX_DEPTH = 200
"""Containers inside one another; real checkpoints stay below 20."""

_DEPTH_SHIFT = 48
DEPTH_ONE = 1 << _DEPTH_SHIFT
_WEIGHT_SHIFT = 4
_WEIGHT_MASK = (1 << (_DEPTH_SHIFT - _WEIGHT_SHIFT)) - 1
_TOO_DEEP = (MAX_DEPTH + 1) << _DEPTH_SHIFT


class Entries:
    """Makes entries from entries, and counts what hashing them would take."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.hash_work = 0
        self.crafted_keys = 0

    def tuple_of(self, at: int, items: list[int]) -> int:
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
        """`outer` at one level above the deepest of what it holds."""
        inside = (deepest >> _DEPTH_SHIFT) << _DEPTH_SHIFT if deepest > 0 else 0
        result = inside + DEPTH_ONE + outer
        if result >= _TOO_DEEP:
            self.faults.unsafe(at, f"it nests deeper than {MAX_DEPTH} levels")
        return result

    def fill(self, at: int, stack: list[int], first: int, op: int) -> int:
        """Puts ``stack[first:]`` into the container below; returns the bytes that takes."""
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
            stack[-1] = max(target, self.nested(at, max(items), target & (DEPTH_ONE - 1)))
        return ((60 if keyed or op == 0x90 else 9) - STACK_PLACE) * len(items)

    def collected(self, at: int, items: list[int], op: int) -> int:
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
        if not any(keys):
            return
        for key in keys:
            if key:
                self.hash_work += 1 + ((key >> _WEIGHT_SHIFT) & _WEIGHT_MASK)
                self.crafted_keys += bool(key & CRAFTED)
        if self.hash_work > 1_000_000 + 16 * self.faults.size or self.crafted_keys > MAX_CRAFTED_KEYS:
            self.faults.unsafe(at, "its dict keys or set members would take beyond reason to hash")
