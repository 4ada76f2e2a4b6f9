"""Byte ranges from one rank's growing file to another's process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rankload.distributed.range_server import PeerAddress, PeerConnection, RangeServer, Served
from rankload.loader.errors import AccessError
from rankload.loader.ranges.peer import PeerSource
from rankload.loader.retries import TryAgainError

DATA = os.urandom(3 << 20)


class Growing:
    """A file of which the first `there` bytes are there."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(DATA)
        self.path = str(path)
        self.there = len(DATA)
        self.steps = 0

    def served(self, key: str) -> Served | None:
        if key != "data":
            return None
        return Served(self.path, lambda start, stop: max(start, min(stop, self.there)), lambda: self.steps)


@pytest.fixture
def growing(tmp_path: Path) -> Growing:
    return Growing(tmp_path / "data")


@pytest.fixture
def server(growing: Growing) -> Iterator[RangeServer]:
    before = set(threading.enumerate())
    server = RangeServer(growing.served, "here")
    yield server
    server.close()
    assert set(threading.enumerate()) <= before, "a thread was left"
    with pytest.raises(OSError, match=r"refused|not known|resolution"):
        PeerConnection(server.address, "here")


def source(address: PeerAddress, key: str = "data", **given: object) -> PeerSource:
    moved = given.pop("moved", lambda: None)
    return PeerSource(address, key, len(DATA), own_host="here", rank=3, moved=moved)  # type: ignore[arg-type]


def read(peer: PeerSource, start: int, stop: int) -> bytes:
    memory = bytearray(stop - start)
    peer.read_into(start, stop, [memoryview(memory)])
    return bytes(memory)


def test_what_is_there_comes_and_connections_are_used_again(server: RangeServer) -> None:
    peer = source(PeerAddress.from_record(server.address.as_record()))
    for start, stop in ((0, 1), (5, len(DATA)), (1 << 20, (1 << 20) + 7)):
        assert read(peer, start, stop) == DATA[start:stop]
    assert len(peer._idle) == 1
    peer.close()


def test_what_is_not_there_yet_is_waited_for(growing: Growing, server: RangeServer) -> None:
    growing.there = 1 << 20
    moves: list[float] = []
    waits: list[int] = []

    def grow() -> None:
        for step in range(1, 4):
            time.sleep(0.8)
            growing.steps = step
        growing.there = len(DATA)

    thread = threading.Thread(target=grow)
    thread.start()
    memory = bytearray(len(DATA))
    peer = source(server.address, moved=lambda: moves.append(time.monotonic()))
    peer.read_into(0, len(DATA), [memoryview(memory)], waits.append)
    thread.join()
    assert bytes(memory) == DATA
    assert waits.count(0) >= 3, "nobody was told that it waits"
    assert len(moves) >= 2, "the other rank's progress was not told"
    assert sum(waits) == len(DATA)
    peer.close()


def test_who_does_not_know_the_token_gets_nothing(server: RangeServer) -> None:
    with pytest.raises(TryAgainError, match=r"rank 3 \(host here\)"):
        read(source(replace(server.address, token="0" * 32)), 0, 10)


def test_a_file_that_is_not_there_is_an_error(server: RangeServer) -> None:
    with pytest.raises(AccessError, match="this rank has no file other"):
        read(source(server.address, "other"), 0, 10)


def test_a_server_that_ends_is_worth_another_try(growing: Growing, server: RangeServer) -> None:
    growing.there = 0
    timer = threading.Timer(0.5, server.close)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(TryAgainError, match="closed the connection"):
        read(source(server.address), 0, 10)
    timer.join()
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, struct.pack("!I", 5) + b"[1,2]", struct.pack("!I", 3) + b"{}}"],
    ids=["long", "list", "no JSON"],
)
def test_garbage_ends_its_connection_alone(server: RangeServer, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.address.port), timeout=5) as connection:
        connection.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert read(source(server.address), 0, 10) == DATA[:10]
