"""A key-value store in this process's memory, for a session of one rank: it needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence


class MemoryStore:
    """What `key_value.KeyValue` uses of a ``torch.distributed.Store``. Several threads may use it."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def has_extended_api(self) -> bool:
        return True

    def set(self, key: str, value: bytes) -> None:
        with self._lock:
            self._values[key] = bytes(value)

    def get(self, key: str) -> bytes:
        return self._values[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._values[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Sets `key` where it has the value `expected`, or has none and that is empty; returns what it then has, and
        `expected` where it has none."""
        with self._lock:
            held = self._values.get(key)
            if held is None and expected:
                return expected.encode()
            if held is None or held == expected.encode():
                self._values[key] = held = desired.encode()
            return held

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def delete_key(self, key: str) -> bool:
        with self._lock:
            return self._values.pop(key, None) is not None
