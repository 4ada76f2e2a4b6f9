"""Two nodes: real ones in network namespaces where this process may make them, else played ones on this machine.

    with two_nodes(folder, preload=("torch",)) as nodes:
        nodes[0].start("rank0", argv, env, out, err)
        nodes.partition(1)

Real nodes need root, iproute2 and util-linux's unshare, and a network of this process's own (`isolated_command`): when
it ends, however it ends, its nodes, their processes, interfaces and disks are gone with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from places import SUPPORT
from warm_ranks import THREADS, installed_path

SERVER = Path(__file__).with_name("node_server.py")
NAMESPACES = (
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
)
ISOLATED = "FAULTS_ISOLATED"
SUBNET = "10.77.0"
OUTSIDE = f"{SUBNET}.254"
"""Where the servers of this process are for the nodes."""
START_S = 120.0
PR_SET_PDEATHSIG = 1


@cache
def can_be_real() -> bool:
    """Whether this machine lets us make real nodes."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter", "mount"))):
        return False
    tried = ["unshare", "--uts", *NAMESPACES, "sh", "-c", "ip link add name switch type bridge"]
    return subprocess.run(tried, check=False, capture_output=True).returncode == 0


def isolated_command(command: Sequence[str]) -> list[str]:
    """`command`, in namespaces in which it can make real nodes, where this machine can have them."""
    if not can_be_real():
        return list(command)
    return ["unshare", *NAMESPACES, "env", f"{ISOLATED}=1", *command]


def end_with_parent() -> None:
    """Has the kernel end this process when the one ends that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Node:
    """One node, and its process."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    pid: int
    real: bool
    disks: Mapping[str, str]
    """What it has on its own: by what it is for, a folder."""

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str], streams: str) -> int:
        """Starts a rank; its streams go to the files ``STREAMS.out`` and ``STREAMS.err``."""
        for stream in ("out", "err"):
            Path(f"{streams}.{stream}").touch()
        path = [os.path.dirname(argv[0]), *env.get("PYTHONPATH", "").split(os.pathsep), *installed_path()]
        answer = self.ask(
            "start",
            id=name,
            argv=list(argv),
            env=dict(env),
            path=list(filter(None, path)),
            cwd=os.path.dirname(streams),
            out=f"{streams}.out",
            err=f"{streams}.err",
        )
        return int(answer["pid"])

    def ended(self) -> dict[str, int]:
        """The exit codes of those that have ended."""
        return dict(self.ask("ended")["ended"])

    def signal(self, name: str, number: int) -> None:
        self.ask("signal", id=name, number=int(number))

    def left(self) -> dict[str, list[str]]:
        """What is there of processes, files and sockets."""
        return self.ask("left", folders=self._own())

    def clear(self) -> None:
        """Ends what runs, and empties the disks."""
        self.ask("clear", folders=self._own())

    def inside(self, path: str) -> Path:
        """How this process reaches a path of the node's own."""
        return Path(f"/proc/{self.pid}/root{path}" if self.real else path)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **arguments}).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} has ended with exit code {self.process.wait()}")
        return dict(json.loads(answer))

    def _own(self) -> list[str]:
        return list(self.disks.values())


@dataclass
class Nodes:
    """Both nodes. ``real``: whether each has a network, a process table and disks of its own."""

    real: bool
    nodes: tuple[Node, Node]
    outside: str
    """The address of what this process serves."""

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    def partition(self, number: int) -> None:
        """Cuts the node off from everything."""
        run("ip", "link", "set", f"port{number}", "down")

    def join(self) -> None:
        """Has every node in the network again."""
        for number in range(2):
            run("ip", "link", "set", f"port{number}", "up")


@contextlib.contextmanager
def two_nodes(
    folder: Path, *, preload: Sequence[str], shm: str = "64m", small: str = "24m"
) -> Iterator[Nodes]:
    """Starts both nodes; they end with the block.

    Args:
        folder: where their own folders are; both nodes see it, but for those.
        preload: what their process imports before it forks.
        shm: size of each one's /dev/shm, as Docker's.
        small: size of each one's small disk.
    """
    real = os.environ.get(ISOLATED) == "1"
    hosts = folder / "hosts"
    hosts.write_text(
        f"127.0.0.1 localhost\n{SUBNET}.1 node-a\n{SUBNET}.2 node-b\n{OUTSIDE} outside\n", encoding="ascii"
    )
    if real:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "name", "switch", "type", "bridge")
        run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "switch")
        run("ip", "link", "set", "switch", "up")
    with contextlib.ExitStack() as leaving:
        made = []
        for number, name in enumerate(("node-a", "node-b")):
            own = folder / name
            disks = {"tmp": str(own / "tmp"), "small": str(own / "small")}
            for disk in disks.values():
                os.makedirs(disk)
            spec = {
                "real": real,
                "hostname": name,
                "hosts": str(hosts),
                "shm": shm,
                "disks": {disks["tmp"]: "256m", disks["small"]: small},
                "preload": list(preload),
            }
            if real:
                disks["shm"] = "/dev/shm"
            process = leaving.enter_context(_server(spec, real))
            pid = _inner_pid(process.pid) if real else process.pid
            node = Node(name, f"{SUBNET}.{number + 1}" if real else "127.0.0.1", process, pid, real, disks)
            made.append(node)
        for number, node in enumerate(made):
            assert node.process.stdout is not None
            if real:
                _connect(number, node.pid, node.address)
            if not node.process.stdout.readline():
                raise RuntimeError(f"{node.name} did not start")
        yield Nodes(real, (made[0], made[1]), OUTSIDE if real else "127.0.0.1")


@contextlib.contextmanager
def _server(spec: Mapping[str, Any], real: bool) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(SERVER), json.dumps(spec)]
    if real:
        command = ["unshare", "--uts", *NAMESPACES, *command]
    env = {**os.environ, **dict.fromkeys(THREADS, "1"), "DS_ACCELERATOR": "cpu"}
    path = (str(SUPPORT), env.get("PYTHONPATH", ""))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _inner_pid(unshare: int) -> int:
    """The process that unshare has forked."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise RuntimeError("unshare has started nothing")


def _connect(number: int, pid: int, address: str) -> None:
    """Plugs a node into the switch."""
    run(
        "ip",
        "link",
        "add",
        "name",
        f"port{number}",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        str(pid),
    )
    run("ip", "link", "set", f"port{number}", "master", "switch", "up")
    inside = ("nsenter", "-t", str(pid), "-n", "ip")
    run(*inside, "addr", "add", f"{address}/24", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")


def run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
