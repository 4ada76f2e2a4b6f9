"""Byte ranges from one rank's growing file to another's process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rankload.distributed import interfaces, range_server
from rankload.distributed.errors import TopologyError
from rankload.distributed.interfaces import network_identity, own_addresses
from rankload.distributed.range_server import (
    PeerAddress,
    PeerConnection,
    RangeServer,
    Served,
    UnreachableError,
)
from rankload.loader.errors import AccessError
from rankload.loader.ranges.peer import PeerSource, PeerUnreachableError
from rankload.loader.retries import Outages, TryAgainError

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
    with pytest.raises(UnreachableError, match="none of its addresses leads to it"):
        PeerConnection(server.address)


def source(address: PeerAddress, key: str = "data", **given: object) -> PeerSource:
    moved = given.pop("moved", lambda: None)
    return PeerSource(address, key, len(DATA), rank=3, moved=moved, outages=Outages())  # type: ignore[arg-type]


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


# --- who may ask, and who answers ----------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(port: int) -> Iterator[tuple[int, list[bytes]]]:
    """A relay to the server at `port`: its own port, and all that passes through it, both ways."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def copy(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.append(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=copy, args=(server, client))
                back.start()
                copy(client, server)
                back.join()

        thread = threading.Thread(target=relay)
        thread.start()
        yield listener.getsockname()[1], seen
        thread.join()


def test_the_key_is_never_on_the_wire_nor_in_messages(server: RangeServer) -> None:
    with recording(server.address.port) as (port, seen):
        connection = PeerConnection(replace(server.address, port=port))
        connection.ask("data", 0, 4)
        memory = memoryview(bytearray(4))
        assert connection.receive(memory, lambda progress: None) == 4
        connection.close()
    passed = b"".join(seen)
    assert bytes(memory) == DATA[:4]
    assert b"data" in passed, "nothing was recorded"
    assert bytes.fromhex(server.address.key) not in passed
    assert server.address.key.encode() not in passed
    assert server.address.key not in repr(server.address)


def test_who_does_not_know_the_key_gets_nothing(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_server, "_prove", prove_wrongly)
    connection = PeerConnection(server.address)
    connection.ask("data", 0, 10)
    with pytest.raises(OSError, match=r"closed|reset"):
        connection.receive(memoryview(bytearray(10)), lambda progress: None)
    connection.close()


def prove_wrongly(connection: socket.socket, key: bytes, until: float) -> None:
    """A client that takes any server, and shows a proof by another key."""
    connection.setblocking(True)
    connection.sendall(range_server._HELLO + b"0" * 32)
    theirs = range_server._receive(connection, 64)[:32]
    connection.sendall(range_server._proof(b"1" * 32, b"client", b"0" * 32, theirs))


