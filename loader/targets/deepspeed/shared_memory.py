"""Gives the ranks of one node memory that they share, which is gone when their processes are.

It is an anonymous file of the kernel (``memfd_create(2)``), which other ranks open through its maker's ``/proc`` entry.
The kernel frees it with the last process that has it open, however that process ends.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from ...errors import AccessError

SPARE = 2
"""A node's ranks share memory only where this many times its size is available."""


class SharedMemory:
    """`nbytes` of memory, zero at first, that several processes of a node see; a context manager.

    `memory` is the mapping. Leaving the context closes it in this process only.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self.nbytes = nbytes
        self.memory = mmap.mmap(fd, nbytes)

    @classmethod
    def make(cls, nbytes: int) -> SharedMemory:
        """Makes a new one. Raises `AccessError` where the system cannot."""
        try:
            fd = os.memfd_create("rankload", os.MFD_CLOEXEC)
        except (AttributeError, OSError) as error:
            raise AccessError(f"memory that ranks share cannot be had: {error}") from error
        os.ftruncate(fd, nbytes)
        return cls(fd, nbytes)

    @classmethod
    def open(cls, handle: str, nbytes: int) -> SharedMemory:
        """Opens the one that has this `handle` in another process of the node.

        Raises OSError where it cannot be reached, or has another size or owner.
        """
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
        """The path by which other processes of this user on this node open it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
        with contextlib.suppress(BufferError):
            # A view that an error's traceback still holds keeps the memory until it is gone.
            self.memory.close()
