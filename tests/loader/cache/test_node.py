"""The node cache: made once, whole or not at all, private, and gone afterwards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from rankload.loader.cache import folder as cache_folder
from rankload.loader.cache import records as cache_records
from rankload.loader.cache.node import NodeCache
from rankload.loader.errors import AccessError

FORK = multiprocessing.get_context("fork")


def nothing(n_bytes: int) -> None:
    pass


def writes(data: bytes):  # type: ignore[no-untyped-def]
    def produce(path: str) -> dict[str, object]:
        Path(path).write_bytes(data)
        return {"n": len(data)}

    return produce


def refuses(path: str) -> None:
    raise AssertionError("made again")


def test_made_once_and_removed_by_the_last_user(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    with NodeCache(folder) as one, NodeCache(folder) as two:
        assert not os.path.exists(folder)
        first = one.entry("s3://b/ep1.pt", "s3", "ep1.pt", 3, "v1").fill(
            "object", "ep1.pt", writes(b"abc"), nothing
        )
        second = two.entry("s3://b/ep1.pt", "s3", "ep1.pt", 3, "v1").fill(
            "object", "ep1.pt", refuses, nothing
        )
        assert (first.made_here, second.made_here) == (True, False)
        assert first.path == second.path
        assert second.details == {"n": 3}
        assert os.path.basename(first.path) == "ep1.pt"
        assert os.stat(folder).st_mode & 0o777 == 0o700
        other = two.entry("s3://b/ep1.pt", "s3", "ep1.pt", 3, "v2")
        assert other.folder != os.path.dirname(os.path.dirname(first.path))
        one.__exit__(None, None, None)
        assert Path(second.path).read_bytes() == b"abc"
    assert os.listdir(folder) == []


def test_default_folder_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with NodeCache() as cache:
        assert cache.folder == str(tmp_path / f"rankload-{os.getuid()}")
        cache.entry("x", 1).fill("object", "x", writes(b"x"), nothing)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "held", [b"[" * 100_000, b'{"sizes": ' * 2000, b"[1]", b"\xff", b'{"pid": 1e999, "host": 0}']
)
def test_a_damaged_record_is_as_none(tmp_path: Path, held: bytes) -> None:
    """A disk, or another version of this package, may have left anything in the folder."""
    entry = tmp_path / "entry"
    (entry / "users").mkdir(parents=True)
    (entry / "whole").mkdir()
    for path in (entry / "about", entry / "users" / "u", entry / "whole" / "claim", entry / "whole" / "done"):
        path.write_bytes(held)
    assert cache_records.about(str(entry)) == cache_records.About()
    assert cache_records.whole(str(entry / "whole"), str(entry / "about")) is None
    assert not cache_records.in_use(str(entry), time.time() + 1e6)


def test_folders_as_products(tmp_path: Path) -> None:
    def produce(path: str) -> None:
        os.makedirs(os.path.join(path, "d"))
        Path(path, "d", "a").write_bytes(b"1234")

    with NodeCache(str(tmp_path / "c")) as cache:
        filled = cache.entry("x", 1).fill("object", "x.tar", produce, nothing)
        again = cache.entry("x", 1).fill("object", "x.tar", refuses, nothing)
        assert Path(again.path, "d", "a").read_bytes() == b"1234"
        os.truncate(Path(filled.path, "d", "a"), 2)
        assert cache.entry("x", 1).fill("object", "x.tar", produce, nothing).made_here


def test_a_failed_maker_leaves_nothing(tmp_path: Path) -> None:
    def fails(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise AccessError("no")

    with NodeCache(str(tmp_path / "c")) as cache:
        entry = cache.entry("x", 1)
        with pytest.raises(AccessError):
            entry.fill("object", "x", fails, nothing)
        assert os.listdir(os.path.join(entry.folder, "object")) == []
        assert entry.fill("object", "x", writes(b"whole"), nothing).made_here


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_writable_by_others(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(AccessError, match="written by others"), NodeCache(str(folder)) as cache:
        cache.entry("x", 1)


def test_links_files_and_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(AccessError, match="symbolic link"):
        NodeCache(str(tmp_path / "link")).entry("x", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(AccessError, match="not a folder"):
        NodeCache(str(tmp_path / "file")).entry("x", 1)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(AccessError, match="belongs to user"):
        NodeCache(str(tmp_path / "real")).entry("x", 1)


def joins(folder: str, path: str, joined: object, leave: object) -> None:
    with NodeCache(folder) as cache:
        cache.join([path, path])
        joined.set()  # type: ignore[attr-defined]
        assert leave.wait(20)  # type: ignore[attr-defined]
        assert Path(path).read_bytes() == b"whole"


@pytest.mark.parametrize("dies", [False, True])
def test_who_reads_what_another_fetched_is_its_user(tmp_path: Path, dies: bool) -> None:
    """Two nodes' leaders with one folder, and a follower of the first, which reads on when both have ended."""
    folder = str(tmp_path / "c")
    joined, leave = FORK.Event(), FORK.Event()
    with NodeCache(folder) as theirs:
        with NodeCache(folder) as cache:
            path = cache.entry("x", 1).fill("object", "x", writes(b"whole"), nothing).path
            theirs.entry("x", 1)
            follower = FORK.Process(target=joins, args=(folder, path, joined, leave))
            follower.start()
            assert joined.wait(10)
        assert os.path.exists(path)
        if dies:
            os.kill(follower.pid or 0, signal.SIGKILL)
            follower.join(10)
    assert os.path.exists(path) != dies
    if not dies:
        leave.set()
    follower.join(20)
    assert follower.exitcode == (-signal.SIGKILL if dies else 0)
    assert os.listdir(folder) == []


