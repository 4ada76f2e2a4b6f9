"""Stores: one GET per object, sizes checked, errors mapped, secrets kept."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
from http_server import Served, counting_server
from object_stores import Destination, ObjectStore
from rankload.loader import retries
from rankload.loader.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    OptionError,
    RankloadError,
    UnsafeError,
)
from rankload.loader.store_errors import store_error
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.local import LocalStore
from rankload.loader.stores.open import open_store
from rankload.loader.stores.symlinks import resolve


def nothing(n_bytes: int) -> None:
    pass


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)


# ---------------------------------------------------------------- which store


@pytest.mark.parametrize("path", ["/a/b#1?.pt", "rel/x.pt", "file:///a/b.pt", "a:b/c.pt"])
def test_local_paths(path: str) -> None:
    store, name = open_store(path)
    assert store.is_local
    assert store.local_path(name) == path.removeprefix("file://")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:/a/b.pt", "/a/b.pt"),
        ("FILE:///a/b.pt", "/a/b.pt"),
        ("file://localhost/a%20b.pt", "/a b.pt"),
        ("local:///a/100%25%23.pt", "/a/100%#.pt"),
        ("file:b.pt", "file:b.pt"),
        ("run::1/none.pt", "run::1/none.pt"),
    ],
)
def test_uris_of_local_files(uri: str, path: str) -> None:
    for given in (None, fsspec.filesystem("file")):
        store, name = open_store(uri, given)
        assert store.is_local
        assert name == path


def test_a_uri_of_another_host_is_refused() -> None:
    for uri in ("file://host/a.pt", "file://a.pt"):
        with pytest.raises(OptionError, match="expected file:///absolute/path"):
            open_store(uri)


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # ``memory`` is a protocol of fsspec's.
    for name in ("run::1/last.ckpt", "memory::a/last.ckpt", "file:/last.ckpt", "50%25.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
        store, found = open_store(name)
        assert (store.is_local, found) == (True, name)
    # By hand, without encoding: the file is there under these very characters.
    assert open_store(f"file://{tmp_path}/50%25.pt")[1] == f"{tmp_path}/50%25.pt"
    assert open_store((tmp_path / "50%25.pt").as_uri())[1] == f"{tmp_path}/50%25.pt"
    # A URI names its store whatever lies here.
    (tmp_path / "memory:" / "b").mkdir(parents=True)
    assert not open_store("memory://b")[0].is_local


@pytest.mark.parametrize("name", ["x" * 300, f"{'y' * 300}/a.pt", "\ud800.pt"])
def test_no_file_has_such_a_name(tmp_path: Path, name: str) -> None:
    store = LocalStore()
    assert store.stat(f"{tmp_path}/{name}") is None
    if "x" in name:
        with pytest.raises(NotFoundError):
            store.read_small(f"{tmp_path}/{name}", 1)


def test_names_that_are_made_from_one_may_be_too_long(tmp_path: Path) -> None:
    name = str(tmp_path / ("x" * 250))
    assert resolve(LocalStore(), name) is None
    Path(name).write_bytes(b"x")
    assert resolve(LocalStore(), name) is not None


def test_unknown_protocol_is_named() -> None:
    with pytest.raises(OptionError, match="'nosuch'"):
        open_store("nosuch://bucket/key")


def test_missing_backend_prints_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(OptionError, match=r"pip install 'rankload\[s3\]'"):
        open_store("s3://key:secret@bucket/key")


@pytest.mark.parametrize("uri", ["simplecache::http://h/a?sig=secret", "zip://a::https://me:secret@h/b.zip"])
def test_chains_over_http_need_an_extra(uri: str) -> None:
    code = f"""
import sys
sys.modules["aiohttp"] = None
from rankload.loader.errors import OptionError
from rankload.loader.stores.open import open_store
try:
    open_store({uri!r})
except OptionError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'rankload[http]'" in done.stdout, done
    assert "secret" not in done.stdout


def test_not_an_object_store() -> None:
    with pytest.raises(OptionError, match="download_object"):
        open_store("x", object())


def test_given_local_file_system_is_used_in_place(tmp_path: Path) -> None:
    store, name = open_store(f"file://{tmp_path}/x", fsspec.filesystem("file"))
    assert store.is_local
    assert name == f"{tmp_path}/x"


# ---------------------------------------------------------------- http


