"""What lies in the cache is this user's alone, whatever the umask and whoever made the files."""

from __future__ import annotations

import gzip
import io
import os
import re
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, bad_server
from rankload.loader import AccessError, State, load
from rankload.loader.cache.node import NodeCache

WIDE = 600


@pytest.fixture(params=[0o000, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_entries_are_private_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    """Of files that come in parts, whole, as members of a tar in both ways, and expanded."""
    tmp_path.chmod(0o755)
    module = torch.nn.Linear(WIDE, WIDE)
    file = io.BytesIO()
    torch.save({"state": {"model": module.state_dict()}, "rng": None}, file)
    data = file.getvalue()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in {
            "composer_states.pt": data,
            "deep/er/large": bytes(1 << 20),
            "deep/small": b"1",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    told = {"ETag": '"v1"'}
    served = {
        "/parts": Behaviour(data),
        "/whole": Behaviour(data, has_ranges=False, headers=told),
        "/a.tar": Behaviour(packed.getvalue()),
        "/b.tar": Behaviour(packed.getvalue(), has_ranges=False, headers=told),
        "/a.gz": Behaviour(gzip.compress(data, 1)),
    }
    cache = tmp_path / "above" / "cache"
    with bad_server(served) as server:
        for path in served:
            state = State(torch.nn.Linear(WIDE, WIDE))
            options = {"cache_dir": str(cache), "cache_size": "1GB", "mode": "node"}
            load(server.url(path), state, options=options, progress_bar=False)
            assert torch.equal(state.model.weight, module.weight), path
    modes = {path: path.lstat().st_mode & 0o777 for path in [cache, *cache.rglob("*")]}
    assert sum(path.name in ("parts", "composer_states.pt", "large") for path in modes) >= 6
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)}
    assert not wrong
    # Nobody can put another folder in the cache's place.
    assert not cache.parent.stat().st_mode & 0o022


def test_the_advice_for_a_folder_that_others_can_write_works(tmp_path: Path) -> None:
    folder = tmp_path / "it's shared"
    folder.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(AccessError, match="written by others") as raised, NodeCache(str(folder)) as cache:
        cache.entry("x", 1)
    other = re.search(r"such as (.*)$", raised.value.message)
    assert other is not None
    with NodeCache(other[1]) as cache:
        cache.entry("x", 1)
        assert not cache.notes
    command = re.search(r"run (chmod .*), or set", raised.value.message)
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True)
    with NodeCache(str(folder)) as cache:
        cache.entry("x", 1)
        assert not cache.notes


def test_the_advice_for_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(AccessError) as raised, NodeCache(str(tmp_path / "link")) as cache:
        cache.entry("x", 1)
    with NodeCache(raised.value.message.rpartition("leads to, ")[2]) as cache:
        cache.entry("x", 1)


def test_a_folder_that_others_can_list_is_used_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    file = io.BytesIO()
    torch.save({"state": {"model": torch.nn.Linear(2, 2).state_dict()}, "rng": None}, file)
    with bad_server({"/a": Behaviour(file.getvalue())}) as server:
        state = State(torch.nn.Linear(2, 2))
        receipt = load(
            server.url("/a"), state, options={"cache_dir": str(folder)}, progress_bar=False
        ).receipt
    (note,) = (note for note in receipt.notes if str(folder) in note)
    assert "others can list" in note
    assert "0755" in note
    assert sum("others can list" in record.message for record in caplog.records) == 1
