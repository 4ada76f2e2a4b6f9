"""The ranks of tests end and begin alike, whether they are forks or Pythons of their own."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from deepspeed_ranks import ENVIRONMENT, WITHOUT, needs_deepspeed
from places import SUPPORT, TESTS
from processes import run_ranks

THIS = str(Path(__file__).resolve())


@pytest.fixture(params=["fork", "own"])
def _start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "own":
        monkeypatch.setenv("TEST_ALL", "1")
    else:
        monkeypatch.delenv("TEST_ALL", raising=False)


def tell(*arguments: str) -> None:
    """What a rank can see of how it was started."""
    import numpy as np

    told = {
        "arguments": [sys.argv, arguments],
        "folder": os.path.basename(os.getcwd())[:6],
        "path": sys.path,
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("RANK", "X_"))},
        "session": os.getsid(0) == os.getpid(),
        "input": sys.stdin.read(),
        "streams": [stream.encoding for stream in (sys.stdout, sys.stderr)],
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "threads": threading.active_count(),
        "loaded": [name for name in ("deepspeed", "pytest") if name in sys.modules],
    }
    print(json.dumps([told, [random.random(), float(np.random.rand())]]))


def test_each_finds_what_it_would_find_in_a_python_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for everything in ("", "1"):
        monkeypatch.setenv("TEST_ALL", everything)
        finished = run_ranks(
            f"{THIS}:tell", 2, args=("a", 1), deadline_s=60, env={"X_MORE": "more", "PYTHONPATH": "/given"}
        )
        assert [rank.returncode for rank in finished] == [0, 0], finished
        told.append([json.loads(rank.stdout) for rank in finished])
    assert [one for one, _ in told[0]] == [one for one, _ in told[1]]
    assert told[0][0][0]["environment"]["X_MORE"] == "more"
    # This script's folder, and what tests share: both first, and neither twice.
    path = told[0][0][0]["path"]
    assert path[:3] == [str(TESTS), str(SUPPORT), "/given"]
    assert len(set(path)) == len(path)
    drawn = [tuple(drawn) for ranks in told for _, drawn in ranks]
    assert len(set(drawn)) == 4


@needs_deepspeed
def test_deepspeed_is_there_from_the_start_for_a_job_that_says_so() -> None:
    for env, there in ((ENVIRONMENT, True), (WITHOUT, False)):
        (finished,) = run_ranks(f"{THIS}:tell", 1, deadline_s=60, env=env, fork=True)
        assert finished.returncode == 0, finished
        told = json.loads(finished.stdout)[0]
        assert ("deepspeed" in told["loaded"]) == there
        assert told["threads"] == 1
        assert told["session"]


def end(how: str) -> None:
    print("before")
    if how == "raise":
        raise ValueError("an error of the rank's")
    if how == "exit":
        sys.exit(3)
    if how == "exit with text":
        sys.exit("a last word")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stay":
        time.sleep(600)
    if how == "thread":
        threading.Thread(target=lambda: (time.sleep(0.5), print("after"))).start()


@pytest.mark.usefixtures("_start")
@pytest.mark.parametrize(
    ("how", "returncode", "words"),
    [
        ("raise", 1, "ValueError: an error of the rank's"),
        ("exit", 3, ""),
        ("exit with text", 1, "a last word"),
        ("interrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("kill", -signal.SIGKILL, ""),
        ("thread", 0, ""),
    ],
)
def test_how_a_rank_ends(how: str, returncode: int, words: str) -> None:
    (finished,) = run_ranks(f"{THIS}:end", 1, args=(how,), deadline_s=60)
    assert finished.returncode == returncode, finished
    assert words in finished.stderr
    assert finished.stdout.split() == ["before"] + ["after"] * (how == "thread")


@pytest.mark.usefixtures("_start")
def test_a_rank_that_stays_is_killed_at_the_deadline() -> None:
    finished = run_ranks(f"{THIS}:end", 2, args=("stay",), deadline_s=3)
    assert [rank.returncode for rank in finished] == [None, None], finished
    assert all(rank.seconds >= 3 for rank in finished)