def test_one_get_and_its_bytes_once(tmp_path: Path) -> None:
    body = os.urandom(300_000)
    with counting_server({"/a.pt": Served(body)}) as server:
        store, name = open_store(server.url("/a.pt?sig=SECRET"))
        info = store.stat(name)
        assert info is not None
        assert (info.size_bytes, info.version, info.certain) == (len(body), '"v1"', True)
        seen: list[int] = []
        store.download(name, str(tmp_path / "x"), seen.append, info)
        store.close()
        assert (tmp_path / "x").read_bytes() == body
        assert sum(seen) == len(body)
        assert (server.gets("/a.pt"), server.bytes_sent["/a.pt"]) == (1, len(body))
        assert server.requests[-1].headers["Accept-Encoding"] == "identity"
        assert "SECRET" not in store.describe(name)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("status", [403, 405, 501])
def test_head_refused(tmp_path: Path, status: int) -> None:
    with counting_server({"/a": Served(b"abc", head_status=status)}) as server:
        store, name = open_store(server.url("/a"))
        info = store.stat(name)
        assert info == ObjectInfo(name, None, certain=False)
        store.download(name, str(tmp_path / "x"), nothing, info)
        assert (tmp_path / "x").read_bytes() == b"abc"
        assert server.gets("/a") == 1


def test_empty_unsized_and_redirected(tmp_path: Path) -> None:
    served = {
        "/empty": Served(b""),
        "/unsized": Served(b"x" * 1000, send_length=False, etag=None),
        "/moved": Served(redirect="/unsized"),
    }
    with counting_server(served) as server:
        for path, size in (("/empty", 0), ("/unsized", 1000), ("/moved", 1000)):
            store, name = open_store(server.url(path))
            store.download(name, str(tmp_path / "x"), nothing, store.stat(name))
            assert (tmp_path / "x").stat().st_size == size


def test_truncated_body(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"x" * 5000, truncate_to=1234)}) as server:
        store, name = open_store(server.url("/a"))
        with pytest.raises(CorruptError, match="expected 5,000 bytes, got 1,234"):
            store.download(name, str(tmp_path / "x"), nothing, store.stat(name))
    assert os.listdir(tmp_path) == []


def test_statuses(tmp_path: Path) -> None:
    served = {"/forbidden": Served(status=403), "/login": Served(status=401), "/broken": Served(status=500)}
    target = str(tmp_path / "x")
    with counting_server(served) as server:
        store, missing = open_store(server.url("/none?token=SECRET"))
        assert store.stat(missing) is None
        with pytest.raises(NotFoundError) as caught:
            store.download(missing, target, nothing)
        assert "SECRET" not in str(caught.value)
        for path in ("/forbidden", "/login"):
            with pytest.raises(AccessError, match=f"{path}.*(401|403)") as caught_access:
                store.download(server.url(f"{path}?token=SECRET"), target, nothing)
            assert "SECRET" not in str(caught_access.value)
            assert server.gets(path) == 1
        with pytest.raises(AccessError, match="500"):
            store.download(server.url("/broken"), target, nothing)
        assert server.gets("/broken") > 1
    assert os.listdir(tmp_path) == []


def test_a_passing_failure_is_tried_again(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"abc", failures=2)}) as server:
        store, name = open_store(server.url("/a"))
        store.download(name, str(tmp_path / "x"), nothing)
        assert server.gets("/a") == 3


def test_changed_under_way(tmp_path: Path) -> None:
    with counting_server({"/a": Served(b"abc")}) as server:
        store, name = open_store(server.url("/a"))
        info = store.stat(name)
        server.served["/a"] = Served(b"abd", etag='"v2"')
        with pytest.raises(CorruptError, match="changed"):
            store.download(name, str(tmp_path / "x"), nothing, info)


def test_nobody_listens(tmp_path: Path) -> None:
    with counting_server() as server:
        url = server.url("/a")
    store, name = open_store(url.replace("http://", "http://user:SECRET@"))
    with pytest.raises(AccessError) as caught:
        store.stat(name)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "served", [Served(b"x" * 10**6, chunk=1000, pause_s=0.05), Served(b"x" * 9999, stall_after=1)]
)
def test_what_the_callback_raises_stops_it(tmp_path: Path, served: Served) -> None:
    served.chunk = 1000
    with counting_server({"/a": served}) as server:
        store, name = open_store(server.url("/a"))
        started = time.monotonic()

        def give_up(n_bytes: int) -> None:
            if time.monotonic() - started > 0.5:
                raise PermissionError("enough")

        with pytest.raises((PermissionError, AccessError)):
            store.download(name, str(tmp_path / "x"), give_up)
        assert time.monotonic() - started < 3
        assert os.listdir(tmp_path) == []


