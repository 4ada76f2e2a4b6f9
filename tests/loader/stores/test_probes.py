"""Names that may not exist: stores that refuse to say, servers that answer with a page, and how many are asked for."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from http_server import CountingServer, Served, counting_server
from rankload.loader import retries
from rankload.loader.errors import AccessError, CorruptError, FormatError, NotFoundError, StalledError
from rankload.loader.stores import manifest
from rankload.loader.stores.local import LocalStore
from rankload.loader.stores.locate import MODEL_STATES, Located, locate
from rankload.loader.stores.manifest import LIMIT_BYTES, NAMES, find_manifests
from rankload.loader.stores.open import open_store
from rankload.loader.stores.probes import AT_ONCE
from rankload.loader.stores.symlinks import resolve, resolve_link

PAGE = Served(b"<!DOCTYPE html><html>welcome</html>", content_type="text/html; charset=utf-8")
REFUSED = Served(status=403)
OBJECTS = {
    "run/latest": b"step3",
    f"run/step3/{MODEL_STATES[0]}": b"model",
    f"z3/{MODEL_STATES[1]}": b"model of stage 3",
    "run/final": b"no suffix",
    "run/ck.ckpt/latest": b"step3",
    f"run/ck.ckpt/step3/{MODEL_STATES[1]}": b"a folder whose name looks like a file's",
    "run/b.pt.symlink": b"run/a.pt",
    "run/a.pt": b"a",
}
FOUND = {
    "run": ("folder", f"run/step3/{MODEL_STATES[0]}"),
    "run/step3": ("folder", f"run/step3/{MODEL_STATES[0]}"),
    "z3": ("folder", f"z3/{MODEL_STATES[1]}"),
    "run/final": ("file", "run/final"),
    "run/ck.ckpt": ("folder", f"run/ck.ckpt/step3/{MODEL_STATES[1]}"),
    "run/b.pt": ("file", "run/a.pt"),
    "run/b": None,
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)


class Refusing(MemoryFileSystem):
    """A file system whose user may not list: it refuses what is not there, as s3fs does."""

    protocol = "refusing"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    def info(self, path: str, **kwargs: Any) -> Any:
        return self._or_refuse(lambda: super(Refusing, self).info(path, **kwargs))

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return self._or_refuse(lambda: super(Refusing, self)._open(path, *args, **kwargs))

    def _or_refuse(self, work: Any) -> Any:
        try:
            found = work()
        except FileNotFoundError:
            raise PermissionError("Forbidden") from None
        if isinstance(found, dict) and found["type"] == "directory":
            raise PermissionError("Forbidden")
        return found


@pytest.fixture(params=["http 404", "http 403", "signed folder", "fsspec 403"])
def base(request: pytest.FixtureRequest) -> Any:
    """Opens the object at a path, in a store that has `OBJECTS`."""
    if request.param == "fsspec 403":
        files = Refusing()
        for path, body in OBJECTS.items():
            files.pipe(f"/{path}", body)
        yield lambda path: open_store(f"/{path}", files)
        return
    with counting_server({f"/{path}": Served(body) for path, body in OBJECTS.items()}) as server:
        query = ""
        if request.param != "http 404":
            server.missing = REFUSED
        if request.param == "signed folder":
            query = "?sv=1&sig=a%2Fb%2Bc"
            for served in server.served.values():
                served.needs_query = query[1:]
        yield lambda path: open_store(server.url(f"/{path}{query}"))


@pytest.mark.parametrize("path", FOUND)
def test_a_refusal_is_no_error_where_something_is_found(base: Any, path: str) -> None:
    expected = FOUND[path]
    store, name = base(path)
    if expected is None:
        with pytest.raises((NotFoundError, AccessError), match="is no checkpoint") as caught:
            locate(store, name)
        if isinstance(caught.value, AccessError):
            listed = "".join(caught.value.details["refused"])
            assert all(one in listed for one in (path, "latest", *MODEL_STATES))
            assert "check the path first" in str(caught.value)
        return
    found = locate(store, name)
    wanted = name.replace(path, expected[1], 1)
    assert (found.form, found.first.lstrip("/")) == (expected[0], wanted.lstrip("/"))


def test_s3_whose_user_may_not_list() -> None:
    pytest.importorskip("s3fs")
    with counting_server({f"/bucket/{path}": Served(body) for path, body in OBJECTS.items()}) as server:
        server.missing = REFUSED
        client = {"endpoint_url": server.url(""), "region_name": "us-east-1"}
        options = {"key": "k", "secret": "s", "client_kwargs": client, "skip_instance_cache": True}
        for path, expected in FOUND.items():
            store, name = open_store(f"s3://bucket/{path}", None, options)
            if expected is None:
                with pytest.raises(AccessError, match="The store refused access to s3://bucket/run/b/latest"):
                    locate(store, name)
            else:
                found = locate(store, name)
                assert (found.form, found.first) == (expected[0], f"bucket/{expected[1]}")


def test_a_tag_whose_files_are_refused(tmp_path: Path) -> None:
    with counting_server({"/run/latest": Served(b"step3")}) as server:
        server.missing = REFUSED
        with pytest.raises(AccessError, match=r"names the tag 'step3', but .*store refused access") as caught:
            locate(*open_store(server.url("/run")))
    assert [name.rpartition("/")[2] for name in caught.value.details["refused"]] == list(MODEL_STATES)


def test_failures_that_are_no_refusal_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 1.0)
    with (
        counting_server({"/run/latest": Served(status=500)}) as server,
        pytest.raises(AccessError, match="500"),
    ):
        locate(*open_store(server.url("/run")))


def test_links_in_a_store_that_refuses() -> None:
    served = {
        "/d/deep/a.symlink": Served(b"deep/b.pt"),
        "/deep/b.pt": Served(b"x"),
        "/d/gone.symlink": Served(b"nothing"),
    }
    with counting_server(served) as server:
        server.missing = REFUSED
        store, name = open_store(server.url("/d/deep/a"))
        # Its place in the link's folder is asked for first, and refused.
        found = resolve_link(store, name)
        assert found is not None
        assert found.info.name == server.url("/deep/b.pt")
        assert resolve_link(store, server.url("/d/none")) is None
        with pytest.raises(AccessError, match=r"the link names 'nothing', which was not found.*refused"):
            resolve_link(store, server.url("/d/gone"))
        info = resolve(store, server.url("/d/none"))
        assert info is not None
        assert not info.info.certain


def test_a_local_file_that_may_not_be_read_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(
        AccessError, match="check the permissions of the file and of the folders above"
    ) as caught:
        LocalStore().stat("/closed/a.pt")
    assert "credentials" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_an_sdk_that_keeps_its_status_in_the_response(status: int) -> None:
    from rankload.loader.store_errors import refusals_in, store_error

    response = type("Response", (), {"status_code": status})()
    mapped = store_error(type("HubError", (Exception,), {"response": response})(), "hf://a/b")
    assert refusals_in(mapped) == {"hf://a/b": f"HTTP {status}"}
    assert refusals_in(store_error(OSError("Forbidden: bucket/key\nno"), "gs://b/k"))
    assert not refusals_in(store_error(type("NoCredentialsError", (Exception,), {})("none"), "s3://b/k"))


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize("missing", [PAGE, Served(PAGE.body, content_type="text/html", send_length=False)])
def test_a_server_that_answers_a_page_to_every_name(missing: Served) -> None:
    with counting_server({f"/{path}": Served(body) for path, body in OBJECTS.items()}) as server:
        server.missing = missing
        for path, expected in FOUND.items():
            if expected is not None and path != "run/b.pt":
                found = locate(*open_store(server.url(f"/{path}")))
                assert (found.form, found.first) == (expected[0], server.url(f"/{expected[1]}"))
        # Whoever reads the page will say what it is.
        assert locate(*open_store(server.url("/none.pt"))).first == server.url("/none.pt")


def test_objects_that_are_called_pages_by_mistake() -> None:
    served = {f"/{path}": Served(body, content_type="text/html") for path, body in OBJECTS.items()}
    with counting_server(served) as server:
        assert locate(*open_store(server.url("/run"))).form == "folder"
        assert locate(*open_store(server.url("/run/b.pt"))).first == server.url("/run/a.pt")
        assert locate(*open_store(server.url("/run/final"))).form == "file"


def manifests(server: CountingServer) -> dict[str, Any]:
    store, name = open_store(server.url("/d/a.pt"))
    return find_manifests(store, Located("file", name, name))


@pytest.mark.parametrize(
    "answer",
    [
        PAGE,
        Served(PAGE.body),
        Served(b'{"error": "no such route"}'),
        Served(b"PK\3\4\0\0 the checkpoint itself"),
        Served(b"\0" * (LIMIT_BYTES + 1)),
        Served(b"\0" * (LIMIT_BYTES + 1), send_length=False),
        Served(status=403, head_status=200),
    ],
    ids=[
        "page",
        "page without a type",
        "json",
        "checkpoint",
        "large",
        "large, no length",
        "refused after all",
    ],
)
def test_what_answers_to_a_manifests_name_is_left_out_and_noted(answer: Served) -> None:
    with counting_server({}) as server:
        server.missing = answer
        found = manifests(server)
    assert found["sums"] == {}
    assert len(found["notes"]) == 1 + len(NAMES)
    assert all("was not used" in note for note in found["notes"])


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retries, "MAX_BACKOFF_S", 0.1)
    monkeypatch.setattr(manifest, "OPTIONAL_S", 1.0)
    monkeypatch.setattr(manifest, "ONCE_MORE_S", 0.2)


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize("there", [False, True])
def test_a_manifest_that_cannot_be_read_does_not_hold_up_a_load(there: bool) -> None:
    """The store is waited for as long as `stall_timeout_s` allows, which is two minutes here."""
    with counting_server({"/d/a.pt": Served(b"x")}) as server:
        if there:
            server.served["/d/a.pt.sha256"] = Served(b"x", status=500, head_status=200)
        else:
            server.missing = Served(status=500)
        begin = time.monotonic()
        found = manifests(server)
        assert time.monotonic() - begin < 10
        assert found["sums"] == {}
        assert len(found["notes"]) == (1 if there else 1 + len(NAMES))
        assert all("could not be read, so nothing was compared with it" in note for note in found["notes"])
        assert "HTTP 500" in found["notes"][0]


@pytest.mark.usefixtures("short_waits")
def test_a_refusal_to_tell_of_a_manifest_is_no_failure() -> None:
    with counting_server({"/d/a.pt": Served(b"x")}) as server:
        server.missing = Served(status=403)  # so some stores answer for what is not there
        assert manifests(server)["notes"] == []


@pytest.mark.usefixtures("short_waits")
def test_an_outage_of_the_store_is_waited_out_for_manifests_too() -> None:
    listed = Served(b"0" * 64 + b"  a.pt\n", status=503)
    with counting_server({"/d/a.pt": Served(b"x", status=503), "/d/a.pt.sha256": listed}) as server:

        def recovers() -> None:
            time.sleep(2.0)
            server.served |= {"/d/a.pt": Served(b"x"), "/d/a.pt.sha256": Served(listed.body)}

        waiting = threading.Thread(target=recovers)
        waiting.start()
        found = manifests(server)
        waiting.join()
        assert list(found["sums"].values()) == [("0" * 64, "a.pt.sha256")]
        assert found["notes"] == []


@pytest.mark.usefixtures("short_waits")
def test_a_manifest_is_not_passed_over_where_checksums_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 2.0)
    with counting_server({"/d/a.pt": Served(b"x")}) as server:
        server.missing = Served(status=500)
        store, name = open_store(server.url("/d/a.pt"))
        with pytest.raises(AccessError, match=r"HTTP 500.*It may hold checksums, which were asked for"):
            find_manifests(store, Located("file", name, name), required=True)


def test_a_store_that_is_deaf_to_a_manifests_name_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, asked = LocalStore(), []

    def stat(name: str) -> Any:
        asked.append(name)
        raise StalledError(f"nothing has arrived for 5 s: {name}")

    monkeypatch.setattr(store, "stat", stat)
    with pytest.raises(StalledError, match=r"a\.pt\.sha256"):
        find_manifests(
            store, Located("file", str(tmp_path / "a.pt"), str(tmp_path / "a.pt")), only_beside=True
        )
    assert len(asked) == 1


def test_a_damaged_manifest_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DEFAULT_STALL_TIMEOUT_S", 1.0)
    with (
        counting_server({"/d/SHA256SUMS": Served(b"0" * 64 + b"  a.pt\n<html>\n")}) as server,
        pytest.raises(FormatError, match="got '<html>'"),
    ):
        manifests(server)
    with (
        counting_server({"/d/SHA256SUMS": Served(b"no checksums")}) as server,
        pytest.raises(FormatError, match="as sha256sum writes them"),
    ):
        manifests(server)


def test_a_checksum_alone_is_of_the_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.pt.sha256").write_text(f"{'ab' * 32}\n")
    store, name = open_store(str(tmp_path / "a.pt"))
    found = find_manifests(store, Located("file", name, name))
    assert found["sums"] == {os.path.realpath(name): ("ab" * 32, "a.pt.sha256")}
    (tmp_path / "a.pt.sha256").write_text(f"{'ab' * 31}\n")
    with pytest.raises(FormatError, match="as sha256sum writes them"):
        find_manifests(store, Located("file", name, name))


def test_few_requests_at_once_for_names_that_may_not_exist() -> None:
    with counting_server({}) as server:
        server.missing_pause_s = 0.05
        manifests(server)
        assert len(server.requests) == 1 + len(NAMES)
        assert 1 < server.most_in_flight <= AT_ONCE == 3


def test_manifests_above_a_nested_tag() -> None:
    line = b"0" * 64 + f"  epoch1/step3/{MODEL_STATES[0]}\n".encode()
    served = {
        "/run/latest": Served(b"epoch1/step3"),
        f"/run/epoch1/step3/{MODEL_STATES[0]}": Served(b"x"),
        "/run/SHA256SUMS": Served(line),
    }
    with counting_server(served) as server:
        store, name = open_store(server.url("/run"))
        located = locate(store, name)
        assert (located.tag, located.by_latest) == ("epoch1/step3", True)
        assert list(find_manifests(store, located)["sums"]) == [f"/run/epoch1/step3/{MODEL_STATES[0]}"]


def test_a_page_in_the_place_of_a_small_text() -> None:
    with counting_server({"/a.symlink": PAGE}) as server:
        assert resolve(*open_store(server.url("/a"))) is None
        with pytest.raises(CorruptError, match="at most 5 bytes"):
            open_store(server.url("/a.symlink"))[0].read_small(server.url("/a.symlink"), 5)
