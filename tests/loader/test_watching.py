"""Each event of docs/watching.md is really logged, at the level and with the words that the page has."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from http_server import Served, counting_server
from places import REPOSITORY
from rankload.distributed import agreement
from rankload.distributed.channel import Channel
from rankload.distributed.key_value import KeyValue
from rankload.loader.cache import homes
from rankload.loader.cache.node import NodeCache

from rankload import State, load

ROW = re.compile(r"^\| (?P<event>[^|]+) \| (?P<level>DEBUG|INFO) \| (?P<message>[^|]+) \|$", re.MULTILINE)
ROWS = {found["event"]: found for found in ROW.finditer((REPOSITORY / "docs/watching.md").read_text())}
STAGE = "a stage has ended on this rank"
RETRY = "a request failed and is made again"
CACHED = "a file is not fetched or unpacked again"
PASSED_OVER = "a cache folder cannot be used, another one is"
ROOM = "a node is about to fetch (rank 0)"
OTHER_PROCESS = "this process waits for one that fetches or unpacks the same file"
LONG_WAIT = "this rank has waited for others for 10 s, 20 s, 40 s ..."
RECEIPT = "everything is restored (rank 0)"
MESSAGES = {
    STAGE: r"stage \w+: \d+\.\d{3} s, [\d,]+ bytes?$",
    RETRY: r"attempt 1 failed, the next one in \d\.\d s: http://.*503",
    CACHED: "in the cache already: /",
    PASSED_OVER: "passed over: /",
    ROOM: r"fetch [a-z ]+: node 0 \(.+\) is to fetch [\d,]+ bytes into /.*, where [\d,]+ are free$",
    OTHER_PROCESS: "waiting for another process, which makes /",
    LONG_WAIT: r"rank 0 has waited for \d+ s in stage 'fetch' for rank \d \(",
    RECEIPT: r"restored /|the receipt in three lines",
}


def test_the_page_has_these_events_and_words() -> None:
    assert set(ROWS) == set(MESSAGES)
    for event, pattern in MESSAGES.items():
        assert re.match(pattern, ROWS[event]["message"].strip("`")), event


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[str], bool]:
    """Whether the event of a row was logged, at its level."""
    caplog.set_level(logging.DEBUG, logger="rankload")

    def check(event: str) -> bool:
        records = [record for record in caplog.records if record.name == "rankload"]
        return any(
            record.levelname == ROWS[event]["level"] and re.match(MESSAGES[event], record.getMessage())
            for record in records
        )

    return check


def test_a_local_and_a_remote_load(told: Callable[[str], bool], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    load(path, State(torch.nn.Linear(2, 2)))
    assert told(STAGE)
    assert told(RECEIPT)
    assert not told(RETRY)
    assert not told(ROOM)
    options = {"cache_dir": tmp_path / "cache"}
    with counting_server({"/a.pt": Served(path.read_bytes(), failures=1)}) as server:
        load(server.url("/a.pt"), State(torch.nn.Linear(2, 2)), progress_bar=False, options=options)
    assert told(RETRY)
    assert told(ROOM)


def test_the_cache(told: Callable[[str], bool], tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def produce(path: str) -> None:
        begun.set()
        assert go_on.wait(20)
        Path(path).write_bytes(b"x")

    def make() -> None:
        with NodeCache(str(tmp_path)) as cache, cache.entry("s3://b/a", "s3", "a", 1, "v1") as entry:
            entry.fill("object", "a", produce, lambda n_bytes: None)

    maker = threading.Thread(target=make)
    maker.start()
    assert begun.wait(20)
    with NodeCache(str(tmp_path)) as cache, cache.entry("s3://b/a", "s3", "a", 1, "v1") as entry:
        threading.Timer(0.2, go_on.set).start()
        entry.fill("object", "a", produce, lambda n_bytes: None)
        entry.fill("object", "a", produce, lambda n_bytes: None)
    maker.join(20)
    assert told(OTHER_PROCESS)
    assert told(CACHED)


def test_a_long_wait_for_another_rank(told: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "LONG_WAIT_S", 0.1)
    store = torch.distributed.HashStore()

    def rank_main(rank: int) -> None:
        channel = Channel(lambda: KeyValue(store), rank, 2, 20)
        with channel.stage("fetch"):
            time.sleep(0.5 * rank)
        channel.close()

    ranks = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert told(LONG_WAIT)


def test_a_cache_folder_that_is_passed_over(
    told: Callable[[str], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(homes, "MEMORY_FOLDER", str(tmp_path))
    folder = tmp_path / f"rankload-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "theirs").touch()
    with NodeCache(home="auto") as cache, cache.entry("s3://b/a", "s3", "a", 1, "v1", nbytes=1):
        assert told(PASSED_OVER)
