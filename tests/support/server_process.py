"""A server as a process of its own: found, started with a deadline, and ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

START_DEADLINE_S = 40.0
END_DEADLINE_S = 5.0
TRIES = 3
"""A port that was free when it was chosen may be taken by the time the server wants it."""


class ServerMissing(Exception):  # noqa: N818 - it is no error: the tests are skipped
    """The server cannot be had here; the message says what is missing."""


@contextlib.contextmanager
def or_skip(server: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """The server, or a skipped test that says why there is none."""
    import pytest

    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(server)
        except ServerMissing as missing:
            pytest.skip(str(missing))
        yield running


def find_program(name: str, how: str) -> str:
    """The path of a program: in this environment, on the PATH, or where Debian keeps servers.

    Raises `ServerMissing`, which says `how` to install it.
    """
    folders = [
        Path(sys.prefix, "bin"),
        Path(sys.prefix, "servers", "node_modules", ".bin"),
        *map(Path, os.environ.get("PATH", "").split(os.pathsep)),
        Path("/usr/sbin"),
        Path("/usr/local/sbin"),
    ]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise ServerMissing(f"{name} is not installed ({how})")
    return found


def free_ports(n: int) -> list[int]:
    """`n` TCP ports of the loopback interface that nobody listens on at the moment.

    The kernel hands them out of the range for outgoing connections, so one may be gone a moment later.
    """
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(n)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


@contextlib.contextmanager
def started(
    command: Callable[[Sequence[int]], Sequence[str]],
    *,
    ports: int,
    log: Path,
    ready: Callable[[Sequence[int]], bool],
    env: Mapping[str, str] | None = None,
    stop_signal: int = signal.SIGTERM,
) -> Iterator[Sequence[int]]:
    """Runs a server on `ports` free ports, which it yields once `ready` says yes to them.

    `command` is given the ports; what the server prints goes to `log`. The server ends with the block, and
    with this process, however that ends. Raises `RuntimeError` with the end of its log where it does not start.
    """
    for attempt in range(TRIES):
        chosen = free_ports(ports)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*_end_with_parent(stop_signal), *command(chosen)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=log.parent,
                start_new_session=True,
            )
        try:
            if _wait_until_ready(process, lambda chosen=chosen: ready(chosen)):
                yield chosen
                return
            hangs = process.poll() is None
        finally:
            end_session(process, stop_signal)
        if hangs or attempt == TRIES - 1:
            break
    raise RuntimeError(f"{command(chosen)[0]} did not start:\n{log.read_text(errors='replace')[-4000:]}")


def end_session(process: subprocess.Popen[bytes], stop_signal: int = signal.SIGTERM) -> None:
    """Asks a server that leads a session to end, then kills what is left of its process group; reaps it.

    sshd puts each connection's process into a session of its own: what the server started is ended too.
    """
    started_by_it: list[int] = []
    if process.poll() is None:
        started_by_it = _descendants(process.pid)
        process.send_signal(stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_DEADLINE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pid in started_by_it:
        if _parent(pid) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def answers(port: int) -> bool:
    """Whether somebody accepts connections on the loopback port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait_until_ready(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    end = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end and process.poll() is None:
        if ready():
            return process.poll() is None
        time.sleep(0.05)
    return False


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (parent := _parent(int(entry))) is not None:
            children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        more = children.get(waiting.pop(), [])
        found += more
        waiting += more
    return found


def _parent(pid: int) -> int | None:
    """Its parent's pid; None where it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(parent)


def _end_with_parent(stop_signal: int) -> list[str]:
    """Has the kernel end the server where the tests are killed."""
    setpriv = shutil.which("setpriv")
    name = signal.Signals(stop_signal).name.removeprefix("SIG")
    return [setpriv, "--pdeathsig", name] if setpriv else []
