"""The sockets of this process behind native code: whether a server still listens, and the end of a wait for its answer.

A call of torch's store blocks until its server answers, and cannot be interrupted or timed. A server whose process is
stopped, or whose machine is cut off, never answers. Its machine tells the two apart: the kernel of one that is only
stopped still takes connections. And a call ends, with an error, once the connection that it waits on is shut down.

On Linux, by ``/proc``; elsewhere no sockets are found, and a blocked call stays.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

Sockets = Mapping[str, int]
"""Descriptors by their sockets' names, as ``/proc/self/fd`` has them: a descriptor may be another socket's later."""


def open_sockets() -> Sockets:
    """Those that this process has open."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:"):
                    found[target] = int(name)
    return found


def connected_since(before: Sockets, port: int | None) -> Sockets:
    """Those that are connected to `port` of some host, and were not open at the time of `before`."""
    found = {name: fd for name, fd in open_sockets().items() if name not in before}
    return {name: fd for name, fd in found.items() if port is not None and _peer_port(fd) == port}


def shut_down(sockets: Sockets) -> None:
    """Ends the connections, for whichever thread waits on them."""
    for name, fd in sockets.items():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") != name:
                continue
            with socket.socket(fileno=os.dup(fd)) as same:
                same.shutdown(socket.SHUT_RDWR)


def listens(address: tuple[str, int], timeout_s: float = 0.5) -> bool:
    """Whether a server listens there: whether it also answers is not asked."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=timeout_s):
        return True
    return False


def _peer_port(fd: int) -> int | None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as same:
        peer = same.getpeername()
        return int(peer[1]) if isinstance(peer, tuple) else None
    return None