def test_read_small(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("tag")
    with counting_server({"/latest": Served(b"tag"), "/big": Served(b"x" * 100)}) as server:
        store, name = open_store(server.url("/latest"))
        assert store.read_small(name, 10) == b"tag"
        with pytest.raises(CorruptError, match="at most 10"):
            store.read_small(server.url("/big"), 10)
    local, _ = open_store(str(tmp_path))
    assert local.read_small(local.join(str(tmp_path), "latest"), 3) == b"tag"
    with pytest.raises(NotFoundError):
        local.read_small(str(tmp_path / "none"), 3)


def _download_in_child(url: str, target: str) -> None:
    store, name = open_store(url)
    store.download(name, target, nothing, store.stat(name))
    os._exit(0 if os.path.getsize(target) == 3 else 1)


def test_after_fork_and_inside_asyncio(tmp_path: Path) -> None:
    import asyncio

    with counting_server({"/a": Served(b"abc")}) as server:
        store, name = open_store(server.url("/a"))

        async def inside() -> None:
            store.download(name, str(tmp_path / "x"), nothing)

        asyncio.run(inside())
        child = multiprocessing.get_context("fork").Process(
            target=_download_in_child, args=(name, str(tmp_path / "y"))
        )
        child.start()
        child.join(20)
        assert child.exitcode == 0


# ---------------------------------------------------------------- fsspec


def test_memory_uri(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a.pt", b"hello")
    store, name = open_store("memory://bucket/a.pt")
    info = store.stat(name)
    assert info is not None
    assert info.size_bytes == 5
    seen: list[int] = []
    store.download(name, str(tmp_path / "x"), seen.append, info)
    assert (tmp_path / "x").read_bytes() == b"hello"
    assert sum(seen) == 5
    assert store.stat(store.join("/bucket", "none")) is None
    with pytest.raises(CorruptError, match="expected 6 bytes, got 5"):
        store.download(name, str(tmp_path / "y"), nothing, ObjectInfo(name, 6))
    with pytest.raises(NotFoundError):
        store.download("/bucket/none", str(tmp_path / "y"), nothing)


def test_what_fsspec_keeps_does_not_grow(tmp_path: Path) -> None:
    """Its one thread, and the connections of its file systems, which it keeps for the next one who asks."""
    with counting_server({f"/{n}.bin": Served(bytes(100)) for n in range(6)}) as server:
        threads = {thread.ident for thread in threading.enumerate()}
        found = []
        for n in range(6):
            store, name = open_store(f"simplecache::{server.url(f'/{n}.bin')}")
            store.download(name, str(tmp_path / str(n)), lambda _: None)
            store.close()
            ours = {thread.name for thread in threading.enumerate() if thread.ident not in threads}
            assert {name for name in ours if "process_request" not in name} <= {"fsspecIO"}
            found.append(len(os.listdir("/proc/self/fd")))
    assert max(found[2:]) <= found[1] + 2  # the server's end of a connection is this process's too


def test_chained_uri_and_given_file_system(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("inner/a.pt", b"hello")
    store, name = open_store(f"zip://inner/a.pt::file://{tmp_path}/z.zip")
    store.download(name, str(tmp_path / "x"), nothing, store.stat(name))
    assert (tmp_path / "x").read_bytes() == b"hello"
    given, name = open_store(
        "inner/a.pt", fsspec.filesystem("dir", path="/bucket2", fs=fsspec.filesystem("memory"))
    )
    fsspec.filesystem("memory").pipe("/bucket2/inner/a.pt", b"12")
    given.download(name, str(tmp_path / "x"), nothing, given.stat(name))
    assert (tmp_path / "x").read_bytes() == b"12"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("no"), AccessError),
        (FileNotFoundError("x"), NotFoundError),
        (
            type("ClientError", (Exception,), {"response": {"ResponseMetadata": {"HTTPStatusCode": 403}}})(),
            AccessError,
        ),
        (type("HttpError", (Exception,), {"code": 404})(), NotFoundError),
        (type("NoCredentialsError", (Exception,), {})(), AccessError),
    ],
)
def test_backend_errors(error: Exception, kind: type[RankloadError]) -> None:
    mapped = store_error(error, "s3://bucket/key")
    assert type(mapped) is kind
    assert "s3://bucket/key" in str(mapped)
    assert mapped.__cause__ is error


def test_secrets_do_not_leak_through_causes() -> None:
    mapped = store_error(ValueError("bad https://u:p@host/x?sig=SECRET now"), "x")
    assert "SECRET" not in str(mapped)
    assert mapped.__cause__ is None


# ---------------------------------------------------------------- object stores


