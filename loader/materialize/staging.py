"""Gives memory for bytes that are not read into their destination itself. Free of torch; `devices` has another kind."""

from __future__ import annotations

import contextlib
from typing import Protocol

STAGING_BYTES = 4 << 20
"""The size of the buffer for bytes that cannot be read into their destination itself. Those of all threads together
should fit the processors' cache: what is read into them is copied from there."""
SCRATCH_BYTES = 1 << 20
"""The size of the buffer for bytes that are only summed, or of which it is not known yet whether they will come."""


class Staging(Protocol):
    """Memory for bytes that cannot be read into their destination itself. Used by one thread at a time."""

    def working(self) -> contextlib.AbstractContextManager[object]:
        """The block in which a thread claims memory and uses it."""

    def claim(self, nbytes: int) -> memoryview:
        """Memory of `nbytes`, at most `STAGING_BYTES`, to be filled and used before the next call."""


class HostStaging:
    """One buffer in plain memory, made when it is first needed: what is in it has been copied when ``use`` returns."""

    def __init__(self) -> None:
        self._memory: memoryview | None = None

    def working(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def claim(self, nbytes: int) -> memoryview:
        if self._memory is None:
            self._memory = memoryview(bytearray(STAGING_BYTES))
        return self._memory[:nbytes]


class Room:
    """What one thread reads with: staging memory, and a small buffer for bytes that are only summed."""

    def __init__(self, staging: Staging) -> None:
        self.staging = staging
        self._scratch: memoryview | None = None

    @property
    def scratch(self) -> memoryview:
        """`SCRATCH_BYTES` of memory."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        return self._scratch
