"""Secrets are taken out of paths of every kind, and out of texts."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from http_server import Served, counting_server
from hypothesis import given, settings
from hypothesis import strategies as st
from rankload.launch.cli import main
from rankload.loader import LoadOptions, RankloadError, State, load, read, retries
from rankload.loader.candidates.found import FoundCheckpoint
from rankload.loader.candidates.listing import Candidate
from rankload.loader.fetch.checkpoint_files import NamedPath
from rankload.loader.fetch.needs import FileNeed
from rankload.loader.fetch.remote_files import ObjectPart
from rankload.loader.http.addresses import address_of
from rankload.loader.http.connections import Route
from rankload.loader.http.exchange import Request
from rankload.loader.http.settings import settings_of
from rankload.loader.options import resolve_options
from rankload.loader.redaction import redact_path, redact_text, secrets_in
from rankload.loader.request import LoadRequest
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.http import HttpStore
from rankload.loader.stores.locate import Located
from rankload.loader.stores.symlinks import Resolved


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://me:secret@host:8/a{rank}.tar?sig=secret#secret", "https://host:8/a{rank}.tar"),
        ("HTTP://host/<rank>?sig=secret", "HTTP://host/<rank>"),
        ("s3://key:secret@bucket/what?{rank:05d}", "s3://bucket/what?{rank:05d}"),
        ("simplecache::https://a:secret@host/x?sig=secret", "simplecache::https://host/x"),
        ("simplecache::https://a:se@cret@host/x?sig=secret", "simplecache::https://host/x"),
        ("zip://inner?1::https://host/x?sig=secret", "zip://inner?1::https://host/x"),
        ("s3://bucket/me@home/{rank}", "s3://bucket/me@home/{rank}"),
        ("local/a#1/what?{rank}@x", "local/a#1/what?{rank}@x"),
    ],
)
def test_paths(path: str, shown: str) -> None:
    assert redact_path(path) == shown


def test_texts() -> None:
    assert redact_text("see https://u:p@host/x?sig=1 now") == "see https://host/x now"
    assert redact_text("'az://c/x?sig=1', s3://k:s@b/y#z") == "'az://c/x', s3://b/y"


def test_what_is_no_secret_stays() -> None:
    for path in (
        "https://host:8080/a@b/c",
        "https://[::1]:8080/a",
        "hf://user/repo@main/file.pt",
        "s3://bucket/a?b#c/{rank}",
        "sftp://host:22/dir/x@y.pt",
        "run::1/last.ckpt",
    ):
        assert redact_path(path) == path
    for text in (
        "token 5 of 7",
        "no such key: a.pt",
        "expected 4 bytes, got 5 (HTTP 503)",
        "rank 0 signed off",
    ):
        assert redact_text(text) == text


PASSWORDS = {
    "ftp": "ftp://user:{}@host/dir/a.pt",
    "sftp, port": "sftp://user:{}@host:22/a.pt",
    "smb": "smb://WORK;user:{}@host/share/a",
    "http": "http://user:{}@host/a.pt",
    "https, port": "https://user:{}@host:8443/a",
    "https, query": "https://user:{}@host/a?x=1",
    "no user": "http://:{}@host/a",
    "s3": "s3://key:{}@bucket/a.pt",
    "webhdfs": "webhdfs://user:{}@namenode:9870/a",
    "simplecache": "simplecache::http://user:{}@host/a",
    "two caches": "filecache::simplecache::https://user:{}@host/a",
    "zip": "zip://inner.pt::ftp://user:{}@host/a.zip",
    "IPv6": "http://user:{}@[::1]:80/a",
    "unclosed": "http://[user:{}@host/a",
    "upper case": "HTTPS://user:{}@HOST/a",
    "template": "sftp://user:{}@host/ep1-rank{{rank}}.tar",
}
"""URLs with a password, which may have any of the characters that break URLs."""
QUERIES = {
    "http query": "http://host/a.pt?X-Amz-Signature={}",
    "https query": "https://host/a.pt?a=1&sig={}&b=2",
    "http, no name": "https://host/a?{}",
    "http fragment": "https://host/a#{}",
    "az": "az://container/a.pt?sig={}",
    "abfs": "abfs://container@account.dfs.core.windows.net/a?sv=1&sig={}",
    "gs": "gs://bucket/a?Signature={}",
    "s3 query": "s3://bucket/a?X-Amz-Security-Token={}",
    "webhdfs query": "webhdfs://host:9870/a?delegation={}",
    "hf query": "hf://user/repo/a?token={}",
    "gdrive": "gdrive://folder/a?access_token={}",
    "oci": "oci://bucket@namespace/a?par={}",
    "cached http": "simplecache::http://host/a?sig={}",
    "cached az": "filecache::az://c/a?sig={}",
    "as a cache says": "simplecache://http://host/a?{}",
    "zip in http": "zip://inner.pt::https://host/a.zip?sig={}",
    "port": "https://host:8443/a?sig={}",
    "IPv6 query": "http://[::1]/a?sig={}",
    "unclosed query": "http://[host/a?sig={}",
    "template query": "https://host/ep-rank{{rank}}.pt?sig={}",
    "fragment of s3": "s3://bucket/a#key={}",
}
FORMS = {**PASSWORDS, **QUERIES}
passwords = st.text("abcXYZ019@/:+=%-_.~!$*&;", min_size=6, max_size=24).map("p".__add__)
queries = st.text("abcXYZ019+/=%-_.~!*", min_size=8, max_size=24).map("q".__add__)
TEXTS = (
    "could not open {}",
    "'{}': refused",
    "url='{}', status=403",
    "see ({}).",
    '{{"uri": "{}"}}',
    "<{}>\nnext",
)


def parts(secret: str) -> set[str]:
    """What must not be seen of a secret: each run of it that is long enough to tell something."""
    return {run for run in re.split(r"[^A-Za-z0-9]+", secret) if len(run) >= 5} | {secret}


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=40)
def test_no_form_of_a_path_shows_its_secret(form: str, data: st.DataObject) -> None:
    secret = data.draw(passwords if form in PASSWORDS else queries)
    path = FORMS[form].format(secret)
    shown = redact_path(path)
    assert not [part for part in parts(secret) if part in shown], (path, shown)
    assert redact_path(shown) == shown
    for text in TEXTS:
        told = redact_text(text.format(path))
        assert not [part for part in parts(secret) if part in told], (path, told)
        assert redact_text(told) == told


OPTIONS: list[Callable[[str], dict[str, Any]]] = [
    lambda secret: {"key": "AKIA", "secret": secret},
    lambda secret: {"token": secret},
    lambda secret: {"account_key": secret},
    lambda secret: {"connection_string": secret},
    lambda secret: {"sas_token": secret},
    lambda secret: {"username": "me", "password": secret},
    lambda secret: {"headers": {"PRIVATE-TOKEN": secret}},
    lambda secret: {"headers": {"X-Odd": secret}},
    lambda secret: {"client_kwargs": {"headers": {"Authorization": f"Bearer {secret}"}}},
    lambda secret: {"client_kwargs": {"aws_session_token": secret}},
    lambda secret: {"cookies": {"session": secret}},
    lambda secret: {"auth": ("me", secret)},
    lambda secret: {"http": {"headers": {"Cookie": secret}}},
    lambda secret: {"endpoint_url": f"http://me:{secret}@minio:9000"},
    lambda secret: {"passphrase": secret.encode()},
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@given(secret=st.text("abcXYZ019+/=-_.", min_size=6, max_size=24).map("s".__add__))
@settings(max_examples=15)
def test_values_of_options_are_known(number: int, secret: str) -> None:
    found = secrets_in(
        {**OPTIONS[number](secret), "anon": False, "region": "eu", "endpoint": "http://minio:9000"}
    )
    assert secret in redact_text(f"the server said {secret}, no less")
    assert secret not in redact_text(f"the server said {secret}, no less", found)
    assert redact_text("http://minio:9000 in eu", found) == "http://minio:9000 in eu"


@pytest.mark.parametrize(
    "text",
    [
        "Max retries exceeded with url: /a?X-Amz-Signature=SECRET&x=SECRET (Caused by ...)",
        "Authorization: Basic SECRETSECRET",
        "{'PRIVATE-TOKEN': 'SECRET', 'x-api-key': 'SECRET'}",
        "AccountName=a;AccountKey=SECRET;EndpointSuffix=b",
        "password='SECRET'",
        "aws_secret_access_key=SECRET",
        "sent Bearer SECRETSECRET",
    ],
)
def test_secrets_outside_of_urls(text: str) -> None:
    assert "SECRET" not in redact_text(text)


# ---------------------------------------------------------------- what the loader says


class Telltale(MemoryFileSystem):  # type: ignore[misc]
    """A backend whose errors, and what they are raised from, quote all that it was given."""

    protocol = "telltale"
    cachable = False

    def __init__(self, fails: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._told = f"cannot use {options}"
        if fails == "at once":
            raise ValueError(self._told)

    def info(self, path: str, **_: Any) -> Any:
        try:
            raise KeyError(self._told)
        except KeyError as error:
            raise OSError("no") from error


def told_by(work: Callable[[], object], caplog: pytest.LogCaptureFixture) -> str:
    """Everything that a failing call tells: the error, its details, its traceback, and the log."""
    with caplog.at_level(logging.DEBUG), pytest.raises(RankloadError) as caught:
        work()
    error = caught.value
    texts = [*traceback.format_exception(error), repr(error), str(error.details), str(error.path)]
    return "\n".join([*texts, *logged(caplog)])


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What our own loggers said; fsspec's say every URL, where somebody turns them on."""
    ours = (record for record in caplog.records if record.name.startswith("rankload"))
    return [caplog.handler.format(record) for record in ours]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("fails", ["at once", "later"])
