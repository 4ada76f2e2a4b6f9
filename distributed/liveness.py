"""Whether a process on this machine still lives, and how it ended, from ``/proc`` (Linux: proc(5)).

Two processes can watch each other only where both see the same process table: the same boot of the same
machine and the same pid namespace. Of a process elsewhere (another node, another container) nothing is known here, and
its watcher goes by heartbeats alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class ProcessIdentity:
    """One process: ``started`` (clock ticks since boot; 0 where unknown) distinguishes it from a later one with its
    pid, and ``machine`` names the process table that ``pid`` belongs to ("" where unknown)."""

    host: str
    pid: int
    started: int
    machine: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def this_process() -> ProcessIdentity:
    """The identity of the calling process."""
    pid = os.getpid()
    found = identity_of(pid)
    return found or ProcessIdentity(socket.gethostname(), pid, 0, machine_identity())


def identity_of(pid: int) -> ProcessIdentity | None:
    """The identity of the process `pid` of this machine; None where there is none, or it has ended."""
    stat = _read_stat(pid)
    if stat is None or stat[0] in "ZX":
        return None
    return ProcessIdentity(socket.gethostname(), pid, stat[1], machine_identity())


@lru_cache(maxsize=1)
def machine_identity() -> str:
    """The id of this boot of this machine and its pid namespace; "" where /proc has neither."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_watchable(process: ProcessIdentity) -> bool:
    """Whether `process` is in the process table that this process sees, so that `how_ended` knows of its end."""
    return process.started > 0 and process.machine != "" and process.machine == machine_identity()


def how_ended(process: ProcessIdentity) -> str | None:
    """How `process` ended, in words; None while it lives (a stopped one lives) or where it is not watchable."""
    if not is_watchable(process):
        return None
    stat = _read_stat(process.pid)
    if stat is None or stat[1] != process.started:
        return "its process is gone"
    state, _, status = stat
    if state not in "ZX":
        return None
    if os.WIFSIGNALED(status):
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"killed by signal {os.WTERMSIG(status)}"
    # The kernel shows the status only to those who may trace the process, and 0 to all others.
    return f"exited with status {os.WEXITSTATUS(status)}" if status else "its process has ended"


def is_stopped(process: ProcessIdentity) -> bool:
    """Whether `process` is known to be stopped (SIGSTOP, a debugger)."""
    stat = _read_stat(process.pid) if is_watchable(process) else None
    return stat is not None and stat[1] == process.started and stat[0] in "Tt"


def _read_stat(pid: int) -> tuple[str, int, int] | None:
    """State, start time and exit status of a process (fields 3, 22 and 52 of its stat); None where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The command's name stands in parentheses and may hold anything, parentheses too.
            fields = file.read().rpartition(")")[2].split()
        return fields[0], int(fields[19]), int(fields[49]) if len(fields) > 49 else 0
    except (OSError, IndexError, ValueError):
        return None
