"""What stays in the cache once loads have ended, what goes, and which folder a file goes to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from rankload.loader.cache import homes as cache_homes
from rankload.loader.cache.bounds import Held, victims
from rankload.loader.cache.holes import PartialFile
from rankload.loader.cache.node import NodeCache
from rankload.loader.cache.records import ORPHAN_S
from rankload.loader.errors import AccessError
from rankload.loader.fetch.space_check import RoomReport, agree_on_room
from rankload.loader.stores.transfer import bytes_on_disk
from rankload.loader.wire import encode

FORK = multiprocessing.get_context("fork")
SIZE = 1 << 20


def nothing(n_bytes: int) -> None:
    pass


def writes(path: str) -> None:
    Path(path).write_bytes(b"x" * SIZE)


def refuses(path: str) -> None:
    raise AssertionError("made again")


def use(folder: str, checkpoint: str, *names: str, size: int = 100 * SIZE, made: bool = True) -> None:
    """A load of the checkpoint, of one file or several."""
    with NodeCache(folder, size_bytes=size) as cache:
        cache.of_checkpoint("store", checkpoint)
        for name in names or (checkpoint,):
            entry = cache.entry(f"s3://{name}", "store", name, SIZE, "v1", nbytes=SIZE)
            entry.fill("object", name, writes if made else refuses, nothing)


def held(folder: str) -> set[str]:
    return {name.rsplit("-", 1)[0] for name in os.listdir(folder) if not name.startswith(".")}


# --- what goes first -------------------------------------------------------------------------------------------------


def test_older_versions_go_first_then_whole_checkpoints_by_last_use() -> None:
    entries = [
        Held("a1", "a", "model", 1.0, 10),
        Held("a2", "a", "optimizer", 9.0, 10),
        Held("b1", "b", "model", 5.0, 10),
        Held("b0", "b", "model", 4.0, 10),
        Held("c1", "c", "model", 2.0, 10),
        Held("c2", "c", "optimizer", 2.0, 10, busy=True),
    ]

    def gone(surplus: int) -> list[str]:
        return [one.path for one in victims(entries, surplus)]

    assert gone(0) == []
    assert gone(1) == ["b0"]
    assert gone(11) == ["b0", "b1"]
    assert gone(21) == gone(1000) == ["b0", "b1", "a1", "a2"]


def test_what_fits_stays_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    folder, two = str(tmp_path / "c"), 2 * SIZE + SIZE // 2
    use(folder, "one", size=two)
    use(folder, "two", size=two)
    use(folder, "one", size=two, made=False)
    use(folder, "three", size=two)
    assert held(folder) == {"one", "three"}
    # A checkpoint goes as a whole, and what is larger than the cache does not stay.
    use(folder, "four", "four-a", "four-b", size=two)
    assert held(folder) == {"four-a", "four-b"}
    use(folder, "four", "four-a", size=two - SIZE, made=False)
    assert held(folder) == set()
    # A load for which nothing stays leaves alone what others keep.
    use(folder, "one", size=two)
    use(folder, "five", size=0)
    use(folder, "one", size=0, made=False)
    assert held(folder) == {"one"}


def test_what_a_prefetch_left_is_evicted_once_a_day_has_passed(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with NodeCache(str(folder), size_bytes=100 * SIZE, purpose="prefetch") as cache:
        cache.of_checkpoint("store", "awaited")
        cache.entry("s3://awaited", "store", "awaited").fill("object", "awaited", writes, nothing)
    (entry,) = (one for one in folder.iterdir() if one.is_dir())
    use(str(folder), "other", size=1)
    assert held(str(folder)) == {"awaited"}
    day_ago = time.time() - ORPHAN_S - 60
    os.utime(entry / "about", (day_ago, day_ago))
    use(str(folder), "other", size=1)
    assert held(str(folder)) == set()


def test_what_no_other_load_can_ask_for_does_not_stay(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    with NodeCache(folder, size_bytes=10 * SIZE) as cache:
        cache.entry("x", "store", "x", None, cache.load_id, lasting=False).fill(
            "object", "x", writes, nothing
        )
    assert held(folder) == set()


def test_holes_do_not_count(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    for name in ("one", "two"):
        with NodeCache(folder, size_bytes=2 * SIZE) as cache:
            cache.of_checkpoint("store", name)
            entry = cache.entry(name, "store", name, 50 * SIZE, "v1")
            os.mkdir(os.path.join(entry.folder, "parts"))
            file = PartialFile(os.path.join(entry.folder, "parts", name), 50 * SIZE)
            file.write(30 * SIZE, memoryview(b"y" * 4096))
            file.close()
    assert held(folder) == {"one", "two"}
    assert bytes_on_disk(folder) < SIZE


# --- with other processes --------------------------------------------------------------------------------------------


def holds(folder: str, ready: Any, done: Any) -> None:
    with NodeCache(folder, size_bytes=100 * SIZE) as cache:
        cache.of_checkpoint("store", "old")
        cache.entry("s3://old", "store", "old", SIZE, "v1").fill("object", "old", writes, nothing)
        ready.set()
        done.wait(30)


@pytest.mark.parametrize("killed", [False, True])
def test_what_another_process_uses_is_never_evicted(tmp_path: Path, killed: bool) -> None:
    folder = str(tmp_path / "c")
    ready, done = FORK.Event(), FORK.Event()
    other = FORK.Process(target=holds, args=(folder, ready, done))
    other.start()
    assert ready.wait(10)
    use(folder, "new", size=SIZE // 2)
    assert held(folder) == {"old"}
    # It shares what the other one has.
    use(folder, "old", size=SIZE // 2, made=False)
    assert held(folder) == {"old"}
    if killed:
        os.kill(other.pid or 0, signal.SIGKILL)
    done.set() if not killed else None
    other.join(10)
    assert other.exitcode == (-signal.SIGKILL if killed else 0)
    assert held(folder) == {"old"}
    use(folder, "new", size=SIZE + SIZE // 2)
    assert held(folder) == {"new"}


# --- homes -----------------------------------------------------------------------------------------------------------


class Node:
    """A node with its own /dev/shm, whose free bytes are what the test says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shm, self.tmp = tmp_path / "shm", tmp_path / "tmp"
        self.shm.mkdir()
        self.tmp.mkdir()
        self.memory = self.free = self.disk = 1 << 40
        monkeypatch.setattr(cache_homes, "MEMORY_FOLDER", str(self.shm))
        monkeypatch.setattr(cache_homes, "available_bytes", lambda: self.memory)
        monkeypatch.setattr(
            cache_homes, "free_bytes_of", lambda folder: self.free if folder == str(self.shm) else self.disk
        )
        monkeypatch.setattr("tempfile.tempdir", str(self.tmp))
        name = f"rankload-{os.getuid()}"
        self.in_memory, self.on_disk = str(self.shm / name), str(self.tmp / name)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def home_of(cache: NodeCache, name: str, nbytes: int | None = SIZE) -> str:
    return cache.entry(name, "store", name, nbytes, "v1", nbytes=nbytes).home