def test_what_a_backend_quotes_is_not_passed_on(
    number: int, fails: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fsspec.register_implementation("telltale", Telltale, clobber=True)
    options = {
        "storage_options": {**OPTIONS[number]("PLANTEDsecret"), "fails": fails},
        "cache_dir": str(tmp_path),
    }
    told = told_by(lambda: read("telltale://a.pt", options=options), caplog)
    assert "telltale://" in told
    assert "PLANTEDsecret" not in told


@pytest.mark.parametrize(
    "form", ["ftp", "http", "unclosed", "az", "webhdfs query", "cached http", "gs", "smb"]
)
def test_a_load_that_fails_shows_no_secret(
    form: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    url = FORMS[form].format("PLANTEDsecret").replace("host/", f"127.0.0.1:{port}/")
    options = {"cache_dir": str(tmp_path / "c"), "stall_timeout_s": 2, "trace": str(tmp_path / "trace.json")}
    told = told_by(lambda: read(url, options=options), caplog)
    assert "PLANTEDsecret" not in told


def test_a_load_that_succeeds_shows_no_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its receipt, log, trace, warnings, output, and in what the cache keeps, names of files included."""
    module = torch.nn.Linear(3, 3)
    torch.save({"model": module.state_dict()}, tmp_path / "a.pt")
    with counting_server({"/a.pt": Served((tmp_path / "a.pt").read_bytes())}) as server:
        url = server.url("/a.pt?X-Signature=PLANTEDsecret").replace("http://", "http://user:PLANTEDpass@")
        options = {
            "cache_dir": str(tmp_path / "c"),
            "cache_size": "1GB",
            "trace": str(tmp_path / "trace.json"),
            "storage_options": {"headers": {"PRIVATE-TOKEN": "PLANTEDheader"}},
        }
        with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            result = load(url, State(torch.nn.Linear(3, 3)), options=options)
            given = '--storage-option=headers={"PRIVATE-TOKEN": "PLANTEDheader"}'
            for command in ("inspect", "verify", "plan", "find", "fetch"):
                with contextlib.suppress(SystemExit):
                    main([command, url, given])
        assert server.requests
    said = [repr(result), str(result.receipt), json.dumps(result.receipt.as_dict()), *logged(caplog)]
    said += [str(one.message) for one in warned] + list(capfd.readouterr())
    kept = [*(tmp_path / "c").rglob("*"), tmp_path / "trace.json"]
    said += [str(path) for path in kept]
    said += [path.read_bytes().decode("latin-1") for path in kept if path.is_file()]
    assert len(kept) > 2
    assert "PLANTED" not in "\n".join(said)


def test_no_value_shows_a_secret_in_its_repr() -> None:
    url = "https://user:PLANTED@host/a?sig=PLANTED"
    info = ObjectInfo(url, 1)
    address = address_of(url, {"PRIVATE-TOKEN": "PLANTED"})
    options = {"storage_options": {"token": "PLANTED"}}
    values = [
        info,
        Resolved(info, (url,)),
        Located("folder", url, url, root=url),
        address,
        Request("GET", url, "shown", {"PRIVATE-TOKEN": "PLANTED"}),
        Route(proxy=url),
        settings_of({"headers": {"PRIVATE-TOKEN": "PLANTED"}, "proxy": "http://user:PLANTED@proxy:1"}),
        FileNeed(url),
        ObjectPart(url, 1, None, None),
        NamedPath(url, None, str),
        Candidate(url, "shown", 1),
        FoundCheckpoint(url, 1),
        LoadRequest(url, State(model=None), resolve_options(options)),
        LoadOptions(**options),
        HttpStore({"headers": {"PRIVATE-TOKEN": "PLANTED"}}),
    ]
    for value in values:
        assert "PLANTED" not in repr(value) + str(value), type(value)
