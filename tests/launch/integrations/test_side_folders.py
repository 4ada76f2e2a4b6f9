"""A local folder stands for a checkpoint at a URI: what is copied into it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from http_server import Served, counting_server
from rankload.integrations.side_folders import origin_of, side_folder

from rankload import CorruptError, NotFoundError, UnsafeError

INDEX = "model.safetensors.index.json"
Objects = dict[str, bytes]


def copied(objects: Objects, **arguments: Any) -> dict[str, bytes | None]:
    """The files of the side folder, and its folders as None."""
    with counting_server({f"/run/{name}": Served(data) for name, data in objects.items()}) as server:
        url = server.url("/run")
        with side_folder(url, ["scheduler.pt"], "rng_{}".format, marker="state.json", **arguments) as folder:
            assert origin_of(folder, "store") == (url, "store")
            assert origin_of(folder) == (url, None)
            there = sorted(Path(folder).rglob("*"))
            found = {
                str(one.relative_to(folder)): one.read_bytes() if one.is_file() else None for one in there
            }
        assert not Path(folder).exists()
        assert origin_of(folder, "store") == (folder, None)
    return found


def index(**files: str) -> bytes:
    return json.dumps({"weight_map": files}).encode()


def test_what_is_there_is_copied() -> None:
    objects = {
        "state.json": b"{}",
        "rng_0": b"r",
        "rng_1": b"s",
        "model.safetensors": b"w",
        "latest": b"step4",
    }
    assert copied(objects) == {"state.json": b"{}", "rng_0": b"r", "latest": b"step4", "step4": None}


def test_all_that_an_index_names_is_copied() -> None:
    objects = {"state.json": b"{}", INDEX: index(a="one.bin", b="parts/two.bin"), "one.bin": b"1"}
    found = copied({**objects, "parts/two.bin": b"2"}, whole=[INDEX])
    assert (found["one.bin"], found["parts/two.bin"]) == (b"1", b"2")
    with pytest.raises(NotFoundError):
        copied(objects, whole=[INDEX])


@pytest.mark.parametrize(
    ("objects", "arguments", "error"),
    [
        ({}, {}, NotFoundError),
        ({INDEX: b"{"}, {"whole": [INDEX]}, CorruptError),
        ({INDEX: b"{}"}, {"whole": [INDEX]}, CorruptError),
        ({INDEX: index(a="../one.bin")}, {"whole": [INDEX]}, UnsafeError),
        ({"latest": b"\xff\xff"}, {}, CorruptError),
        ({"latest": b"../step4"}, {}, UnsafeError),
    ],
)
def test_what_is_none_is_refused(objects: Objects, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        copied({**({"state.json": b"{}"} if objects else {}), **objects}, **arguments)