def test_memory_while_it_has_twice_the_room(node: Node) -> None:
    node.free = 5 * SIZE
    with NodeCache(home="auto") as cache:
        homes = [home_of(cache, name) for name in ("a", "b", "c")]
        assert homes == [node.in_memory, node.in_memory, node.on_disk]
        assert home_of(cache, "d", None) == node.on_disk
        assert home_of(cache, "a") == node.in_memory
        assert os.stat(node.in_memory).st_mode & 0o777 == 0o700
    assert os.listdir(node.shm) == os.listdir(node.tmp) == []
    node.free, node.memory = 1 << 40, SIZE
    with NodeCache(home="auto") as cache:
        assert home_of(cache, "a") == node.on_disk
    with NodeCache(home="disk") as cache:
        assert home_of(cache, "a", 1) == node.on_disk
    with NodeCache(home="memory", size_bytes=100 * SIZE) as cache:
        assert home_of(cache, "a") == node.in_memory
    # What shall stay goes to disk; a folder that was given is the only one.
    node.memory = 1 << 40
    with NodeCache(home="auto", size_bytes=SIZE) as cache:
        assert home_of(cache, "a") == node.on_disk
    with NodeCache(str(node.tmp / "given"), home="auto") as cache:
        assert home_of(cache, "a") == str(node.tmp / "given")
    assert os.listdir(node.shm) == []


def test_no_memory_folder(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_homes, "MEMORY_FOLDER", str(node.shm / "none"))
    with NodeCache(home="auto") as cache:
        assert home_of(cache, "a") == node.on_disk
    with pytest.raises(AccessError, match="cache_home"):
        NodeCache(home="memory")


