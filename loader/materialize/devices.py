"""Moves bytes from plain memory to CUDA devices, while others are read.

`PinnedStaging` gives the memory that bytes are read into: page-locked buffers, two for each thread that reads. What was
read into one is sent to the device while the other is filled; before a buffer is filled again, its copies have ended.
`DeviceCopies` has the streams that copies are queued on, one for each device, beside the job's own: they begin once
what the calling thread queued before has run, and have all ended when its block is left, so that no stream of the job
can see a tensor half filled.

At most 2 x `STAGING_BYTES` are page-locked for each of at most `MOST_THREADS` threads: 64 MiB a rank. torch keeps such
memory for the next time. Where none can be locked, plain memory is used, and each copy ends before the next is read.
A copy that casts, or goes to memory that is not contiguous, is sent as it lies in the file and laid out on the device,
which takes up to 2 x `STAGING_BYTES` there for a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch

from .staging import STAGING_BYTES, HostStaging, Staging

_N_BUFFERS = 2
_ALIGNED_BYTES = 512
"""What is staged begins at a multiple of this in its buffer, as elements of any dtype may and copies like to."""


class _Event(Protocol):
    """What is used of a ``torch.cuda.Event``."""

    def record(self, stream: torch.cuda.Stream) -> None: ...

    def synchronize(self) -> None: ...


class PinnedStaging:
    """Buffers that are filled in turn: one again only once the copies from it have ended. For one thread.

    `streams` are all that copies from it are queued on. Raises RuntimeError where no memory can be locked.
    """

    def __init__(
        self,
        streams: Sequence[torch.cuda.Stream],
        *,
        new_buffer: Callable[[], torch.Tensor] | None = None,
        new_event: Callable[[], _Event] | None = None,
    ) -> None:
        made = [(new_buffer or _locked)() for _ in range(_N_BUFFERS)]
        self._streams = streams
        self._buffers = [memoryview(one.numpy()) for one in made]  # type: ignore[arg-type]
        self._events = [[(new_event or _event)() for _ in streams] for _ in made]
        self._recorded = [False] * len(made)
        self._at = 0
        self._used = 0

    def working(self) -> contextlib.AbstractContextManager[object]:
        if len(self._streams) > 1:
            return contextlib.nullcontext()  # each copy says which it is for
        return on_stream(self._streams[0])

    def claim(self, nbytes: int) -> memoryview:
        start = -(-self._used // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if start + nbytes > len(self._buffers[self._at]):
            self._turn()
            start = 0
        self._used = start + nbytes
        return self._buffers[self._at][start : self._used]

    def _turn(self) -> None:
        """Turns to the next buffer."""
        for stream, event in zip(self._streams, self._events[self._at], strict=True):
            event.record(stream)
        self._recorded[self._at] = True
        self._at = (self._at + 1) % len(self._buffers)
        self._used = 0
        if self._recorded[self._at]:
            for event in self._events[self._at]:
                event.synchronize()


def _locked() -> torch.Tensor:
    return torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)


def _event() -> torch.cuda.Event:
    # Whoever waits for it sleeps: a thread that spins takes a processor from those that read.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


class DeviceCopies:
    """The streams that bytes are copied to devices on. Several threads may use it."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @contextlib.contextmanager
    def to(self, devices: Collection[torch.device]) -> Iterator[bool]:
        """A block in which tensors on `devices` are filled; all that was sent has arrived when it is left.

        Gives whether one of them is new, so that staging memory which was made before does not know its stream.
        """
        new = [device for device in devices if device not in self._streams]
        for device in new:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        streams = [self._streams[device] for device in devices]
        for device, stream in zip(devices, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream(device))
        try:
            yield bool(new)
        finally:
            for stream in streams:
                stream.synchronize()

    def staging(self) -> Staging:
        """Staging memory for one thread."""
        try:
            return PinnedStaging(list(self._streams.values()))
        except RuntimeError:  # no memory may be left to lock
            return HostStaging()

    def queuing(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """A block in which work on `device` is queued on the stream of its copies."""
        if len(self._streams) == 1 and torch.cuda.current_stream(device) == self._streams[device]:
            return contextlib.nullcontext()  # `PinnedStaging.working` is around it
        return on_stream(self._streams[device])


def on_stream(stream: torch.cuda.Stream) -> contextlib.AbstractContextManager[object]:
    """A block in which what this thread queues on the device of `stream` is queued there."""
    block: contextlib.AbstractContextManager[object] = torch.cuda.stream(stream)
    return block
