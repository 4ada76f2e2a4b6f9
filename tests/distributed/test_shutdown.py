"""Ctrl-C and SIGTERM: clean-up runs, the other ranks learn of it, and the process ends as by the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import run_ranks
from rankload.distributed.errors import PeerError
from rankload.distributed.shutdown import Terminated, terminable

THIS = __file__


def signalled(number: str, folder: str) -> None:
    """Rank 1 gets a signal while it waits for rank 0, which works."""
    from rankload.distributed.session import open_session

    rank = int(os.environ["RANK"])
    begin = time.monotonic()
    try:
        with open_session(stall_timeout_s=30) as session:
            with session.channel.stage("first"):
                pass
            begin = time.monotonic()
            if rank == 1:
                threading.Timer(0.5, os.kill, (os.getpid(), int(number))).start()
            with session.channel.stage("second"):
                while rank == 0:
                    time.sleep(0.02)
                    session.channel.progress()
    except PeerError as error:
        print(f"{time.monotonic() - begin:.2f}", error)
        sys.exit(7)
    finally:
        Path(folder, f"cleaned-{rank}").touch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_one_rank_ends_all(number: signal.Signals, tmp_path: Path) -> None:
    finished = run_ranks(f"{THIS}:signalled", 2, args=(int(number), tmp_path), deadline_s=40)
    assert finished[0].returncode == 7, finished
    assert finished[1].returncode == -number, finished
    seconds, message = finished[0].stdout.split(maxsplit=1)
    assert float(seconds) < 5
    assert "rank 1 (host " in message
    assert "in stage 'second'" in message
    assert ("SIGTERM" if number == signal.SIGTERM else "KeyboardInterrupt") in message
    # After SIGTERM, what is inside the session was cleaned up before the process ended; the signal came then.
    assert (tmp_path / "cleaned-0").exists()
    assert (tmp_path / "cleaned-1").exists() == (number == signal.SIGINT)


SCRIPT = """
import os, signal, sys
from rankload.distributed.shutdown import Terminated, terminable
{before}
try:
    with terminable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            print("not reached")
        except Terminated as error:
            print("raised", error.code, error.signal_number)
            raise
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            print("cleaned")
except SystemExit as error:
    print("exit", error.code)
"""


@pytest.mark.parametrize(
    ("before", "returncode", "output"),
    [
        ("", -signal.SIGTERM, ["raised 143 15", "cleaned"]),
        (
            "signal.signal(signal.SIGTERM, lambda *_: print('handler'))",
            0,
            ["raised 143 15", "cleaned", "handler", "exit 143"],
        ),
    ],
)
def test_the_process_ends_as_it_would_have(before: str, returncode: int, output: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-uc", SCRIPT.format(before=before)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == returncode, ended
    assert ended.stdout.split("\n")[:-1] == output


def test_handlers_are_restored() -> None:
    def mine(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        with pytest.raises(ValueError, match="x"), terminable():
            raise ValueError("x")
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    seen: list[object] = []
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [before]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_terminated_is_a_system_exit() -> None:
    assert isinstance(Terminated(signal.SIGTERM), SystemExit)
    assert Terminated(signal.SIGTERM).code == 143
