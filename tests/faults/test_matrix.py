"""The fault matrix: its core here; the whole with TEST_FAULTS set, as by `make faults`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import ALL, CORE, EVERY_ROLE, IMPOSSIBLE, OF_LOADS, Case
from injector import ACTIONS, LEAVING, VARIABLE, InjectedError, Injection, from_environment
from lane import Ending, Row, faulty_rank, unlike
from matrix import BEGIN, END, run_cases, write_page
from places import REPOSITORY

HERE = Path(__file__).resolve().parent
PAGE = REPOSITORY / "docs" / "reliability.md"
whole = pytest.mark.skipif(not os.environ.get("TEST_FAULTS"), reason="takes half an hour: make faults")


@pytest.fixture(scope="module")
def core() -> dict[str, Row]:
    """What was seen of the core."""
    return run_cases(CORE, 1)


@pytest.mark.parametrize("name", [case.name for case in CORE])
def test_the_core_is_as_promised(core: dict[str, Row], name: str) -> None:
    row = core[name]
    assert row.problems == [], row
    if row.seen.startswith("not run"):
        pytest.skip(row.seen)
    assert row.fired


@whole
def test_the_whole_is_as_promised() -> None:
    rows = run_cases(ALL, 2, tell=True)
    assert [row for row in rows.values() if not row.as_promised] == []


# --- the matrix itself -----------------------------------------------------------------------------------------------


def test_each_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)


def test_every_stage_of_a_load_has_every_death_in_every_role() -> None:
    seen = {(case.stage.name, case.role.name, case.fault) for case in OF_LOADS if case.journey == "load"}
    stages = {
        case.stage.name for case in OF_LOADS if case.stage.pattern != LEAVING and case.journey == "load"
    }
    assert len(stages) == 12
    for stage in stages:
        for fault in ("raises", "SIGKILL", "SIGSTOP"):
            for role in EVERY_ROLE:
                assert (stage, role.name, fault) in seen


def test_the_page_tells_each_case_or_why_it_cannot_happen() -> None:
    made = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    for case in ALL:
        assert f"| {case.title} | {case.stage.name} | {case.fault} |" in made, case.name
    for one in IMPOSSIBLE:
        assert f"| {one.what} | {one.why} |" in made


def test_a_page_keeps_what_stands_around_the_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"


# --- what is judged --------------------------------------------------------------------------------------------------


def case_of(name: str) -> Case:
    return next(case for case in ALL if case.name == name)


DEAD = case_of("load over HTTP / reading / follower / SIGKILL")
RAISED = case_of("load over HTTP / restore / follower / raises")
CLOCK = case_of("load over HTTP / reading / leader / clock")


def told(**more: Any) -> Ending:
    return Ending(**{"error": "PeerError", "message": "rank 1 ended", "at": 11.0, **more})


@pytest.mark.parametrize(
    ("case", "ending", "changed", "problem"),
    [
        (DEAD, told(), False, ""),
        (DEAD, told(at=20.5), False, "after 10.5 s"),
        (DEAD, told(error="", message=""), False, "went well"),
        (DEAD, told(error="CorruptError"), False, "promised PeerError"),
        (DEAD, told(message="somebody ended"), False, "does not name rank 1"),
        (DEAD, told(changed=True), True, "was changed"),
        (DEAD, told(error="PartialRestoreError"), False, "promised PeerError"),
        (DEAD, told(left=["thread a"]), False, "left behind: thread a"),
        (RAISED, told(error="PartialRestoreError", message="rank 1: InjectedError", changed=True), True, ""),
        (
            RAISED,
            told(error="RankloadError", message="rank 1: InjectedError", changed=True),
            True,
            "was changed",
        ),
        (CLOCK, told(error="", message="", restored=True), False, ""),
        (CLOCK, told(error="", message=""), False, "not the checkpoint's"),
        (CLOCK, told(), False, "PeerError"),
    ],
)
def test_what_is_not_as_promised_is_seen(case: Case, ending: Ending, changed: bool, problem: str) -> None:
    found = list(unlike(case, ending, 10.0, {1}, changed))
    assert (found == []) if not problem else any(problem in one for one in found), found


def test_how_the_faulty_rank_must_end() -> None:
    assert faulty_rank(DEAD, 1, None, -signal.SIGKILL) == []
    assert "not -9" in faulty_rank(DEAD, 1, None, 0)[0]
    assert "hangs" in faulty_rank(RAISED, 1, None, None)[0]
    assert "no cause" in faulty_rank(RAISED, 1, told(), None)[0]
    assert faulty_rank(RAISED, 1, told(injected=True), None) == []


# --- the injector ----------------------------------------------------------------------------------------------------


def test_nothing_is_injected_unless_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert from_environment() is None


def test_a_fault_fires_at_its_stage_says_so_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankload.distributed.channel import open_channel
    from rankload.distributed.errors import RankloadError
    from rankload.distributed.topology import Topology

    journal = tmp_path / "journal"
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(VARIABLE, Injection("raises", "read.*", (0,), str(journal), 7).encode())
    injector = from_environment()
    assert injector is not None
    injector.install()
    alone = Topology(0, 0, 1, 1, 0, 1, "python", "here")

    def walk() -> None:
        with open_channel(alone) as channel:
            with channel.stage("open"):
                assert not journal.exists()
            with channel.stage("read 2"):
                pytest.fail("it went on")

    with pytest.raises(RankloadError, match="injected into rank 0") as raised:
        walk()
    assert isinstance(raised.value.__cause__, InjectedError)
    fired = json.loads(journal.read_text())
    assert (fired["kind"], fired["rank"], fired["seed"]) == ("raises", 0, 7)
    injector.remove()
    with open_channel(alone) as channel, channel.stage("read 2"):
        assert len(journal.read_text().splitlines()) == 1


def test_another_rank_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rankload.distributed.channel import Channel

    before = Channel._announcing
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(VARIABLE, Injection("SIGKILL", "read", (0,), str(tmp_path / "journal"), 7).encode())
    injector = from_environment()
    assert injector is not None
    injector.install()
    assert Channel._announcing is before


def test_a_clock_jumps_by_a_day_until_the_case_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, Injection("clock", "read", (0,), str(tmp_path / "journal"), 7).encode())
    injector = from_environment()
    assert injector is not None
    begin, steady = time.time(), time.monotonic()
    ACTIONS["clock"](injector)
    assert abs(abs(time.time() - begin) - 86400) < 60
    assert time.monotonic() - steady < 60
    injector.remove()
    assert abs(time.time() - begin) < 60


def test_what_a_command_of_this_file_leaves_running(tmp_path: Path) -> None:
    """A harness that is killed takes its nodes with it."""
    command = [sys.executable, str(HERE / "matrix.py"), "--only", CORE[0].name, "--lanes", "1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as running:
        until = time.monotonic() + 60
        while not (started := lanes_in(tmp_path)) and time.monotonic() < until:
            time.sleep(0.05)
        running.kill()
    assert started
    until = time.monotonic() + 20
    while lanes_in(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert lanes_in(tmp_path) == []


def lanes_in(folder: Path) -> list[int]:
    """Processes of lanes that have `folder` as their temporary folder."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            command = Path("/proc", entry, "cmdline").read_bytes()
            told_folder = Path("/proc", entry, "environ").read_bytes()
        except OSError:
            continue
        if b"lane.py" in command and f"TMPDIR={folder}".encode() in told_folder.split(b"\0"):
            found.append(int(entry))
    return found
