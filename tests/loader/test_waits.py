"""Waits of the rank that locates and opens for all: those that bring nothing end all ranks, slow ones end none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from http_server import Served, counting_server
from processes import run_ranks
from rankload.distributed.session import open_session_alone
from rankload.loader import RankloadError, StalledError
from rankload.loader.ranges.open import open_range_source
from rankload.loader.stages import Stages
from rankload.loader.stores.base import ObjectInfo
from rankload.loader.stores.open import open_store
from rankload.loader.workers import Stop, run_jobs

from rankload import State, autoresume, load

THIS = __file__
STALL_S = 1.0
WITHIN_S = STALL_S + 5


@contextmanager
def deaf_server() -> Iterator[str]:
    """The URL of a server that accepts connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/run"


released = threading.Event()


@pytest.fixture(autouse=True)
def _no_thread_hangs_on() -> Iterator[None]:
    released.clear()
    yield
    released.set()
    until = time.monotonic() + 10
    while any(one.name == "rankload-transfer" for one in threading.enumerate()):
        assert time.monotonic() < until
        time.sleep(0.01)


def hang(*args: Any, **options: Any) -> Any:
    released.wait(1000)
    raise OSError("the test is over")


class Hanging(MemoryFileSystem):  # type: ignore[misc]
    """A file system of fsspec of which the call that the URI names never returns."""

    protocol = "hanging"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if options["call"] == "credentials":
            hang()
        else:
            setattr(self, options["call"], hang)


class Sizeless:
    """An object store, as Composer has them, that does not return from the question for a size."""

    get_object_size = download_object = staticmethod(hang)


def stalls(deaf: str) -> None:
    """Loads, each of which meets a wait without end at another place. All run on all ranks of one job."""
    torch.distributed.init_process_group("gloo")
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    state = State(model=torch.nn.Linear(2, 2))
    listing = {"stall_timeout_s": STALL_S, "storage_options": {"call": "ls"}}
    problems = []
    for name, work, word in (
        ("a folder", lambda: load(deaf, state, options={"stall_timeout_s": STALL_S}), deaf),
        ("a listing", lambda: autoresume("hanging://run", state, options=listing), "hanging://"),
    ):
        begin = time.monotonic()
        try:
            work()
            problems.append(f"{name}: no error")
        except RankloadError as error:
            seconds = time.monotonic() - begin
            print(name, seconds, error, flush=True)
            if not isinstance(error, StalledError) or word not in str(error) or seconds > WITHIN_S:
                problems.append(f"{name}: after {seconds:.1f} s {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)


def test_a_wait_without_an_answer_ends_all_ranks() -> None:
    with deaf_server() as deaf:
        finished = run_ranks(f"{THIS}:stalls", 2, args=(deaf,), deadline_s=60)
    assert [rank.returncode for rank in finished] == [0, 0], finished


WAITS = {
    "credentials": lambda store: None,
    "info": lambda store: store.stat("run/a"),
    "cat_file": lambda store: store.peek("run/a", 10),
    "open": lambda store: store.read_small("run/a", 10),
    "ls": lambda store: store.entries("run"),
    "pipe_file": lambda store: store.write_small("run/a", b""),
    "exists": lambda store: store.remove("run/a"),
    "HEAD": lambda store: store.stat(store.deaf),
    "GET of the first bytes": lambda store: store.peek(store.deaf, 10),
    "GET of a small file": lambda store: store.read_small(store.deaf, 10),
    "first byte of ranges": lambda store: open_range_source(store, ObjectInfo(store.deaf, 1000)),
    "size in an object store": lambda store: store.stat("a"),
    "small object of an object store": lambda store: store.read_small("a", 10),
}
"""What a store may be asked, by what never answers it."""


@pytest.mark.parametrize("call", WAITS)
def test_every_wait_of_a_store_is_heard_and_ends_by_what_that_raises(call: str) -> None:
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    seen: list[str] = []

    def heard(n_bytes: int, waiting_for: str) -> None:
        if n_bytes:
            seen.clear()
            return
        seen.append(waiting_for)
        if len(seen) == 2:
            raise RankloadError("another rank failed")

    begin = time.monotonic()
    with deaf_server() as deaf, pytest.raises(RankloadError, match="another rank failed"):  # noqa: PT012
        if "object store" in call:
            store: Any = open_store("a", Sizeless(), heard=heard)[0]
            store._by_object = True
            if call.startswith("small"):
                store.stat = lambda name: None
        elif call.startswith(("HEAD", "GET", "first")):
            store = open_store(deaf, heard=heard)[0]
            store.deaf = deaf
        else:
            store = open_store("hanging://run/a", None, {"call": call}, heard)[0]
        WAITS[call](store)
    assert time.monotonic() - begin < 3
    assert len(set(seen)) == 1
    assert {"http": deaf, "hang": "hanging://run", "Size": "Sizeless:a"}[seen[0][:4]] in seen[0]


def slow(url: str) -> None:
    model = torch.nn.Linear(2, 2)
    begin = time.monotonic()
    load(url, State(model=model), load_weights_only=True, options={"stall_timeout_s": STALL_S})
    assert time.monotonic() - begin > STALL_S + 4, "the search was too fast to show anything"
    assert torch.equal(model.weight.detach(), torch.ones(2, 2))


def test_a_slow_search_fails_no_rank(tmp_path: Path) -> None:
    """Every name is answered, but the search as a whole takes far longer than ``stall_timeout_s``."""
    file = tmp_path / "a.bin"
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, file)
    with counting_server({"/run/pytorch_model.bin": Served(file.read_bytes())}) as server:
        server.missing_pause_s = 0.6
        finished = run_ranks(f"{THIS}:slow", 2, args=(server.url("/run"),), deadline_s=60)
    assert [rank.returncode for rank in finished] == [0, 0], finished


def test_a_thread_whose_work_is_given_up_leaves_its_wait() -> None:
    """The failure of one is announced only once the others have ended: `Heard` ends them."""
    ended = threading.Event()

    def fails(stop: Stop) -> None:
        raise RankloadError("first")

    with open_session_alone() as session:
        heard = Stages(session.channel).heard

        def waits(stop: Stop) -> None:
            try:
                while True:
                    heard(0, "what never comes")
                    time.sleep(0.05)
            finally:
                ended.set()

        begin = time.monotonic()
        with pytest.raises(RankloadError, match="first"):
            run_jobs([waits, fails], lambda: None, n_threads=2)
        assert time.monotonic() - begin < 1
        assert ended.is_set()
