"""Sockets behind native code: which are one's own, whether a silent server listens, and the end of a wait for it."""

from __future__ import annotations

import socket
import threading

from rankload.distributed.sockets import connected_since, listens, open_sockets, shut_down


def test_a_wait_ends_with_its_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as others:
            before = open_sockets()
            with (
                socket.create_connection(("127.0.0.1", port)) as mine,
                socket.create_server(("127.0.0.1", 0)),
            ):
                own = connected_since(before, port)
                assert list(own.values()) == [mine.fileno()]
                assert connected_since(before, port + 1) == connected_since(before, None) == {}
                answers: list[bytes] = []
                waiting = threading.Thread(target=lambda: answers.append(mine.recv(1)), daemon=True)
                waiting.start()
                waiting.join(0.2)
                assert waiting.is_alive()
                shut_down(own)
                waiting.join(10)
                assert answers == [b""]
            # Nobody else's connection was.
            others.settimeout(0.1)
            others.sendall(b"x")
            assert server.accept()[0].recv(1) == b"x"


def test_a_descriptor_that_is_another_socket_by_now_is_left_alone() -> None:
    first, second = socket.socketpair()
    with first, second:
        name = next(name for name, fd in open_sockets().items() if fd == first.fileno())
        shut_down({name: second.fileno(), "socket:[1]": first.fileno()})
        second.sendall(b"x")
        assert first.recv(1) == b"x"


def test_a_server_that_does_not_answer_listens_and_one_that_has_ended_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert listens(address)
    assert not listens(address)
