"""The demo, as a person runs it; and the server that it counts with."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rankload.launch.cli import main
from rankload.launch.demo_server import CountingServer, byte_range

DEADLINE_S = 170
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def run_demo(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-m", "rankload.launch", "demo", *arguments],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def check(done: subprocess.CompletedProcess[str], extension: str, files: int) -> None:
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "Traceback" not in said + done.stderr
    assert "all losses are equal, exactly" in said
    assert "every rank's next random numbers are equal too" in said
    assert "each byte crossed once, for 4 ranks" in said
    assert f"ep1-rank{{rank}}.{extension}" in said
    losses = re.findall(r"^ +[56] +[0-3] +(\d\.\d+) +(\d\.\d+)$", said, re.MULTILINE)
    assert len(losses) == 8
    assert all(uninterrupted == resumed for uninterrupted, resumed in losses)
    requests = re.findall(rf"^ +ep1-rank\d\.{extension} +([\d,]+) +([\d,]+) +(\d+) GET", said, re.MULTILINE)
    assert len(requests) == files
    for size, sent, gets in requests:
        if extension == "tar" and _number(size) <= 1 << 20:
            assert (sent, gets) == (size, "1")
        else:
            # Of an archive in parts, what is between its members is not read.
            least = 0.99 if extension == "tar" else 1
            assert least * _number(size) <= _number(sent) <= 1.01 * _number(size)
    assert "restored http://127.0.0.1:" in said


def _number(text: str) -> int:
    return int(text.replace(",", ""))


@needs_deepspeed
@pytest.mark.whole_jobs
def test_demo_continues_exactly_from_zero_stage_1(tmp_path):
    done = run_demo(tmp_path)
    check(done, "tar", 4)
    assert "composer_states.pt" in done.stdout
    assert "deepspeed/zero_pp_rank_3_mp_rank_00_optim_states.pt" in done.stdout
    assert not [path for path in tmp_path.iterdir() if "rankload" in path.name]


@needs_deepspeed
@pytest.mark.takes_long
def test_demo_continues_exactly_from_zero_stage_3(tmp_path):
    check(run_demo(tmp_path, "--stage", "3"), "tar", 4)


@pytest.mark.takes_long
def test_demo_continues_exactly_without_deepspeed(tmp_path):
    done = run_demo(tmp_path, "--plain")
    check(done, "pt", 1)
    assert "8 of 8 tensors now hold what Composer saved" in done.stdout


def children_of(pid: int) -> list[int]:
    found = []
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        for child in map(int, file.read().split()):
            found += [child, *children_of(child)]
    return found


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing_behind(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "rankload.launch", "demo", "--plain"],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    family: list[int] = []
    until = time.monotonic() + 60
    # torchrun, and its four ranks.
    while len(family) < 5 and time.monotonic() < until:
        family = children_of(process.pid)
        time.sleep(0.1)
    assert len(family) >= 5
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not [pid for pid in family if alive(pid)]
    assert not [path for path in tmp_path.iterdir() if "rankload" in path.name]


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["demo", "--stage", "4"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: rankload" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (None, (0, 10)),
        ("bytes=0-", (0, 10)),
        ("bytes=3-5", (3, 6)),
        ("bytes=3-99", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-40", (0, 10)),
        ("bytes=10-", None),
        ("bytes=5-3", None),
        ("bytes=-", None),
        ("lines=1-2", None),
    ],
)
def test_byte_range(header, wanted):
    assert byte_range(header, 10) == wanted


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.bin").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_text("outside")
    running = CountingServer(tmp_path / "served")
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join(10)
    running.server_close()


def ask(server: CountingServer, method: str, name: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, name, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_server_counts_requests_and_bytes(server):
    assert ask(server, "HEAD", "/a.bin") == (200, b"")
    assert ask(server, "GET", "/a.bin") == (200, bytes(range(100)))
    assert ask(server, "GET", "/a.bin", Range="bytes=10-19") == (206, bytes(range(10, 20)))
    assert ask(server, "GET", "/a.bin", Range="bytes=100-")[0] == 416
    assert server.ledger.as_dict() == {"a.bin": {"gets": 3, "heads": 1, "bytes": 110}}


@pytest.mark.parametrize("name", ["/none.bin", "/", "/../secret", "/%2e%2e/secret", "/..%2fsecret"])
def test_server_gives_only_its_folder(server, name):
    assert ask(server, "GET", name) == (404, b"")