def test_somebody_elses_folder_in_memory_is_not_used(node: Node) -> None:
    os.mkdir(node.in_memory)
    os.chmod(node.in_memory, 0o777)
    Path(node.in_memory, "theirs").touch()
    with NodeCache(home="auto") as cache:
        assert home_of(cache, "a") == node.on_disk
    with NodeCache(home="memory") as cache, pytest.raises(AccessError, match="written by others"):
        home_of(cache, "a")
    assert os.listdir(node.in_memory) == ["theirs"]


def dies(ready: Any) -> None:
    with NodeCache(home="auto") as cache:
        for name in ("one", "two"):
            cache.of_checkpoint("store", name)
            entry = cache.entry(name, "store", name, SIZE, "v1", nbytes=SIZE)
            os.mkdir(os.path.join(entry.folder, "parts"))
            file = PartialFile(os.path.join(entry.folder, "parts", name), SIZE)
            file.write(0, memoryview(b"y" * 4096))
            file.land(0, 4096, 0)
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("size", [0, 100 * SIZE])
def test_what_a_killed_load_left_in_memory_is_continued_or_goes(node: Node, size: int) -> None:
    ready = FORK.Event()
    child = FORK.Process(target=dies, args=(ready,))
    child.start()
    assert ready.wait(10)
    with NodeCache(home="auto") as cache:
        home_of(cache, "three")
        assert held(node.in_memory) == {"one", "two", "three"}, "taken from under a load"
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join(10)
    node.free = 0
    with NodeCache(home="auto", size_bytes=size) as cache:
        cache.of_checkpoint("store", "one")
        # There is no more room in memory, and yet it goes on where it was.
        entry = cache.entry("one", "store", "one", SIZE, "v1", nbytes=SIZE)
        assert os.path.exists(os.path.join(entry.folder, "parts", "one.landed"))
        assert held(node.in_memory) == {"one"}
        assert home_of(cache, "other version") == node.on_disk
    assert os.listdir(node.shm) == []


# --- whether it fits -------------------------------------------------------------------------------------------------


class Channel:
    """As many ranks as there are reports: this one's and others'."""

    rank, host = 0, "here"

    def __init__(self, *others: Any) -> None:
        self.others = others

    def counters(self) -> dict[int, dict[str, float]]:
        return {0: {"bytes_done": 7}}

    def decide(self, name: str, value: Any, decider: Any) -> Any:
        return decider([value, *self.others])


def test_all_nodes_are_named_that_have_no_room(node: Node) -> None:
    other = encode(RoomReport(1, "there", 3, (cache_homes.Room("/c", 50, 49, in_memory=False),)))
    with NodeCache(home="auto") as cache:
        home_of(cache, "a")
        home_of(cache, "b", None)
        node.free = SIZE - 1
        channel: Any = Channel(other)
        with pytest.raises(AccessError) as caught:
            agree_on_room(channel, 0, cache, {node.in_memory: SIZE, node.on_disk: SIZE}, "fetch parts")
        for text in (
            "node 0 (here)", f"1,048,576 bytes into {node.in_memory}, where 1,048,575 are free",
            "node 1 (there)", "50 bytes into /c, where 49 are free", "cache_home to 'disk'", "cache_dir",
        ):  # fmt: skip
            assert text in caught.value.message
        assert node.on_disk not in caught.value.message
        node.free = SIZE
        channel = Channel(
            encode(RoomReport(1, "there", 3, (cache_homes.Room("/c", 50, 50, in_memory=False),)))
        )
        assert agree_on_room(channel, 0, cache, {node.in_memory: SIZE}, "fetch parts") == 10 + SIZE + 50


def test_what_nobody_uses_makes_room(node: Node) -> None:
    for name in ("one", "two"):
        use(node.on_disk, name)
    node.disk = SIZE // 2
    with NodeCache(home="disk", size_bytes=100 * SIZE) as cache:
        home_of(cache, "three")
        with pytest.raises(AccessError, match="are free"):
            agree_on_room(Channel(), 0, cache, {node.on_disk: 3 * SIZE}, "fetch")  # type: ignore[arg-type]
        assert held(node.on_disk) == {"one", "two", "three"}
        agree_on_room(Channel(), 0, cache, {node.on_disk: SIZE}, "fetch")  # type: ignore[arg-type]
        assert held(node.on_disk) == {"two", "three"}
