"""Fetch: once per node, the same outcome on every rank, nothing left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from http_server import Served, counting_server
from rankload.distributed.channel import Channel
from rankload.distributed.key_value import KeyValue
from rankload.distributed.session import Session
from rankload.loader.cache.node import NodeCache
from rankload.loader.context import LoadContext
from rankload.loader.errors import (
    CorruptError,
    FormatError,
    NotFoundError,
    PeerError,
    RankloadError,
    StalledError,
    UnsafeError,
)
from rankload.loader.fetch.files import Fetched, FileNeed, fetch_files
from rankload.loader.options import resolve_options
from rankload.loader.retries import Outages
from rankload.loader.stages import Stages
from rankload.loader.stores.open import open_store
from torch.distributed import HashStore


@dataclass(frozen=True)
class Place:
    rank: int
    node_rank: int


def context(channel: Channel, place: Any, store: Any, cache: NodeCache) -> LoadContext:
    return LoadContext(Session(place, channel), resolve_options(None, {}), Stages(channel), store, cache)


class Rank:
    """One rank's channel, and its place."""

    def __init__(self, store: Any, nodes: list[int], rank: int, stall_timeout_s: float) -> None:
        self.channel = Channel(lambda: KeyValue(store), rank, len(nodes), stall_timeout_s)
        # Each node of the test is this machine.
        self.channel.host = f"host{nodes[rank]}"
        self.rank = rank
        self.place = Place(rank, nodes[rank])


class Job:
    """Ranks as threads, which agree over real channels on a store in memory."""

    def __init__(self, nodes: list[int], stall_timeout_s: float = 30.0) -> None:
        self.nodes = nodes
        self.stall_timeout_s = stall_timeout_s
        self.told: dict[int, dict[str, float]] = {}

    def run(self, work: Callable[[Rank], Any], deadline_s: float = 20.0) -> list[Any]:
        outcomes: list[Any] = [None] * len(self.nodes)
        store = HashStore()

        def one(number: int) -> None:
            rank = Rank(store, self.nodes, number, self.stall_timeout_s)
            try:
                outcomes[number] = work(rank)
                self.told[number] = dict(rank.channel.counters().get(number, {}))
                rank.channel.close()
            except BaseException as error:
                outcomes[number] = rank.channel.close(error) or error

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(self.nodes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(deadline_s)
            assert not thread.is_alive(), "a rank hangs"
        assert not [each.name for each in threading.enumerate() if each.name.startswith("rankload-")]
        return outcomes


def fetch(
    rank: Rank, path: str, needs: list[Any], cache_dir: Path, object_store: Any = None, keep: Any = None
) -> Fetched:
    store, _ = open_store(path, object_store, outages=Outages(rank.channel.stall_timeout_s))
    with NodeCache(str(cache_dir)) as cache:
        got = fetch_files(context(rank.channel, rank.place, store, cache), needs)
        for file in got.files.values():
            if file.kind == "file":
                Path(file.path).read_bytes()
        if keep is not None:
            keep(rank, got)
        # As a load does: nobody gives the cache back while somebody reads.
        with rank.channel.stage("read"):
            pass
    store.close()
    return got


def only_error(outcomes: list[Any], kind: type[RankloadError]) -> RankloadError:
    assert all(type(each) is kind for each in outcomes), outcomes
    assert len({str(each) for each in outcomes}) == 1
    return outcomes[0]  # type: ignore[no-any-return]


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        root = tarfile.TarInfo("/")
        root.type = tarfile.DIRTYPE
        archive.addfile(root)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


# ---------------------------------------------------------------- http


def test_each_file_once_per_node(tmp_path: Path) -> None:
    bodies = {f"/r{rank}.pt": os.urandom(100_000 + rank) for rank in range(4)}
    with counting_server({path: Served(body) for path, body in bodies.items()}) as server:
        job = Job([0, 0, 1, 1])

        def work(rank: Rank) -> Any:
            names = [server.url("/r0.pt"), server.url(f"/r{rank.rank}.pt")]
            return fetch(rank, names[0], names, tmp_path / f"node{rank.place.node_rank}")

        outcomes = job.run(work)
        assert [len(each.files) for each in outcomes] == [1, 2, 2, 2]
        assert outcomes[2].files[server.url("/r0.pt")].fetched_bytes == 100_000
        assert {path: server.gets(path) for path in bodies} == {
            "/r0.pt": 2,
            "/r1.pt": 1,
            "/r2.pt": 1,
            "/r3.pt": 1,
        }
        assert server.bytes_sent["/r3.pt"] == len(bodies["/r3.pt"])
        assert server.bytes_sent["/r0.pt"] == 200_000
    assert job.told[0] == {"bytes_done": 200_001, "bytes_total": 200_001}
    assert job.told[2] == {"bytes_done": 300_005, "bytes_total": 300_005}
    assert job.told[1] == {}
    assert os.listdir(tmp_path / "node0") == os.listdir(tmp_path / "node1") == []


def test_nodes_that_share_a_cache_fetch_once_in_all(tmp_path: Path) -> None:
    with counting_server({"/a.pt": Served(b"x" * 400_000, chunk=40_000, pause_s=0.05)}) as server:
        url = server.url("/a.pt")
        outcomes = Job([0, 1]).run(lambda rank: fetch(rank, url, [url], tmp_path / "shared"))
        assert server.gets("/a.pt") == 1
        assert outcomes[0].paths == outcomes[1].paths
        assert sorted(each.fetched_bytes for each in outcomes) == [0, 400_000]
    assert os.listdir(tmp_path / "shared") == []


def test_a_second_fetch_of_the_same_load(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"a", etag=None), "/b": Served(b"b", head_status=405)}) as server:

        def work(rank: Rank) -> Any:
            store, name = open_store(server.url("/a"))
            with NodeCache(str(tmp_path / "c")) as cache:
                own = context(rank.channel, rank.place, store, cache)
                first = fetch_files(own, [name])
                second = fetch_files(own, [name, server.url("/b")], stage="more")
                third = fetch_files(own, [server.url("/b")], stage="again")
                assert second.paths[name] == first.paths[name]
                return third

        assert Job([0]).run(work)[0].paths
        assert (server.gets("/a"), server.gets("/b")) == (1, 1)