def test_another_server_at_the_address_is_not_taken(
    server: RangeServer, growing: Growing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one of ours with another key, nor one that reflects what it gets."""
    monkeypatch.setattr(range_server, "CONNECT_S", 1.0)
    with pytest.raises(PeerUnreachableError, match=r"rank 3 \(host here\).*another server answers there"):
        read(source(replace(server.address, key="00" * 32)), 0, 10)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[bytes] = []

        def reflect() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        nonce = connection.recv(1 << 16)[-32:]
                        connection.sendall(nonce + nonce)
                        seen.append(connection.recv(1 << 16))

        reflecting = threading.Thread(target=reflect, daemon=True)
        reflecting.start()
        with pytest.raises(UnreachableError, match="another server answers there"):
            PeerConnection(replace(server.address, port=listener.getsockname()[1], addresses=()))
        listener.shutdown(socket.SHUT_RDWR)
        reflecting.join(10)
    assert set(seen) == {b""}, "it was asked, or given a proof"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,
        struct.pack("!I", 5) + b"[1,2]",
        b"rankload-ranges/2\n" + b"x" * 200,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["long", "the old protocol", "a long hello", "HTTP"],
)
def test_garbage_ends_its_connection_alone(
    server: RangeServer, garbage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", server.address.port), timeout=5) as connection:
        connection.sendall(garbage)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 10):
                got += data
        assert len(got) <= 64
    assert read(source(server.address), 0, 10) == DATA[:10]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "request_text",
    [
        b"[" * 60_000,
        b'{"key": "data", "start": 1e999, "stop": 2}',
        b'{"key": "data"}',
        b"\xff{",
        b'{"key": 1}' * 2,
    ],
    ids=["deep", "infinite", "short", "no text", "two"],
)
def test_a_wrong_request_of_one_that_knows_the_key_ends_its_connection_alone(
    server: RangeServer,
    request_text: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "rankload")
    connection = PeerConnection(server.address)
    connection._socket.sendall(struct.pack("!I", len(request_text)) + request_text)
    with pytest.raises(OSError, match=r"closed|reset"):
        connection.receive(memoryview(bytearray(1)), lambda progress: None)
    connection.close()
    assert read(source(server.address), 0, 10) == DATA[:10]
    assert capfd.readouterr() == ("", "")
    until = time.monotonic() + 10
    while "a connection for byte ranges was ended" not in caplog.text:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_strangers_are_bounded_in_number_and_time(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_server, "STRANGERS", 3)
    monkeypatch.setattr(range_server, "PROOF_S", 1.0)
    with contextlib.ExitStack() as leaving:
        held = [
            leaving.enter_context(socket.create_connection(("127.0.0.1", server.address.port), timeout=5))
            for _ in range(3)
        ]
        until = time.monotonic() + 5
        while len(server._strangers) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", server.address.port), timeout=5) as one_more:
            assert one_more.recv(1) == b""
        # One byte now and then does not give more time.
        begin = time.monotonic()
        held[0].settimeout(0.2)
        with contextlib.suppress(OSError):
            for byte in range_server._HELLO:
                held[0].sendall(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    if held[0].recv(1) == b"":
                        break
        assert 0.3 < time.monotonic() - begin < 3
        # A rank that came meanwhile waits for a free place, and gets in.
        assert read(source(server.address), 0, 10) == DATA[:10]


# --- which address -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def swallowing(address: str, port: int) -> Iterator[None]:
    """An address where nothing answers an attempt to connect, as behind a firewall: its queue is full."""
    with contextlib.ExitStack() as leaving:
        leaving.enter_context(socket.create_server((address, port), backlog=0))
        for _ in range(4):
            one = leaving.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex((address, port))
        yield


def test_several_addresses_are_tried_quickly(growing: Growing) -> None:
    """One that swallows packets, one that refuses, one where another server never answers, then the right one."""
    server = RangeServer(growing.served, "here", "lo")
    port = server.address.port
    try:
        with swallowing("127.0.0.4", port), socket.create_server(("127.0.0.2", port)):
            places = ("127.0.0.4", "127.0.0.3", "127.0.0.2", "127.0.0.1")
            begin = time.monotonic()
            assert read(source(replace(server.address, network="", addresses=places)), 0, 10) == DATA[:10]
            assert time.monotonic() - begin < 6
    finally:
        server.close()


def test_no_address_is_an_error_soon(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_server, "CONNECT_S", 1.0)
    server = RangeServer(growing.served, "here", "lo")
    try:
        with swallowing("127.0.0.4", server.address.port):
            begin = time.monotonic()
            with pytest.raises(PeerUnreachableError, match=r"127\.0\.0\.4: no answer within 1 s"):
                read(source(replace(server.address, network="", addresses=("127.0.0.4",))), 0, 10)
            assert time.monotonic() - begin < 4
    finally:
        server.close()


def test_an_equal_host_name_leads_not_to_loopback(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes may have one host name; where loopback leads is told by the machine and its network namespace."""
    monkeypatch.setattr(range_server, "CONNECT_S", 1.0)
    assert server.address.network == network_identity() != ""
    elsewhere = replace(server.address, network="another boot net:[1]", addresses=())
    with pytest.raises(UnreachableError, match="none known"):
        PeerConnection(elsewhere)
    assert read(source(replace(server.address, addresses=())), 0, 10) == DATA[:10]


def test_the_interface_can_be_set(growing: Growing, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [
        ("lo", "127.0.0.1"),
        ("docker0", "172.17.0.1"),
        ("eth0", "10.0.0.7"),
        ("ib0", "10.1.0.7"),
        ("eth0", "fd::7"),
    ]
    monkeypatch.setattr(interfaces, "_interfaces", lambda: known)
    host = socket.gethostname()
    assert own_addresses(None, {}) == ("10.0.0.7", "10.1.0.7", "fd::7", "172.17.0.1", host)
    assert own_addresses(None, {"NCCL_SOCKET_IFNAME": "ib"})[0] == "10.1.0.7"
    assert own_addresses(None, {"GLOO_SOCKET_IFNAME": "^docker,lo"})[0] == "10.0.0.7"
    assert own_addresses("ib0") == ("10.1.0.7",)
    assert own_addresses("eth1, 10.1.0.0/16") == ("10.1.0.7",)
    assert own_addresses("10.0.0.7") == ("10.0.0.7",)
    assert own_addresses("fd::/64") == ("fd::7",)
    with pytest.raises(TopologyError, match=r"interface='eth1' names no interface.*ib0 \(10\.1\.0\.7\)"):
        own_addresses("eth1")
    chosen = RangeServer(growing.served, "here", "lo")
    try:
        assert chosen.address.addresses == ("127.0.0.1",)
        assert chosen._listener.getsockname()[0] == "127.0.0.1"
        assert read(source(chosen.address), 0, 10) == DATA[:10]
    finally:
        chosen.close()


NAMESPACED = """
import json, sys
sys.path.insert(0, {packages!r})
from rankload.distributed.range_server import PeerAddress, PeerConnection
connection = PeerConnection(PeerAddress.from_record(json.loads(sys.argv[1])))
connection.ask("data", 0, 10)
memory = memoryview(bytearray(10))
connection.receive(memory, lambda progress: None)
print(bytes(memory).hex(), connection._socket.getpeername()[0])
"""


def test_a_node_in_another_network_namespace_is_reached_by_the_address_that_leads_there(
    growing: Growing,
) -> None:
    """The host name is the same in both, and loopback leads nowhere."""
    name, near, far = f"rl{os.getpid()}", f"rla{os.getpid()}"[:15], f"rlb{os.getpid()}"[:15]

    def ip(*words: str) -> bool:
        try:
            return (
                subprocess.run(["ip", *words], capture_output=True, timeout=10, check=False).returncode == 0
            )
        except (OSError, subprocess.TimeoutExpired):
            return False

    if not ip("netns", "add", name):
        pytest.skip("needs root and iproute2")
    try:
        if not ip("link", "add", near, "type", "veth", "peer", "name", far):
            pytest.skip("this kernel makes no veth")
        assert ip("link", "set", far, "netns", name)
        assert ip("addr", "add", "10.213.7.1/24", "dev", near)
        assert ip("link", "set", near, "up")
        assert ip("netns", "exec", name, "ip", "addr", "add", "10.213.7.2/24", "dev", far)
        assert ip("netns", "exec", name, "ip", "link", "set", far, "up")
        assert ip("netns", "exec", name, "ip", "link", "set", "lo", "up")
        for interface in (None, "10.213.7.0/24"):
            server = RangeServer(growing.served, socket.gethostname(), interface)
            try:
                code = NAMESPACED.format(packages=os.environ.get("PYTHONPATH", ""))
                ended = subprocess.run(
                    [
                        "ip",
                        "netns",
                        "exec",
                        name,
                        sys.executable,
                        "-c",
                        code,
                        json.dumps(server.address.as_record()),
                    ],
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                )
            finally:
                server.close()
            assert ended.stdout.split()[:1] == [DATA[:10].hex()], ended
            assert "10.213.7.1" in ended.stdout
    finally:
        ip("link", "del", near)
        ip("netns", "del", name)
