"""Memory that the ranks of one node share while weights are handed round; it has no name and leaves nothing behind.

An anonymous file of the kernel's (``memfd_create``), which the other ranks open through its maker's ``/proc`` entry:
it goes with the last process that has it open, however that one ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from ..errors import AccessError

SPARE = 2
"""An image is made only where this many times its size is available."""


class SharedMemory:
    """`nbytes` of memory, zero at first, that several processes of a node see. Context manager."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self.nbytes = nbytes
        self.memory = mmap.mmap(fd, nbytes)

    @classmethod
    def make(cls, nbytes: int) -> SharedMemory:
        """A new one. Raises `AccessError` where the system has no such files."""
        try:
            fd = os.memfd_create("rankload", os.MFD_CLOEXEC)
        except (AttributeError, OSError) as error:
            raise AccessError(f"memory that ranks share cannot be had: {error}") from error
        os.ftruncate(fd, nbytes)
        return cls(fd, nbytes)

    @classmethod
    def open(cls, handle: str, nbytes: int) -> SharedMemory:
        """The one that another process of this node has as `handle`. Raises OSError where it cannot be reached."""
        fd = os.open(handle, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_size != nbytes:
                raise OSError(f"{handle} has {found.st_size} bytes of user {found.st_uid}, expected {nbytes}")
            return cls(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise

    @property
    def handle(self) -> str:
        """Where other processes of this user and node find it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        with contextlib.suppress(BufferError):
            # Where an error's traceback still holds a view of it, the memory goes with that.
            self.memory.close()