def test_missing_on_any_rank_is_an_error_on_all(tmp_path: Path) -> None:
    with counting_server({"/r0.pt": Served(b"x")}) as server:

        def work(rank: Rank) -> Any:
            name = server.url(f"/r{rank.rank}.pt?sig=SECRET")
            return fetch(rank, name, [name], tmp_path / "c")

        error = only_error(Job([0, 0, 0]).run(work), NotFoundError)
        assert "/r1.pt: not there, needed by rank 1" in str(error)
        assert "/r2.pt" in str(error)
        assert "SECRET" not in str(error)
        assert (error.rank, error.host) == (1, "host0")
        assert server.gets("/r0.pt") == 0


def test_missing_where_only_the_download_tells(tmp_path: Path) -> None:
    served = {"/a": Served(status=404, head_status=405), "/l.symlink": Served(b"b"), "/b": Served(b"bee")}
    served["/l"] = Served(status=404, head_status=405)
    with counting_server(served) as server:
        error = only_error(
            Job([0, 0]).run(lambda rank: fetch(rank, server.url("/a"), [server.url("/a")], tmp_path / "c")),
            NotFoundError,
        )
        assert "needed by ranks 0, 1" in str(error)
        name = server.url("/l")
        outcome = Job([0]).run(lambda rank: fetch(rank, name, [name], tmp_path / "c"))[0]
        assert outcome.files[name].source == server.url("/b")


def test_optional_files(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"x")}) as server:
        needs = [server.url("/a"), FileNeed(server.url("/none"), optional=True)]
        outcomes = Job([0, 1]).run(lambda rank: fetch(rank, server.url("/a"), needs, tmp_path / "c"))
        assert [list(each.files) for each in outcomes] == [[server.url("/a")]] * 2


