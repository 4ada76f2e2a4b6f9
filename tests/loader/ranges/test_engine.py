"""Ranges read from a server that misbehaves: each fault has one promised outcome, in good time."""

from __future__ import annotations

import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pytest
from bad_server import BadServer, Behaviour, Fault, bad_server
from file_source import FileSource
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.loader import retries
from rankload.loader.byte_ranges import ByteRange, total_bytes, union
from rankload.loader.errors import AccessError, CorruptError, NotFoundError, RankloadError
from rankload.loader.http import exchange as http_exchange
from rankload.loader.http.addresses import Address, Origin, address_of, proxy_for
from rankload.loader.http.answers import Arrived, content_range, retry_after_s
from rankload.loader.http.connections import Connections
from rankload.loader.ranges.base import RangeSource
from rankload.loader.ranges.concurrency import Concurrency
from rankload.loader.ranges.destinations import FileDestination, MemoryDestination
from rankload.loader.ranges.engine import ObjectRead, ReadReport, read_ranges
from rankload.loader.ranges.http import HttpSource
from rankload.loader.ranges.open import open_range_source
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.open import open_store

BODY = random.Random(0).randbytes(1_000_000)
CHUNK = 100_000
DEADLINE_S = 20.0


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)
    monkeypatch.setattr(http_exchange, "SILENCE_TIMEOUT_S", 0.6)
    monkeypatch.setattr(http_exchange, "GLANCE_S", 0.1)
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < DEADLINE_S


def source_of(url: str, options: dict[str, object] | None = None) -> RangeSource:
    store, name = open_store(url, None, options)
    source = open_range_source(store, ObjectInfo(name, None))
    assert source is not None
    return source


def read_all(source: RangeSource, **more: object) -> tuple[bytes, ReadReport]:
    memory = bytearray(source.size_bytes)
    whole = [ByteRange(0, source.size_bytes)]
    target = MemoryDestination([(0, memoryview(memory))])
    try:
        report = read_ranges([ObjectRead(source, whole, target)], lambda n: None, chunk_bytes=CHUNK, **more)
    finally:
        source.close()
    return bytes(memory), report


def with_faults(*faults: Fault, **more: object) -> dict[str, Behaviour]:
    return {"/a": Behaviour(BODY, faults=list(faults), **more)}


# ---------------------------------------------------------------- what is mended


MENDED = {
    "500 and 503": [Fault(status=500), Fault(status=503), Fault(status=502)],
    "429, come again": [Fault(status=429, headers={"Retry-After": "1"})],
    "408": [Fault(status=408)],
    "reset in the body": [Fault(send_only=70_000), Fault(send_only=1)],
    "reset before the body": [Fault(send_only=0)],
    "short body": [Fault(send_only=70_000, ending="close")],
    "stall in the body": [Fault(send_only=70_000, ending="stall")],
    "stall before the body": [Fault(send_only=0, ending="stall")],
}