def test_what_is_gone_or_no_entry_is_not_joined(tmp_path: Path) -> None:
    folder, other = tmp_path / "c", tmp_path / "other"
    (other / "mine").mkdir(parents=True)
    (other / ".lock").touch()
    (other / "mine" / "x").write_bytes(b"mine")
    with NodeCache(str(folder)) as cache:
        path = cache.entry("x", 1).fill("object", "x", writes(b"whole"), nothing).path
        with NodeCache(str(folder)) as two:
            two.join([path.replace("/x-", "/y-"), str(other / "mine" / "x"), str(tmp_path / "nowhere")])
            two.join([path])
    assert os.listdir(folder) == []
    assert sorted(path.name for path in other.rglob("*")) == [".lock", "mine", "x"]


def slow_user(folder: str, log: str, started: object) -> None:
    def produce(path: str) -> None:
        with open(log, "a") as file:
            file.write("made\n")
        started.set()  # type: ignore[attr-defined]
        with open(path, "wb") as file:
            for _ in range(10):
                file.write(b"x" * 1000)
                file.flush()
                time.sleep(0.05)

    with NodeCache(folder) as cache:
        filled = cache.entry("x", 1).fill("object", "x", produce, nothing)
        assert os.path.getsize(filled.path) == 10_000
        time.sleep(0.2)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    started = FORK.Event()
    args = (str(tmp_path / "c"), str(tmp_path / "log"), started)
    users = [FORK.Process(target=slow_user, args=args) for _ in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join(20)
    assert [user.exitcode for user in users] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    assert os.listdir(tmp_path / "c") == []


def test_a_waiter_follows_the_maker(tmp_path: Path) -> None:
    started = FORK.Event()
    maker = FORK.Process(target=slow_user, args=(str(tmp_path / "c"), str(tmp_path / "log"), started))
    maker.start()
    assert started.wait(10)
    seen: list[int] = []
    with NodeCache(str(tmp_path / "c")) as cache:
        assert not cache.entry("x", 1).fill("object", "x", refuses, seen.append).made_here
    assert sum(seen) > 0
    maker.join(20)
    assert maker.exitcode == 0


def test_killed_maker(tmp_path: Path) -> None:
    started = FORK.Event()
    folder = str(tmp_path / "c")
    maker = FORK.Process(target=slow_user, args=(folder, str(tmp_path / "log"), started))
    maker.start()
    assert started.wait(10)
    time.sleep(0.1)
    os.kill(maker.pid or 0, signal.SIGKILL)
    maker.join(10)
    with NodeCache(folder) as cache:
        filled = cache.entry("x", 1).fill("object", "x", writes(b"whole"), nothing)
        assert filled.made_here
        assert Path(filled.path).read_bytes() == b"whole"
        left = os.listdir(os.path.dirname(filled.path))
        assert sorted(left) == ["done", "x"]
    assert os.listdir(folder) == []


def keeps_then_dies(folder: str) -> None:
    with NodeCache(folder) as cache:
        cache.entry("x", 1).fill("object", "x", writes(b"whole"), nothing)
        os._exit(0)


def test_what_a_crash_left_serves_the_restart_and_goes_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "c")
    for _ in range(2):
        child = FORK.Process(target=keeps_then_dies, args=(folder,))
        child.start()
        child.join(10)
    with NodeCache(folder) as cache:
        assert not cache.entry("x", 1).fill("object", "x", refuses, nothing).made_here
    assert os.listdir(folder) == []
    child = FORK.Process(target=keeps_then_dies, args=(folder,))
    child.start()
    child.join(10)
    monkeypatch.setattr(cache_records, "ORPHAN_S", 0.0)
    with NodeCache(folder) as cache:
        cache.entry("y", 1)
        assert len([name for name in os.listdir(folder) if name.startswith("x-")]) == 0


def test_the_silent_of_other_machines_count_as_dead(tmp_path: Path) -> None:
    folder = str(tmp_path / "c")
    with NodeCache(folder) as cache:
        entry = cache.entry("x", 1)
        slot = Path(entry.folder, "object")
        (slot / "work-other").mkdir(parents=True)
        claim = slot / "claim"
        claim.write_text(
            '{"host": "h", "pid": 1, "started": 5, "machine": "elsewhere", "work": "work-other"}'
        )
        ticks: list[int] = []

        class GaveUpError(Exception):
            pass

        def impatient(n_bytes: int) -> None:
            ticks.append(n_bytes)
            if len(ticks) > 3:
                raise GaveUpError

        with pytest.raises(GaveUpError):
            entry.fill("object", "x", refuses, impatient)
        long_ago = time.time() - cache_records.STALE_S - 10
        os.utime(claim, (long_ago, long_ago))
        assert entry.fill("object", "x", writes(b"x"), nothing).made_here


def test_a_held_lock_is_an_error_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "LOCK_TIMEOUT_S", 0.2)
    folder = str(tmp_path / "c")
    with cache_folder.locked(folder), pytest.raises(AccessError, match="locked"), cache_folder.locked(folder):
        pass