def test_truncated(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"x" * 1000, truncate_to=10), "/b": Served(b"y" * 1000)}) as server:
        needs = [server.url("/a"), server.url("/b")]
        job = Job([0, 0], stall_timeout_s=3)
        error = only_error(job.run(lambda rank: fetch(rank, needs[0], needs, tmp_path / "c")), CorruptError)
        assert "expected 1,000 bytes, got 10" in str(error)
    assert os.listdir(tmp_path / "c") == []


def test_slow_is_not_dead_and_stalled_is(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"x" * 20_000, chunk=1000, pause_s=0.1)}) as server:
        url = server.url("/a")
        outcomes = Job([0, 0], stall_timeout_s=1.5).run(lambda rank: fetch(rank, url, [url], tmp_path / "c"))
        assert outcomes[1].files[url].size_bytes == 20_000
        server.served["/a"] = Served(b"x" * 20_000, chunk=1000, stall_after=5000)
        started = time.monotonic()
        error = only_error(
            Job([0, 0], stall_timeout_s=1.5).run(lambda rank: fetch(rank, url, [url], tmp_path / "c")),
            StalledError,
        )
        assert time.monotonic() - started < 5
        assert "a at byte 5000" in str(error)
    assert os.listdir(tmp_path / "c") == []


def test_another_ranks_failure_stops_the_threads(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"x" * 10**7, chunk=1000, pause_s=0.05)}) as server:
        url = server.url("/a")
        job = Job([0, 0])

        def work(rank: Rank) -> Any:
            if rank.rank == 1:
                fetch_needs = rank.channel.gather(
                    "fetch: needs", {"node": 0, "host": "h", "required": [], "optional": [], "load": ""}
                )
                assert fetch_needs
                rank.channel.decide("fetch: find", {}, lambda values: None)
                time.sleep(0.3)
                raise PeerError("rank 1 died")
            return fetch(rank, url, [url], tmp_path / "c")

        started = time.monotonic()
        only_error(job.run(work), PeerError)
        assert time.monotonic() - started < 5
    assert os.listdir(tmp_path / "c") == []


# ---------------------------------------------------------------- local


def test_local_files_stay_where_they_are(tmp_path: Path) -> None:
    path = str(tmp_path / "a#1?.pt")
    Path(path).write_bytes(b"PK\3\4")
    outcome = Job([0, 0]).run(lambda rank: fetch(rank, path, [path], tmp_path / "c"))[1]
    assert outcome.paths == {path: path}
    assert outcome.fetched_bytes == 0
    assert not (tmp_path / "c").exists()


