"""Hostile names and places: links in circles, names that lead elsewhere, prepared cache folders, secrets that leak."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_server import Behaviour, bad_server
from http_server import Served, counting_server
from places import DATA
from rankload.loader import LoadOptions, State, load, read
from rankload.loader.alone import EVERYTHING, open_alone
from rankload.loader.errors import (
    AccessError,
    CorruptError,
    NotFoundError,
    RankloadError,
    TemplateError,
    UnsafeError,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "f.pt"
    torch.save({"model": torch.nn.Linear(2, 2).state_dict(), "epoch": 1}, path)
    return path


# --- links -----------------------------------------------------------------------------------------------------------

CIRCLES = {
    "itself": {"a": "a"},
    "itself, by its link": {"a": "a.symlink"},
    "two": {"a": "b", "b": "a"},
    "three, not from the first": {"a": "b", "b": "c", "c": "b"},
    "a long chain": {"a": "0", **{str(n): str(n + 1) for n in range(40)}},
}


@pytest.mark.parametrize("circle", CIRCLES)
def test_links_in_a_circle_end(tmp_path: Path, circle: str) -> None:
    texts = CIRCLES[circle]
    for name, target in texts.items():
        (tmp_path / f"{name}.symlink").write_text(target)
    with pytest.raises(CorruptError, match="the chain of links"):
        load(tmp_path / "a", State(torch.nn.Linear(2, 2)))
    with counting_server(
        {f"/{name}.symlink": Served(text.encode()) for name, text in texts.items()}
    ) as server:
        with pytest.raises(CorruptError, match="the chain of links"):
            load(server.url("/a"), State(torch.nn.Linear(2, 2)))
        assert len(server.requests) < 200


@pytest.mark.parametrize(
    "text", ["../f.pt", "x/../../f.pt", "..\\f.pt", "\0", "", "a\nb", "http://127.0.0.1:9/f.pt", "s3://b/f"]
)
def test_a_link_of_a_server_leads_nowhere_else(checkpoint: Path, text: str) -> None:
    served = {"/run/l.symlink": Served(text.encode()), "/f.pt": Served(checkpoint.read_bytes())}
    with counting_server(served) as server:
        with pytest.raises((UnsafeError, CorruptError, NotFoundError)):
            load(server.url("/run/l"), State(torch.nn.Linear(2, 2)), load_weights_only=True)
        assert server.gets("/f.pt") == 0


# --- names that files hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["../f", "/etc", "a/../../f", "..", "a\\..\\f", "f\0", "."])
def test_latest_leads_nowhere_else(tmp_path: Path, tag: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "latest").write_text(tag)
    shutil.copytree(folder, tmp_path / "f")
    with pytest.raises((UnsafeError, CorruptError)):
        load(folder, State(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "name",
    ["../f.safetensors", "/etc/passwd", "a/../../f.safetensors", "a\\b.safetensors", "", "a\nb", "./f"],
)
def test_a_models_index_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(DATA / "safetensors-single" / "ckpt" / "model.safetensors", tmp_path / "f.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises((UnsafeError, CorruptError)), open_alone(folder, EVERYTHING):
        pass


@pytest.mark.parametrize("name", [b"../../ckpt", b"/etc/passwdx", b"__0_0/../xx"])
def test_a_dcp_folders_metadata_leads_nowhere_else(tmp_path: Path, name: bytes) -> None:
    shutil.copytree(DATA / "dcp-tp-fsdp-w4" / "ckpt", tmp_path / "ckpt")
    metadata = tmp_path / "ckpt" / ".metadata"
    data = metadata.read_bytes()
    old = b"__0_0.distcp"
    assert old in data
    metadata.write_bytes(data.replace(old, name[: len(old)].ljust(len(old), b"x")))
    with pytest.raises(UnsafeError, match="names the file"), open_alone(tmp_path / "ckpt", EVERYTHING):
        pass


# --- path templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_name", ["../other", "..", "a/../../other", "x/.."])
def test_a_run_name_leads_out_of_no_folder(tmp_path: Path, checkpoint: Path, run_name: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    with pytest.raises(TemplateError, match="would lead out of its folder"):
        read(f"{own}/{{run_name}}/f.pt", run_name=run_name)
    with counting_server({"/other/f.pt": Served(checkpoint.read_bytes())}) as server:
        with pytest.raises(TemplateError):
            read(server.url("/own/{run_name}/f.pt"), run_name=run_name)
        assert server.requests == []


@pytest.mark.parametrize(
    "run_name",
    ["%2e%2e/other", "..%2fother", ".%2e%2fother", "?x=/../other", "#/../other", "//127.0.0.1:9/other"],
)
def test_an_encoded_run_name_stays_below_its_folder(checkpoint: Path, run_name: str) -> None:
    with counting_server({"/other/f.pt": Served(checkpoint.read_bytes())}) as server:
        with pytest.raises(RankloadError):
            read(server.url("/own/{run_name}/f.pt"), run_name=run_name)
        for one in server.requests:
            assert one.target.startswith("/own/")
            assert ".." not in one.target.split("/")
            assert "?" not in one.target


# --- the cache folder ------------------------------------------------------------------------------------------------


def as_link(cache: Path, victim: Path) -> None:
    cache.symlink_to(victim)


def open_to_all(cache: Path, victim: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def with_sticky_bit(cache: Path, victim: Path) -> None:
    cache.mkdir()
    cache.chmod(0o1777)


def as_file(cache: Path, victim: Path) -> None:
    cache.write_text("x")


@pytest.mark.parametrize("prepare", [as_link, open_to_all, with_sticky_bit, as_file])
def test_a_cache_folder_that_others_prepared_is_not_used(
    tmp_path: Path, checkpoint: Path, prepare: Callable[[Path, Path], None]
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    prepare(tmp_path / "cache", victim)
    with counting_server({"/f.pt": Served(checkpoint.read_bytes())}) as server:
        with pytest.raises(AccessError, match="cache"):
            read(server.url("/f.pt"), options={"cache_dir": str(tmp_path / "cache")})
        # It was asked what there is, and nothing of that was kept.
        assert server.gets("/f.pt") <= 1
    assert list(victim.iterdir()) == []


def test_a_cache_folder_of_another_user_is_not_used(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with (
        counting_server({"/f.pt": Served(checkpoint.read_bytes())}) as server,
        pytest.raises(AccessError, match="belongs to user"),
    ):
        read(server.url("/f.pt"), options={"cache_dir": str(tmp_path / "cache")})


# --- secrets ---------------------------------------------------------------------------------------------------------

ANSWERS: dict[str, dict[str, Behaviour]] = {
    "not there": {},
    "forbidden": {"/f.pt": Behaviour(b"x", needs=lambda headers, query: False, head_status=403)},
    "a page": {
        "/f.pt": Behaviour(b"<html><body>log in</body></html>", headers={"Content-Type": "text/html"})
    },
    "damaged": {"/f.pt": Behaviour(b"PK\3\4" + bytes(3000))},
    "moved in a circle": {"/f.pt": Behaviour(redirect="/f.pt?sig=planted")},
    "moved to no address": {"/f.pt": Behaviour(redirect="ftp://planted:planted@h/x?sig=planted")},
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_no_error_and_no_log_tells_a_secret(
    tmp_path: Path, answer: str, caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    with bad_server(ANSWERS[answer]) as server, pytest.raises(RankloadError) as caught:
        load(
            server.url("/f.pt?X-Signature=planted&token=planted").replace("http://", "http://me:planted@"),
            State(torch.nn.Linear(2, 2)),
            options=LoadOptions(
                storage_options={"headers": {"PRIVATE-TOKEN": "planted"}}, cache_dir=str(tmp_path / "cache")
            ),
        )
    error: BaseException | None = caught.value
    while error is not None:
        assert "planted" not in f"{error} {error!r} {vars(error)}"
        error = error.__cause__
    assert "planted" not in caplog.text
    assert not any("planted" in str(one.message) for one in recwarn)


def test_no_receipt_and_no_trace_tells_a_secret(tmp_path: Path, checkpoint: Path) -> None:
    options = LoadOptions(
        storage_options={"headers": {"PRIVATE-TOKEN": "planted"}},
        cache_dir=str(tmp_path / "cache"),
        cache_size="1MB",
        trace=str(tmp_path / "trace.json"),
    )
    with bad_server({"/f.pt": Behaviour(checkpoint.read_bytes())}) as server:
        url = server.url("/f.pt?sig=planted").replace("http://", "http://me:planted@")
        result = load(url, State(torch.nn.Linear(2, 2)), load_weights_only=True, options=options)
    assert server.asked
    assert "planted" not in f"{result} {result.receipt!r} {result.receipt} {options!r}"
    assert "planted" not in (tmp_path / "trace.json").read_text()
    for path in (tmp_path / "cache").rglob("*"):
        assert "planted" not in str(path)
        if path.is_file():
            assert b"planted" not in path.read_bytes(), path
