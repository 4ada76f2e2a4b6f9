"""How much memory this process may still take: of the node, and of each control group that it is in (v1 and v2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

_IN_MEMORY = ("tmpfs", "ramfs")
"""File systems whose files take memory."""


@dataclass(frozen=True, slots=True)
class _Mount:
    device: str
    """Major and minor number, as ``major:minor``."""
    root: str
    """What of the file system is mounted."""
    point: str
    kind: str
    options: str


def available_bytes(root: str = "/") -> int:
    """How many bytes of memory this node, or a control group of this process, has left, without swapping others out.

    Of a group these are its limit less what it uses, where files that the kernel may drop from memory do not count as
    used. `root` is where ``proc`` and the mounted folders are looked for.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = _read(root, "/proc/meminfo").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        found += _left_in_groups(root)
    return max(0, min(found, default=0))


def is_in_memory(folder: str, root: str = "/") -> bool:
    """Whether files in `folder` take memory: it lies in a tmpfs, as ``/dev/shm`` is. False where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        device = os.stat(folder).st_dev
        own = f"{os.major(device)}:{os.minor(device)}"
        return any(one.device == own and one.kind in _IN_MEMORY for one in _mounts(root))
    return False


def _left_in_groups(root: str) -> Iterator[int]:
    """What each group that this process is in has left, from its own up to the first that is mounted."""
    groups = dict(_groups(root))
    for mount in _mounts(root):
        second = mount.kind == "cgroup2"
        if not second and not (mount.kind == "cgroup" and "memory" in mount.options.split(",")):
            continue
        group = groups.get("" if second else "memory")
        if group is None:
            continue
        # In a container the path may be the host's, of which the mount shows the end alone.
        below = os.path.relpath(group, mount.root)
        inside = "" if below == "." or below.startswith("..") else below
        while True:
            with contextlib.suppress(OSError, ValueError, IndexError):
                yield from _left(root, os.path.join(mount.point, inside), second=second)
            if not inside:
                break
            inside = os.path.dirname(inside)


def _left(root: str, folder: str, *, second: bool) -> Iterator[int]:
    """What the group in `folder` has left, where it has a limit."""
    limit = _read(root, f"{folder}/{'memory.max' if second else 'memory.limit_in_bytes'}").strip()
    if limit == "max":
        return
    used = int(_read(root, f"{folder}/{'memory.current' if second else 'memory.usage_in_bytes'}"))
    droppable = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        key = "inactive_file" if second else "total_inactive_file"
        lines = (line.split() for line in _read(root, f"{folder}/memory.stat").splitlines())
        droppable = next((int(line[1]) for line in lines if line[0] == key), 0)
    yield int(limit) - max(0, used - droppable)


def _groups(root: str) -> Iterator[tuple[str, str]]:
    """The path of this process's group, by controller; by ``""`` of version 2."""
    for line in _read(root, "/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, path


def _mounts(root: str) -> Iterator[_Mount]:
    for line in _read(root, "/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        kind, options = more[0], more[-1]
        yield _Mount(fields[2], _plain(fields[3]), _plain(fields[4]), kind, options)


def _plain(path: str) -> str:
    """`path` without mountinfo's escapes."""
    for code in ("040", "011", "012", "134"):
        path = path.replace(f"\\{code}", chr(int(code, 8)))
    return path


def _read(root: str, path: str) -> str:
    with open(os.path.join(root, path.lstrip("/")), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()