def test_each_node_with_its_own_disk(tmp_path: Path) -> None:
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
    for rank in (0, 1, 3):
        (tmp_path / f"node{rank // 2}" / f"r{rank}.pt").write_bytes(b"x")

    class Disk:
        """A node's own disk: the same names lead elsewhere on each node."""

        def __init__(self, node: int) -> None:
            self._inner, _ = open_store("/")
            self._root = str(tmp_path / f"node{node}")

        def stat(self, name: str) -> Any:
            return self._inner.stat(self._root + name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    def work(rank: Rank) -> Any:
        store: Any = Disk(rank.place.node_rank)
        with NodeCache(str(tmp_path / "c")) as cache:
            names = ["/r0.pt", f"/r{rank.rank}.pt"]
            return fetch_files(context(rank.channel, rank.place, store, cache), names)

    error = only_error(Job([0, 0, 1, 1]).run(work), NotFoundError)
    assert "/r0.pt: not there, needed by ranks 2, 3" in str(error)
    assert "missing on node 1 on host host1; there on node 0 on host host0" in str(error)
    assert "/r2.pt: not there, needed by rank 2" in str(error)
    assert "there on no other" in str(error)


def test_folders_and_missing_local_files(tmp_path: Path) -> None:
    only_error(
        Job([0]).run(lambda rank: fetch(rank, str(tmp_path), [str(tmp_path)], tmp_path / "c")), FormatError
    )
    gone = str(tmp_path / "gone.pt")
    only_error(Job([0, 0]).run(lambda rank: fetch(rank, gone, [gone], tmp_path / "c")), NotFoundError)


# ---------------------------------------------------------------- archives and compression


@pytest.mark.parametrize("remote", [True, False])
def test_each_archive_is_unpacked_once_per_node(tmp_path: Path, remote: bool) -> None:
    bodies = {
        "/r0.tar": tar(
            {"composer_states.pt": b"states", "deepspeed/model.pt": b"model", "deepspeed/o0.pt": b"o0"}
        ),
        "/r1.tar": gzip.compress(tar({"deepspeed/o1.pt": b"o1"})),
    }
    with counting_server({path: Served(body) for path, body in bodies.items()}) as server:
        for path, body in bodies.items():
            (tmp_path / path[1:]).write_bytes(body)
        base = server.url("") if remote else str(tmp_path)

        def check(rank: Rank, got: Fetched) -> None:
            first = got.files[f"{base}/r0.tar"]
            assert (Path(first.path) / "composer_states.pt").read_bytes() == b"states"
            own = got.files[f"{base}/r{rank.rank}.tar"]
            assert own.kind == "archive"
            assert f"deepspeed/o{rank.rank}.pt" in own.members
            assert (Path(own.path) / f"deepspeed/o{rank.rank}.pt").read_bytes() == b"o%d" % rank.rank

        def work(rank: Rank) -> Any:
            needs = [f"{base}/r0.tar", f"{base}/r{rank.rank}.tar"]
            return fetch(rank, base + "/x", needs, tmp_path / "c", keep=check)

        outcomes = Job([0, 0]).run(work)
        assert all(isinstance(each, Fetched) for each in outcomes), outcomes
        if remote:
            assert [server.gets(path) for path in bodies] == [1, 1]
    assert os.listdir(tmp_path / "c") == []


def test_a_hostile_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"../x": b"x"}))
    path = str(tmp_path / "a.tar")
    error = only_error(Job([0, 0]).run(lambda rank: fetch(rank, path, [path], tmp_path / "c")), UnsafeError)
    assert path in str(error)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "c"]


@pytest.mark.parametrize("remote", [True, False])
def test_compressed_files(tmp_path: Path, remote: bool) -> None:
    data = b"PK\3\4" + os.urandom(3000)
    (tmp_path / "a.pt.bz2").write_bytes(bz2.compress(data))
    with counting_server(
        {"/a.pt.bz2": Served(bz2.compress(data)), "/b.pt.gz": Served(gzip.compress(data)[:-5])}
    ) as server:
        name = server.url("/a.pt.bz2") if remote else str(tmp_path / "a.pt.bz2")

        def check(rank: Rank, got: Fetched) -> None:
            assert Path(got.paths[name]).read_bytes() == data

        outcomes = Job([0, 0]).run(lambda rank: fetch(rank, name, [name], tmp_path / "c", keep=check))
        assert all(isinstance(each, Fetched) for each in outcomes), outcomes
        bad = server.url("/b.pt.gz")
        error = only_error(Job([0]).run(lambda rank: fetch(rank, bad, [bad], tmp_path / "c")), CorruptError)
        assert bad in str(error)


# ---------------------------------------------------------------- processes