@pytest.mark.parametrize("announce", [True, False])
def test_object_store(tmp_path: Path, announce: bool) -> None:
    backend = ObjectStore({"a": b"hello"}, announce=announce)
    backend.transient = 1
    store, name = open_store("a", backend)
    seen: list[int] = []
    store.download(name, str(tmp_path / "x"), seen.append, store.stat(name))
    assert (tmp_path / "x").read_bytes() == b"hello"
    assert sum(seen) == 5
    assert store.stat("b") is None
    with pytest.raises(CorruptError, match="expected 6 bytes, got 5"):
        store.download(name, str(tmp_path / "y"), nothing, ObjectInfo(name, 6))
    with pytest.raises(NotFoundError):
        store.download("b", str(tmp_path / "y"), nothing)
    assert os.listdir(tmp_path) == ["x"]


def test_logger_destination(tmp_path: Path) -> None:
    store, name = open_store("a", Destination({"a": b"hello", "l.symlink": b"a"}))
    info = store.stat(name)
    assert info is not None
    assert not info.certain
    store.download(name, str(tmp_path / "x"), nothing, info)
    assert (tmp_path / "x").read_bytes() == b"hello"
    assert resolve(store, "l.symlink") is not None


# ---------------------------------------------------------------- links


def test_links_are_followed() -> None:
    objects = {
        "latest.symlink": b"run/ep1.symlink\n",
        "run/ep1.symlink": b"run/ep1.pt",
        "run/ep1.pt": b"x",
        "run/beside.symlink": b"ep1.pt",
    }
    store, _ = open_store("x", ObjectStore(objects))
    for name in ("latest", "latest.symlink", "run/beside"):
        found = resolve(store, name)
        assert found is not None
        assert found.info.name == "run/ep1.pt"
    assert resolve(store, "none") is None


def test_links_local_and_http(tmp_path: Path) -> None:
    (tmp_path / "a.pt.symlink").write_text("b.pt")
    (tmp_path / "b.pt").write_text("x")
    local, _ = open_store(str(tmp_path))
    found = resolve(local, str(tmp_path / "a.pt"))
    assert found is not None
    assert found.info.name == str(tmp_path / "b.pt")
    with counting_server(
        {"/d/a.symlink": Served(b"b"), "/d/b": Served(b"x"), "/x.symlink": Served(b"http://h/")}
    ) as server:
        store, name = open_store(server.url("/d/a?k=1"))
        found = resolve(store, name.replace("/a?", "/a.symlink?").split("?")[0])
        assert found is not None
        assert found.info.name == server.url("/d/b")
        with pytest.raises(UnsafeError, match="another server"):
            resolve(store, server.url("/x.symlink"))


@pytest.mark.parametrize(
    ("objects", "kind", "says"),
    [
        (
            {"a.symlink": b"b.symlink", "b.symlink": b"a.symlink"},
            CorruptError,
            "a.symlink.*b.symlink.*a.symlink",
        ),
        (
            {f"{i}.symlink": b"%d.symlink" % (i + 1) for i in range(40)} | {"a.symlink": b"0.symlink"},
            CorruptError,
            "16",
        ),
        ({"a.symlink": b"../../etc/passwd"}, UnsafeError, "leave"),
        ({"a.symlink": b"gone"}, NotFoundError, "gone"),
        ({"a.symlink": b""}, CorruptError, "name"),
        ({"a.symlink": b"\xff\xfe"}, CorruptError, "UTF-8"),
        ({"a.symlink": b"x" * 5000}, CorruptError, "4096"),
    ],
)
def test_bad_links(objects: dict[str, bytes], kind: type[RankloadError], says: str) -> None:
    store, name = open_store("a", ObjectStore(objects))
    with pytest.raises(kind, match=says):
        resolve(store, name)


def test_links_stay_in_their_bucket() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/a.symlink", b"s3://elsewhere/x")
    store, _ = open_store("memory://bucket/a")
    with pytest.raises(UnsafeError, match="another store"):
        resolve(store, "/bucket/a")


def test_importing_the_interface_is_cheap() -> None:
    code = (
        "import sys, rankload.loader.stores.base, rankload.loader.template, rankload.loader.fetch.files, "
        "rankload.loader.cache.node, rankload.loader.fetch.archive, rankload.loader.fetch.progress, "
        "rankload.loader.stores.symlinks; "
        "bad = {'torch', 'fsspec', 'aiohttp', 'tqdm', 'deepspeed'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_threads_share_a_store(tmp_path: Path) -> None:
    with counting_server({f"/{i}": Served(b"x" * 1000 * i) for i in range(8)}) as server:
        store, _ = open_store(server.url("/0"))
        threads = [
            threading.Thread(
                target=store.download, args=(server.url(f"/{i}"), str(tmp_path / str(i)), nothing)
            )
            for i in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [(tmp_path / str(i)).stat().st_size for i in range(8)] == [1000 * i for i in range(8)]
