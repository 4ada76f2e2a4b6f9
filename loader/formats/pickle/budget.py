"""Limits what the calls of one pickle copy and hash, all of them together. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import UnsafeError
from ...saved.tree import BOUND

MAX_CRAFTED_KEYS = 10_000
"""Dict keys and set members whose hashes a file can make collide: floats, integers of many digits ..."""


@dataclass(slots=True)
class Budget:
    """Counts, for one file, the bytes that calls copy and the keys that they hash; bounds both."""

    memory_limit: int
    copied: int = 0
    crafted_keys: int = 0
    rebuilt: int = 0

    def charge(self, nbytes: int) -> None:
        """Counts bytes that a call copies, or work worth as much. Raises `UnsafeError` beyond the limit."""
        self.copied += nbytes
        if self.copied > self.memory_limit:
            raise UnsafeError(f"the calls in its pickle copy more than {self.memory_limit:,} bytes, {BOUND}")

    def charge_rebuilt(self, nbytes: int) -> None:
        """Counts the bytes of a tensor that will be made of others, such as a sparse one.

        Those of a sound file have storages of their own, so that all of them together are no more than the file. Raises
        `UnsafeError` beyond the limit.
        """
        self.rebuilt += nbytes
        if self.rebuilt > self.memory_limit:
            raise UnsafeError(
                f"its sparse and quantized tensors would take more than {self.memory_limit:,} bytes, {BOUND}"
            )

    def charge_keys(self, keys: Iterable[Any]) -> None:
        """Counts what hashing `keys` takes, before any of them is hashed.

        Raises `UnsafeError` beyond the limit, or for more than `MAX_CRAFTED_KEYS` whose hashes a file can choose.
        """
        pending = list(keys)
        while pending:
            key = pending.pop()
            self.charge(50)
            if isinstance(key, tuple):
                pending.extend(key)
            elif not isinstance(key, (str, bytes)) and not (isinstance(key, int) and key.bit_length() <= 64):
                self.crafted_keys += 1
                if self.crafted_keys > MAX_CRAFTED_KEYS:
                    raise UnsafeError(
                        f"its sets and dicts have more than {MAX_CRAFTED_KEYS:,} members whose hashes a file can "
                        f"choose (floats, large integers ...), {BOUND}"
                    )
