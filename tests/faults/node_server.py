"""A node: one process that has imported torch, and forks the ranks that it is told to start.

    node_server.py '{"real": true, "hostname": "node-a", "hosts": "/path", "shm": "64m", "disks": {}, "preload": []}'

It is told a JSON object a line on its standard input, and answers with one a line on its standard output:

    {"do": "start", "id", "argv", "env", "path", "cwd", "out", "err"}   {"pid"}
    {"do": "ended"}                                                     {"ended": {ID: exit code}}, of all so far
    {"do": "signal", "id", "number"}                                    {}
    {"do": "left", "folders": [...]}        {"processes": [...], "files": [...], "sockets": [...]}
    {"do": "clear", "folders": [...]}       {}; kills what is left and empties the folders

Where it was started in namespaces of its own, it has a host name, a network, a table of processes, a /dev/shm and
small disks of its own, and is the first process there: whatever else runs in it at the end was left behind. Elsewhere
it plays a node, and shares all of that with the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
LISTENING, TIME_WAIT = "0A", "06"


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["real"]:
        become_a_node(spec)
    for name in spec["preload"]:
        # Which of them are installed is the ranks' concern.
        with contextlib.suppress(ImportError):
            __import__(name)
    Node(spec["real"]).serve()


def become_a_node(spec: dict[str, Any]) -> None:
    """Gives the namespaces that this process was started in what a machine has."""
    name = spec["hostname"].encode()
    if ctypes.CDLL(None, use_errno=True).sethostname(name, len(name)):
        raise OSError(ctypes.get_errno(), "sethostname")
    run("mount", "--bind", spec["hosts"], "/etc/hosts")
    for folder, size in {"/dev/shm": spec["shm"], **spec["disks"]}.items():
        os.makedirs(folder, exist_ok=True)
        run("mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", folder)
    run("ip", "link", "set", "lo", "up")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Node:
    def __init__(self, real: bool) -> None:
        self._real = real
        self._pids: dict[str, int] = {}
        self._ended: dict[str, int] = {}

    def serve(self) -> None:
        """Answers until its standard input ends; then nothing that it started runs any more."""
        tell({"ready": os.getpid()})
        pending = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0.05)
            self._reap()
            if not ready:
                continue
            received = os.read(0, 1 << 16)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                asked = json.loads(line)
                tell(getattr(self, "do_" + asked.pop("do"))(**asked))
        self._kill_all()

    def do_start(self, id: str, **rank: Any) -> dict[str, Any]:  # noqa: A002
        self._ended.pop(id, None)
        pid = os.fork()
        if pid == 0:
            from warm_ranks import become

            become(**rank)
        self._pids[id] = pid
        return {"pid": pid}

    def do_ended(self) -> dict[str, Any]:
        self._reap()
        return {"ended": self._ended}

    def do_signal(self, id: str, number: int) -> dict[str, Any]:  # noqa: A002
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids[id], number)
        return {}

    def do_left(self, folders: list[str]) -> dict[str, Any]:
        self._reap()
        return {
            "processes": self._processes(),
            "files": [path for folder in folders for path in files_in(folder)],
            "sockets": open_sockets() if self._real else [],
        }

    def do_clear(self, folders: list[str]) -> dict[str, Any]:
        self._kill_all()
        for folder in folders:
            for path in os.listdir(folder) if os.path.isdir(folder) else []:
                whole = os.path.join(folder, path)
                shutil.rmtree(whole) if os.path.isdir(whole) else os.unlink(whole)
        return {}

    def _processes(self) -> list[str]:
        """Of this node, all but this one; of a played node those that were started here and still run."""
        if not self._real:
            return [name for name in self._pids if name not in self._ended]
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                    found.append(file.read().replace(b"\0", b" ").decode(errors="replace").strip())
        return found

    def _kill_all(self) -> None:
        for name, pid in self._pids.items():
            if name not in self._ended:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self._real:
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)
        while any(name not in self._ended for name in self._pids):
            self._reap(wait=True)
        self._pids.clear()
        self._ended.clear()

    def _reap(self, *, wait: bool = False) -> None:
        names = {pid: name for name, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, 0 if wait else os.WNOHANG)
                if pid == 0:
                    return
                if pid in names:
                    self._ended[names[pid]] = os.waitstatus_to_exitcode(status)
                if wait and all(name in self._ended for name in self._pids):
                    return


def files_in(folder: str) -> list[str]:
    return [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]


def open_sockets() -> list[str]:
    """TCP sockets of this network that a process listens on or is connected by."""
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/self/net/{table}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                # An inode of 0: the process has closed it, and the kernel has not done with it.
                if fields[3] != TIME_WAIT and fields[9] != "0":
                    found.append(f"{fields[1]} {fields[2]} {fields[3]}")
    return found


def tell(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