def _alone(url: str, cache_dir: Path) -> None:
    outcome = Job([0]).run(lambda rank: fetch(rank, url, [url], cache_dir))[0]
    os._exit(0 if isinstance(outcome, Fetched) else 1)


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    with counting_server({"/a.pt": Served(b"x" * 200_000, chunk=20_000, pause_s=0.25)}) as server:
        processes = [
            multiprocessing.get_context("spawn").Process(
                target=_alone, args=(server.url("/a.pt"), tmp_path / "c")
            )
            for _ in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
        assert (server.gets("/a.pt"), server.bytes_sent["/a.pt"]) == (1, 200_000)


def test_killed_while_fetching(tmp_path: Path) -> None:
    with counting_server({"/a.pt": Served(b"x" * 200_000, chunk=10_000, pause_s=0.1)}) as server:
        url = server.url("/a.pt")
        victim = multiprocessing.get_context("spawn").Process(target=_alone, args=(url, tmp_path / "c"))
        victim.start()
        deadline = time.monotonic() + 20
        while server.bytes_sent.get("/a.pt", 0) < 50_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join(10)
        assert not list((tmp_path / "c").rglob("done"))
        server.served["/a.pt"].pause_s = 0
        outcome = Job([0]).run(lambda rank: fetch(rank, url, [url], tmp_path / "c"))[0]
        assert outcome.fetched_bytes == 200_000
    assert os.listdir(tmp_path / "c") == []


def _interruptible(url: str, cache_dir: Path) -> None:
    rank = Rank(HashStore(), [0], 0, 30.0)
    try:
        fetch(rank, url, [url], cache_dir)
    except KeyboardInterrupt as error:
        rank.channel.close(error)
        left = [each.name for each in threading.enumerate() if each.name.startswith("rankload-")]
        os._exit(3 if not left else 4)
    os._exit(1)


@pytest.mark.parametrize("stall_after", [None, 50_000])
def test_ctrl_c(tmp_path: Path, stall_after: int | None) -> None:
    served = Served(b"x" * 10**7, chunk=10_000, pause_s=0.05, stall_after=stall_after)
    with counting_server({"/a.pt": served}) as server:
        process = multiprocessing.get_context("spawn").Process(
            target=_interruptible, args=(server.url("/a.pt"), tmp_path / "c")
        )
        process.start()
        deadline = time.monotonic() + 20
        while server.bytes_sent.get("/a.pt", 0) < 50_000 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGINT)
        started = time.monotonic()
        process.join(10)
        assert process.exitcode == 3
        assert time.monotonic() - started < 3
    assert os.listdir(tmp_path / "c") == []


def real_rank(base: str, cache_dir: str) -> None:
    """One rank of a real job: its own file and rank 0's, with its own process named to the server."""
    from rankload.distributed.session import open_session

    with open_session(stall_timeout_s=20) as session:
        place, channel = session.topology, session.channel
        store, _ = open_store(base, None, {"headers": {"X-Process": str(place.rank)}})
        with NodeCache(f"{cache_dir}/{place.node_rank}") as cache:
            names = [f"{base}/r0.pt", f"{base}/r{place.rank}.pt"]
            got = fetch_files(context(channel, place, store, cache), names)
            sizes = [os.path.getsize(path) for path in got.paths.values()]
            with channel.stage("read"):
                print("sizes", sizes)
        store.close()


@pytest.mark.parametrize("missing", [False, True])
def test_real_ranks_on_two_nodes(tmp_path: Path, missing: bool) -> None:
    from processes import run_ranks

    served = {f"/r{rank}.pt": Served(bytes(1000 + rank)) for rank in range(3)}
    if missing:
        del served["/r2.pt"]
    with counting_server(served) as server:
        finished = run_ranks(
            f"{__file__}:real_rank", 3, args=(server.url(""), tmp_path), nodes=(2, 1), deadline_s=60
        )
        if missing:
            assert all(each.returncode == 1 for each in finished), finished
            assert all("r2.pt: not there, needed by rank 2" in each.stderr for each in finished), finished
        else:
            assert [each.returncode for each in finished] == [0, 0, 0], finished
            assert "sizes [1000, 1002]" in finished[2].stdout
            assert [server.gets(path) for path in served] == [2, 1, 1]
            assert {path: server.processes(path) for path in served} == {
                "/r0.pt": {"0", "2"}, "/r1.pt": {"0"}, "/r2.pt": {"2"},
            }  # fmt: skip
    assert [os.listdir(each) for each in tmp_path.iterdir()] in ([], [[], []])
