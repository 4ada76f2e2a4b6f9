"""Which rank of a job failed first, from what ranks recorded and how their processes ended."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rankload.distributed.errors import PeerError
from rankload.distributed.liveness import ProcessIdentity
from rankload.launch.first_failure import Death, Report, failures_of, rounds
from rankload.launch.rank_records import RankRecord, read_records, write_end, write_start
from rankload.loader.errors import CorruptError


def record(rank: int, *, began_s: float = 100.0, **fields: Any) -> RankRecord:
    process = ProcessIdentity(f"host{rank}", 1000 + rank, 1, "machine")
    return RankRecord(rank=rank, local_rank=rank, process=process, began_s=began_s, **fields)


def reported(*failures: Any) -> list[str]:
    report = Report(
        launcher="srun", exit_code=1, stopped_by=None, ranks=4, failures=tuple(failures), restarts=()
    )
    return [line.removeprefix("rankload run: ") for line in report.lines()]


def test_an_own_exception_comes_before_what_others_notice_of_it() -> None:
    records = [
        record(0, ended_s=110.0, error="PeerError: rank 1 died", follows=True, met_by=1, met_on="host1"),
        record(1, ended_s=110.4, error="ValueError: x\nmore", where="job.py:3 in train"),
        record(2, ended_s=None),
        record(3, ended_s=110.1, error="RuntimeError: Connection closed by peer", follows=True),
    ]
    deaths = {records[2].process: Death(110.0, 110.5, "killed by SIGTERM")}
    found = failures_of(records, deaths, {})
    assert [one.rank for one in found] == [1, 0, 3, 2]
    assert reported(*found) == [
        "rank 1 failed first (host host1, pid 1001, after 10.4 s): ValueError: x\n    more",
        "  at job.py:3 in train",
        "  after it rank 0: PeerError: rank 1 died",
        "  after it rank 3: RuntimeError: Connection closed by peer",
        "  after it rank 2: killed by SIGTERM",
        "srun ended with exit code 1",
    ]


def test_a_killed_rank_comes_before_what_looks_like_another_failure() -> None:
    records = [record(0, ended_s=110.03, error="OSError: lost"), record(1)]
    seen = Death(110.0, 110.05, "killed by SIGKILL")
    assert [one.rank for one in failures_of(records, {records[1].process: seen}, {})] == [1, 0]
    # The launcher's word where the watcher came too late.
    late = Death(110.0, 110.05, "its process is gone")
    assert failures_of(records, {records[1].process: late}, {1001: -9})[0].reason == "killed by SIGKILL"
    # Where nobody knows, the launcher may have ended it for the failure of the other.
    assert [one.rank for one in failures_of(records, {records[1].process: late}, {})] == [0, 1]
    told = [record(0, ended_s=110.03, error="PeerError: rank 1", follows=True), record(1)]
    first, second = failures_of(told, {records[1].process: late}, {})
    assert (first.rank, first.reason) == (1, "its process ended without an exception: killed?")
    assert second.rank == 0


@pytest.mark.parametrize(
    ("exit_code", "rank", "reason"),
    [
        (-signal.SIGSEGV, 1, "killed by SIGSEGV"),
        (7, 1, "ended with exit code 7, without an exception"),
        (75, 0, "KeyError: 'a'"),
        (-signal.SIGABRT, 0, "KeyError: 'a'"),
        (-signal.SIGTERM, 0, "KeyError: 'a'"),
        (-64, 1, "killed by SIGRTMAX"),
        (-99, 1, "killed by signal 99"),
    ],
)
def test_what_exit_codes_mean(exit_code: int, rank: int, reason: str) -> None:
    records = [record(0, ended_s=109.0, error="KeyError: 'a'"), record(1)]
    deaths = {records[1].process: Death(108.0, 108.1, "its process is gone")}
    first = failures_of(records, deaths, {1001: exit_code})[0]
    assert (first.rank, first.reason) == (rank, reason)


def test_a_rank_without_a_record_is_told_of_by_the_others() -> None:
    """It ran on another node, which does not see the folder."""
    records = [
        record(0, ended_s=111.0, error="PeerError: rank 3 ended", follows=True, met_by=3, met_on="b"),
        record(1, ended_s=110.5, error="CorruptError: torn", met_by=3, met_on="b"),
    ]
    found = failures_of(records, {}, {})
    assert (found[0].rank, found[0].host, found[0].pid) == (3, "b", None)
    assert reported(*found)[0] == (
        "rank 3 failed first (host b, after 10.5 s): as rank 1 says: CorruptError: torn"
    )


def test_ranks_that_ended_well_or_run_have_not_failed() -> None:
    records = [record(0, ended_s=110.0), record(1), record(2)]
    deaths = {records[1].process: Death(109.0, 109.1, "its process has ended")}
    assert failures_of(records, deaths, {1000: 0}) == []
    assert reported() == ["no rank recorded a failure", "srun ended with exit code 1"]


def test_a_death_is_of_one_nodes_process() -> None:
    """In containers the same process ids are on every node."""
    records = [record(0), record(1)]
    here, there = (replace(one, process=replace(one.process, pid=7)) for one in records)
    found = failures_of([here, there], {there.process: Death(109.0, 109.1, "killed by SIGKILL")}, {})
    assert [(one.rank, one.host) for one in found] == [(1, "host1")]


def test_restarts_are_rounds() -> None:
    records = [record(rank, began_s=began) for began in (100.0, 200.0) for rank in (0, 1)]
    assert rounds(records) == [records[:2], records[2:]]
    assert rounds([]) == []


def test_many_failures_are_counted() -> None:
    found = failures_of(
        [record(rank, ended_s=110.0 + rank, error=f"ValueError: {'x' * 400}") for rank in range(9)], {}, {}
    )
    lines = reported(*found)
    assert lines[-2] == "  after it 5 more ranks"
    assert all(len(line) < 200 for line in lines[1:])
    assert reported(*found[:5])[-2] == "  after it 1 more rank"


def test_what_a_rank_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = write_start(str(tmp_path), rank=1, local_rank=0)
    assert read_records(tmp_path) == [begun]
    assert begun.process.pid == os.getpid()
    for error, said, follows, met_by in (
        (ValueError("x"), "ValueError: x", False, None),
        (KeyboardInterrupt(), "KeyboardInterrupt", False, None),
        (SystemExit(3), "SystemExit: 3", False, None),
        (PeerError("rank 0 died", rank=0), "PeerError: rank 0 died", True, 0),
        (CorruptError("torn", rank=0, host="a"), "CorruptError: torn", False, 0),
        (RuntimeError("[pair.cc:5] Connection closed by peer [10.0.0.1]"), None, True, None),
        (RuntimeError("NCCL error in: x.cpp"), None, True, None),
        (RuntimeError("shapes differ"), None, False, None),
        (BrokenPipeError(32, "Broken pipe"), None, True, None),
    ):
        write_end(str(tmp_path), begun, error)
        (ended,) = read_records(tmp_path)
        assert said in (ended.error, None)
        assert (ended.follows, ended.met_by) == (follows, met_by)
    wrapped = RuntimeError("training failed")
    wrapped.__cause__ = PeerError("rank 0 died", rank=0)
    write_end(str(tmp_path), begun, wrapped)
    assert read_records(tmp_path)[0].follows
    write_end(str(tmp_path), begun)
    assert read_records(tmp_path)[0].error is None
    (tmp_path / "rank5-1.json").write_text("{torn")
    assert len(read_records(tmp_path)) == 1
    assert capsys.readouterr().err == ""


def test_a_folder_of_another_node_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = write_start(str(tmp_path / "not here"), rank=1, local_rank=0)
    write_end(str(tmp_path / "not here"), begun)
    assert capsys.readouterr().err == ""
    write_end(str(tmp_path / "not here"), begun, ValueError("x"))
    assert "rank 1 (host" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