@pytest.fixture(params=["http", "https"])
def context(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext | None:
    """What a server is encrypted with, if it is."""
    if request.param == "http":
        return None
    monkeypatch.setenv("SSL_CERT_FILE", str(request.getfixturevalue("certificate").bundle))
    encrypted: ssl.SSLContext = request.getfixturevalue("encrypted")
    return encrypted


@pytest.mark.parametrize("name", MENDED)
def test_mended(name: str, context: ssl.SSLContext | None) -> None:
    faults = MENDED[name]
    with bad_server(with_faults(*faults), context) as server:
        begin = time.monotonic()
        data, report = read_all(source_of(server.url("/a")))
        assert data == BODY
        assert report.retries == len(faults)
        # Nothing is read twice: a body that broke off is continued.
        assert report.read_bytes == len(BODY)
        if "429" in name:
            assert time.monotonic() - begin >= 1


def test_what_came_before_a_body_broke_off_is_kept(context: ssl.SSLContext | None) -> None:
    faults = [Fault(send_only=70_000, ending="close"), Fault(send_only=70_000, ending="stall")]
    with bad_server(with_faults(*faults), context) as server:
        data, _ = read_all(source_of(server.url("/a")), concurrency=Concurrency(1, 1))
        assert data == BODY
        starts = [int(re.match(r"bytes=(\d+)", one.range)[1]) for one in server.asked]
        assert starts[:4] == [0, 0, 70_000, 140_000]


@pytest.mark.parametrize("more", [{"chunked": True}, {"closes": True}, {"etag": 'W/"1"'}, {"etag": None}])
def test_odd_but_right(more: dict[str, object]) -> None:
    with bad_server(with_faults(modified="Mon, 01 Jan 2024 00:00:00 GMT", **more)) as server:
        source = source_of(server.url("/a"))
        assert source.version == (
            "Mon, 01 Jan 2024 00:00:00 GMT"
            if more.get("etag", "") is None
            else str(more.get("etag", '"v1"')).removeprefix("W/")
        )
        data, report = read_all(source)
        assert data == BODY
        assert report.retries == 0
        sends_if_match = [one for one in server.asked if "If-Match" in one.headers]
        assert bool(sends_if_match) == ("etag" not in more)


def test_parts_shorter_than_asked_are_gone_on_with() -> None:
    part = {"Content-Range": f"bytes 0-9999/{len(BODY)}", "Content-Length": "10000"}
    with bad_server(with_faults(Fault(headers=part, send_only=10_000, ending="close"))) as server:
        data, report = read_all(source_of(server.url("/a")), concurrency=Concurrency(1, 1))
        assert data == BODY
        assert report.retries == 0


def test_a_server_that_compares_if_match_wrongly() -> None:
    with bad_server(with_faults(Fault(status=412))) as server:
        data, _ = read_all(source_of(server.url("/a")))
        assert data == BODY


def test_connections_are_kept_alive() -> None:
    with bad_server(with_faults()) as server:
        read_all(source_of(server.url("/a")), concurrency=Concurrency(2, 2))
        assert len(server.asked) > 2
        assert len({one.client_port for one in server.asked}) <= 2
        assert all(one.headers["Accept-Encoding"] == "identity" for one in server.asked)


def test_stale_connections_are_replaced_without_a_retry() -> None:
    with bad_server(with_faults()) as server:
        source = source_of(server.url("/a"))
        assert isinstance(source, HttpSource)
        for idle in source._connections._idle.values():
            for one in idle:
                one.interrupt()
        data, report = read_all(source)
        assert data == BODY
        assert report.retries == 0


# ---------------------------------------------------------------- what is not


NOT_MENDED = {
    "403": (Fault(status=403), AccessError, "the URL's query and nothing else"),
    "404": (Fault(status=404), NotFoundError, "not there"),
    "another range": (
        Fault(headers={"Content-Range": f"bytes 5-9/{len(BODY)}"}), AccessError, "another range"
    ),
    "no Content-Range": (Fault(headers={"Content-Range": ""}), AccessError, "no Content-Range"),
    "contradicts itself": (Fault(headers={"Content-Length": "7"}), AccessError, "contradicts"),
    "another size": (Fault(headers={"Content-Range": "bytes 0-99/7"}), CorruptError, "changed"),
    "encoded": (Fault(headers={"Content-Encoding": "gzip"}), AccessError, "gzip"),
    "suddenly whole": (Fault(whole=True), AccessError, "HTTP 200"),
    "another ETag": (Fault(headers={"ETag": '"v2"'}), CorruptError, 'expected ETag "v1", got "v2"'),
    "no version any more": (Fault(headers={"ETag": None}), CorruptError, "expected version"),
    "changed under way": (Fault(new_etag='"v2"'), CorruptError, "changed"),
    "416": (Fault(status=416, headers={"Content-Range": "bytes */5"}), CorruptError, "changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_MENDED)
def test_not_mended(name: str) -> None:
    fault, error, message = NOT_MENDED[name]
    with bad_server(with_faults(fault)) as server:
        with pytest.raises(error, match=message) as raised:
            read_all(source_of(server.url("/a?sig=SECRET")))
        assert "SECRET" not in str(raised.value)
        assert server.url("/a") in str(raised.value)


def test_last_modified_alone() -> None:
    fault = Fault(headers={"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"})
    with (
        bad_server(with_faults(fault, etag=None, modified="Mon, 01 Jan 2024 00:00:00 GMT")) as server,
        pytest.raises(CorruptError, match="Last-Modified"),
    ):
        read_all(source_of(server.url("/a")))


def test_retries_end() -> None:
    with bad_server(with_faults(*[Fault(status=503)] * 200)) as server:
        with pytest.raises(AccessError, match="503"):
            read_all(source_of(server.url("/a")))
        assert len(server.asked) > 5


def test_not_the_object_that_stat_told_of() -> None:
    with bad_server(with_faults()) as server:
        store, name = open_store(server.url("/a"))
        for info in (ObjectInfo(name, len(BODY), '"v0"'), ObjectInfo(name, 7, '"v1"')):
            with pytest.raises(CorruptError, match="changed"):
                open_range_source(store, info)


@pytest.mark.parametrize("status", [404, 403])
def test_not_there_or_not_for_us(status: int) -> None:
    served = Behaviour(BODY, needs=lambda headers, query: False)
    with bad_server({"/a": served} if status == 403 else {}) as server:
        with pytest.raises(RankloadError, match=str(status)) as raised:
            source_of(server.url("/a?sig=SECRET"))
        assert "SECRET" not in str(raised.value)


def test_nobody_listens() -> None:
    with bad_server({}) as server:
        url = server.url("/a")
    with pytest.raises(Exception, match="refused") as raised:
        source_of(url)
    assert isinstance(getattr(raised.value, "error", raised.value), AccessError)


# ---------------------------------------------------------------- without ranges


def test_streamed_once() -> None:
    with bad_server(with_faults(has_ranges=False)) as server:
        source = source_of(server.url("/a"))
        assert not source.has_ranges
        memory = bytearray(250_000)
        landed: list[tuple[int, int]] = []
        wanted = [ByteRange(100_000, 200_000), ByteRange(450_000, 600_000)]
        view = memoryview(memory)
        target = MemoryDestination([(100_000, view[:100_000]), (450_000, view[100_000:])])
        counted: list[int] = []
        reading = ObjectRead(source, wanted, target, lambda *part: landed.append(part))
        report = read_ranges([reading], counted.append, chunk_bytes=CHUNK)
        source.close()
        assert bytes(memory) == BODY[100_000:200_000] + BODY[450_000:600_000]
        assert sum(counted) == report.read_bytes == 600_000
        assert report.requests == 1
        assert union(ByteRange(*part) for part in landed) == tuple(wanted)


def test_streamed_anew_after_a_break() -> None:
    with bad_server(with_faults(Fault(send_only=250_000), has_ranges=False)) as server:
        source = source_of(server.url("/a"))
        counted: list[int] = []
        landed: list[tuple[int, int]] = []
        memory = bytearray(len(BODY))
        reading = ObjectRead(
            source, [ByteRange(0, len(BODY))], MemoryDestination([(0, memoryview(memory))]),
            lambda *part: landed.append(part),
        )  # fmt: skip
        read_ranges([reading], counted.append, chunk_bytes=CHUNK)
        source.close()
        assert bytes(memory) == BODY
        assert sum(counted) == len(BODY)
        assert sum(stop - start for start, stop in landed) == len(BODY)


# ---------------------------------------------------------------- redirects, credentials, proxies


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_credentials_stay_with_their_host(status: int) -> None:
    secrets = {"headers": {"Authorization": "Bearer SECRET", "X-Key": "SECRET", "Cookie": "a=SECRET"}}
    with bad_server(with_faults()) as other:
        moved = {"/b": Behaviour(redirect=other.url("/a?sig=1"), redirect_status=status)}
        moved["/first"] = Behaviour(redirect="/b", redirect_status=status)
        with bad_server(moved) as server:
            data, _ = read_all(source_of(server.url("/first"), secrets))
            assert data == BODY
            assert all("SECRET" in str(one.headers) for one in server.asked)
            # The way is gone once.
            assert len(server.asked) == 2
            assert len(other.asked) > 2
            assert not [one for one in other.asked if "SECRET" in str(one.headers)]


def test_user_info_becomes_a_header_for_one_host() -> None:
    with bad_server(with_faults()) as other, bad_server({"/b": Behaviour()}) as server:
        server.objects["/b"].redirect = other.url("/a").replace("//", "//x:y@")
        source = source_of(server.url("/b").replace("//", "//me:SECRET@"))
        assert "SECRET" not in source.describe()
        assert read_all(source)[0] == BODY
        assert server.asked[0].headers["Authorization"].startswith("Basic ")
        assert not [one for one in other.asked if "Authorization" in one.headers]


def test_redirects_end() -> None:
    with (
        bad_server({"/a": Behaviour(redirect="/a")}) as server,
        pytest.raises(AccessError, match="redirects"),
    ):
        source_of(server.url("/a"))


def test_redirect_to_no_web_address() -> None:
    with (
        bad_server({"/a": Behaviour(redirect="file:///etc/passwd")}) as server,
        pytest.raises(AccessError, match="no http"),
    ):
        source_of(server.url("/a"))


def test_an_expired_redirect_is_followed_anew() -> None:
    valid = ["1"]
    served = Behaviour(BODY, needs=lambda headers, query: query == f"sig={valid[0]}")
    with bad_server({"/a": served, "/first": Behaviour(redirect="/a?sig=1")}) as server:
        source = source_of(server.url("/first"))
        valid[0] = "2"
        server.objects["/first"].redirect = "/a?sig=2"
        assert read_all(source)[0] == BODY
        assert len([one for one in server.asked if one.path == "/first"]) >= 2


def signed_source(server: BadServer, signed: list[str], life_s: float = 3600.0) -> HttpSource:
    def sign() -> Address:
        signed.append(str(len(signed)))
        return Address(server.url(f"/a?sig={signed[-1]}"), {}, "a URL that the test signed")

    return HttpSource(sign, Connections(), signed_for_s=life_s)


def test_signed_again_once_where_refused() -> None:
    signed: list[str] = []
    valid = {"0"}
    served = Behaviour(BODY, needs=lambda headers, query: query.removeprefix("sig=") in valid)
    with bad_server({"/a": served}) as server:
        source = signed_source(server, signed)
        valid.clear()
        valid.add("1")
        assert read_all(source)[0] == BODY
        assert signed == ["0", "1"]
        valid.clear()
        with pytest.raises(AccessError, match="a URL that the test signed"):
            read_all(source, concurrency=Concurrency(1, 1))
        assert signed == ["0", "1", "2"]


def test_signed_again_before_it_ends() -> None:
    signed: list[str] = []
    with bad_server(with_faults()) as server:
        source = signed_source(server, signed, life_s=0.1)
        time.sleep(0.1)
        assert read_all(source)[0] == BODY
        assert len(signed) >= 2


def test_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with bad_server(with_faults()) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:pass@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "localhost,.intern")
        assert read_all(source_of("http://no-such-host.invalid/a"))[0] == BODY
        assert proxy.asked[0].headers["Host"] == "no-such-host.invalid"
        assert proxy.asked[0].headers["Proxy-Authorization"].startswith("Basic ")
        assert proxy_for(Origin("http", "x.intern", 80)) is None


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine h login me password p\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert address_of("http://h/a b%20ü?s=a%2Fb+c#x", {}).url == "http://h/a%20b%20%C3%BC?s=a%2Fb+c"
    assert address_of("http://h/a", {}).credentials == "the netrc file"
    assert "Authorization" not in address_of("http://other/a", {}).headers
    with pytest.raises(AccessError, match="not a valid"):
        address_of("ftp://h/a", {})


def test_retry_after() -> None:
    assert retry_after_s({"Retry-After": "7"}) == 7
    assert retry_after_s({"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=95.0) == 5
    assert retry_after_s({"Retry-After": "99999"}) == 3600
    assert retry_after_s({}) is retry_after_s({"Retry-After": "soon"}) is None


def test_a_range_of_more_digits_than_a_number_has_is_none() -> None:
    assert content_range({"Content-Range": "bytes 0-3/4"}) == (0, 4, 4)
    for text in (f"bytes 0-{'9' * 4500}/*", f"bytes 0-1/{'9' * 4500}", "bytes 0-\u0663/4"):
        assert content_range({"Content-Range": text}) == (None, None, None)


# ---------------------------------------------------------------- the engine


def test_what_a_callback_raises_stops_all() -> None:
    with bad_server(with_faults(*[Fault(send_only=10, ending="stall")] * 50)) as server:
        source = source_of(server.url("/a"))

        def tick(n_bytes: int) -> None:
            raise KeyError("enough")

        target = MemoryDestination([(0, memoryview(bytearray(len(BODY))))])
        begin = time.monotonic()
        with pytest.raises(KeyError, match="enough"):
            read_ranges([ObjectRead(source, [ByteRange(0, len(BODY))], target)], tick, chunk_bytes=CHUNK)
        source.close()
        assert time.monotonic() - begin < 3
    assert not [one for one in threading.enumerate() if one.name.startswith("rankload-worker")]


def test_what_landed_raises_stops_all() -> None:
    with bad_server(with_faults()) as server:
        source = source_of(server.url("/a"))

        def landed(start: int, stop: int) -> None:
            raise CorruptError("a checksum differs")

        target = MemoryDestination([(0, memoryview(bytearray(len(BODY))))])
        reading = ObjectRead(source, [ByteRange(0, len(BODY))], target, landed)
        with pytest.raises(CorruptError, match="a checksum differs"):
            read_ranges([reading], lambda n: None, chunk_bytes=CHUNK)
        source.close()


EDGES = st.lists(st.integers(0, 4000), min_size=2, max_size=12)


@settings(max_examples=40)
@given(EDGES, st.integers(2, 900), st.data())
def test_every_wanted_byte_lands_once(edges: list[int], chunk_bytes: int, data: st.DataObject) -> None:
    edges = sorted(edges)[: len(edges) // 2 * 2]
    wanted = [ByteRange(*pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
    files = fsspec.filesystem("memory")
    files.pipe_file("/x", BODY[:4000])
    store, name = open_store("memory://x")
    info = store.stat(name)
    assert info is not None
    source = open_range_source(store, info)
    assert source is not None
    memory = bytearray(4000)
    landed: list[ByteRange] = []
    pieces = []
    for one in union(wanted):
        cut = data.draw(st.integers(one.start, one.stop))
        view = memoryview(memory)
        pieces += [(one.start, view[one.start : cut]), (cut, view[cut : one.stop])]
    reading = ObjectRead(
        source, wanted, MemoryDestination(pieces), lambda start, stop: landed.append(ByteRange(start, stop))
    )
    report = read_ranges([reading], lambda n: None, chunk_bytes=chunk_bytes)
    assert union(landed) == union(wanted)
    assert sum(one.length for one in landed) == total_bytes(wanted) == report.wanted_bytes
    for one in wanted:
        assert memory[one.start : one.stop] == BODY[one.start : one.stop]


def test_into_a_sparse_file_and_on_from_there(tmp_path: Path) -> None:
    source_path = tmp_path / "a"
    source_path.write_bytes(BODY)
    for wanted in ([ByteRange(0, 5000)], [ByteRange(5000, 300_000), ByteRange(900_000, 1_000_000)]):
        source = FileSource(str(source_path), ObjectInfo("a", None))
        target = FileDestination(str(tmp_path / "b"), len(BODY))
        read_ranges([ObjectRead(source, wanted, target)], lambda n: None, chunk_bytes=CHUNK)
        target.close()
        source.close()
    data = (tmp_path / "b").read_bytes()
    assert data == BODY[:300_000] + bytes(600_000) + BODY[900_000:]
    assert os.stat(tmp_path / "b").st_mode & 0o777 == 0o600
    with pytest.raises(CorruptError, match="expected 7"):
        FileDestination(str(tmp_path / "b"), 7)


def test_file_systems_that_change() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/y", BODY)
    store, name = open_store("memory://y")
    info = store.stat(name)
    assert info is not None
    source = open_range_source(store, info)
    assert source is not None
    assert read_some(source) == BODY[5:50_005]
    files.pipe_file("/y", BODY[1:])
    with pytest.raises(CorruptError, match="changed while it was loaded"):
        read_some(source)
    source.close()


def read_some(source: RangeSource) -> bytes:
    memory = bytearray(50_000)
    target = MemoryDestination([(5, memoryview(memory))])
    read_ranges([ObjectRead(source, [ByteRange(5, 50_005)], target)], lambda n: None)
    return bytes(memory)


def test_no_early_run_is_so_long_that_the_others_wait_for_it() -> None:
    class Zeros:
        """A source of which many connections bring more; what each run asks for is kept."""

        version, has_ranges, max_connections, kind = "1", True, 32, "none"
        size_bytes = 640 * CHUNK
        outages = retries.Outages()

        def __init__(self) -> None:
            self.runs: list[int] = []

        def read_into(self, start: int, stop: int, views: Iterable[memoryview], arrived: Arrived) -> None:
            self.runs.append(stop - start)
            for view in views:
                time.sleep(0.001)
                arrived(len(view))

        def describe(self) -> str:
            return "zeros"

        def confirm(self) -> None: ...

        def close(self) -> None: ...

    source = Zeros()
    _, report = read_all(source, concurrency=Concurrency(4, 32))
    assert sum(source.runs) == source.size_bytes
    # Of what is left, each of the 16 connections that there may be soon gets a half at most.
    assert max(source.runs) == source.runs[0] == 20 * CHUNK
    assert report.requests == len(source.runs)


def test_whole_objects_only() -> None:
    class Backend:
        def download_object(self, *args: object) -> None: ...

    store, name = open_store("x", Backend())
    assert open_range_source(store, ObjectInfo(name, 5)) is None


# ---------------------------------------------------------------- the pace, on links that are only reckoned


def run_link(pace: Concurrency, rate_of: Callable[[int], float], begin: float, seconds: float) -> list[int]:
    """The limits over time on a link that brings ``rate_of(connections)`` bytes a second."""
    arrived, limits = 1e12 * begin, []
    for tick in range(int(seconds * 100)):
        arrived += rate_of(pace.limit) * 0.01
        limits.append(pace.observe(begin + tick * 0.01, int(arrived)))
    return limits


def test_capped_connections_get_many_soon() -> None:
    pace = Concurrency()
    limits = run_link(pace, lambda n: n * 90e6, 1, 4)
    assert limits[-1] == 32
    assert limits.index(32) < 20


def test_a_link_that_is_full_gets_few() -> None:
    limits = run_link(Concurrency(), lambda n: min(n, 3) * 600e6, 1, 2)
    assert (limits[-1], max(limits)) == (4, 16)
    # As soon as each of the many has brought more than a link holds: 128 MiB here.
    assert limits.count(16) < 30


def test_a_link_in_between() -> None:
    limits = run_link(Concurrency(), lambda n: min(n * 90e6, 1000e6), 1, 3)
    assert (limits[-1], max(limits)) == (16, 32)


def test_as_many_as_fill_a_link_are_kept() -> None:
    # Sixteen bring less than twice what four do: eight bring that too.
    limits = run_link(Concurrency(), lambda n: min(n * 90e6, 700e6), 1, 2)
    assert (limits[-1], max(limits)) == (8, 16)


def test_connections_that_are_slow_to_start_are_waited_for() -> None:
    pace, arrived, began = Concurrency(), 0.0, [0.0] * 4
    limits = []
    for tick in range(300):
        now = tick * 0.01
        # Half a second each until it is at 90 MB/s.
        arrived += sum(90e6 * min(1, (now - begin) / 0.5) for begin in began) * 0.01
        limits.append(pace.observe(now, int(arrived)))
        began = (began + [now] * pace.limit)[: pace.limit]
    assert limits[-1] == 32
    assert 4 not in limits[limits.index(16) :]


def test_more_are_tried_again_later() -> None:
    pace = Concurrency()
    assert run_link(pace, lambda n: 1e9, 1, 2)[-1] == 4
    assert run_link(pace, lambda n: n * 250e6, 3, 6)[-1] == 32


def test_too_many_are_given_up_later() -> None:
    pace = Concurrency()
    assert run_link(pace, lambda n: n * 90e6, 1, 2)[-1] == 32
    assert run_link(pace, lambda n: 1e9, 3, 30)[-1] == 4


def test_capped_connections_stay_many() -> None:
    limits = run_link(Concurrency(), lambda n: n * 90e6, 1, 30)
    assert sum(limits) / len(limits) > 29


def test_throttling_halves_but_not_below_the_start() -> None:
    pace = Concurrency()
    run_link(pace, lambda n: n * 90e6, 1, 4)
    for now in (10.0, 10.1, 10.2):
        pace.throttled(now)
    assert pace.limit == 16
    for now in (12.0, 14.0, 16.0, 18.0):
        pace.throttled(now)
    assert pace.limit == 4
