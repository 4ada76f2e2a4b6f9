"""How much memory is left, by the node and by control groups of both versions, from files as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest
from rankload.loader.cache import folder as cache_folder
from rankload.loader.cache.memory import available_bytes, is_in_memory

V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V2 = "31 23 0:26 {root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw"


def node(root: Path, own: str, mounts: list[str], groups: dict[str, dict[str, object]]) -> Path:
    """A node with 1,000 KB available, whose process is in the group that ``/proc/self/cgroup`` says."""
    files: dict[str, object] = {
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable:    1000 kB\n",
        "proc/self/cgroup": own,
        "proc/self/mountinfo": "25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw,size=65536k\n" + "\n".join(mounts),
    }
    for folder, values in groups.items():
        files |= {f"{folder.lstrip('/')}/{name}": value for name, value in values.items()}
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def second(limit: object, used: int, droppable: int = 0) -> dict[str, object]:
    stat = f"anon 1\ninactive_file {droppable}\nactive_file 9"
    return {"memory.max": limit, "memory.current": used, "memory.stat": stat}


def first(limit: int, used: int, droppable: int = 0) -> dict[str, object]:
    stat = f"inactive_file 7\ntotal_inactive_file {droppable}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


@pytest.mark.parametrize(
    ("own", "mounts", "groups", "left"),
    [
        ("0::/", [], {}, 1_024_000),
        ("0::/", [V2.format(root="/")], {"/sys/fs/cgroup": second("max", 10)}, 1_024_000),
        ("0::/", [V2.format(root="/")], {"/sys/fs/cgroup": second(900_000, 500_000, 200_000)}, 600_000),
        # A limit of the group above its own.
        ("0::/a/b", [V2.format(root="/")],
         {"/sys/fs/cgroup/a": second(700_000, 600_000), "/sys/fs/cgroup/a/b": second("max", 600_000)}, 100_000),
        # In a container that shows the host's path, the mount is the group itself.
        ("0::/docker/c1", [V2.format(root="/docker/c1")], {"/sys/fs/cgroup": second(300_000, 1)}, 299_999),
        ("4:memory:/docker/c1\n0::/", [V1.format(root="/docker/c1")],
         {"/sys/fs/cgroup/memory": first(500_000, 450_000, 20_000)}, 70_000),
        ("4:cpu,memory:/job", [V1.format(root="/")],
         {"/sys/fs/cgroup/memory": first(0x7FFFFFFFFFFFF000, 5), "/sys/fs/cgroup/memory/job": first(800_000, 1)},
         799_999),
        ("0::/", [V2.format(root="/")], {"/sys/fs/cgroup": second(500_000, 600_000)}, 0),
    ],
)  # fmt: skip
def test_the_least_of_the_node_and_its_groups_counts(
    tmp_path: Path, own: str, mounts: list[str], groups: dict[str, dict[str, object]], left: int
) -> None:
    assert available_bytes(str(node(tmp_path, own, mounts, groups))) == left


def test_a_node_that_tells_nothing_has_nothing_left(tmp_path: Path) -> None:
    assert available_bytes(str(tmp_path)) == 0
    assert not is_in_memory(str(tmp_path), str(tmp_path))


def test_the_room_of_a_folder_in_memory_is_no_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of one that the user gave, or that TMPDIR names."""
    monkeypatch.setattr(cache_folder, "available_bytes", lambda: 1000)
    on_disk = cache_folder.free_bytes_of(str(tmp_path))
    monkeypatch.setattr(cache_folder, "is_in_memory", lambda folder: folder == str(tmp_path))
    assert cache_folder.free_bytes_of(str(tmp_path)) == 1000 < on_disk
    if Path("/dev/shm").is_mount():
        assert is_in_memory("/dev/shm")
