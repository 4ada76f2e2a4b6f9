"""The progress bar."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rankload.loader.fetch import progress
from rankload.loader.fetch.progress import JobProgress, job_bytes, progress_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(
    stream: io.StringIO, steps: list[dict[int, dict[str, float]]], *, rank: int = 0, enabled: bool = True
) -> str:
    state = {"at": 0}
    with JobProgress(lambda: steps[state["at"]], rank=rank, enabled=enabled, stream=stream):
        for index in range(len(steps)):
            state["at"] = index
            time.sleep(0.05)
    assert not [each for each in threading.enumerate() if each.name == "rankload-progress"]
    return stream.getvalue()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_S", 0.01)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.02)


MOVING: list[dict[int, dict[str, float]]] = [
    {},
    {0: {"bytes_done": 0, "bytes_total": 1000}, 2: {"bytes_done": 0, "bytes_total": 3000}},
    {0: {"bytes_done": 1000, "bytes_total": 1000}, 2: {"bytes_done": 3000, "bytes_total": 3000}},
]


def test_a_bar_of_all_nodes_on_a_terminal() -> None:
    assert "4.00k/4.00k" in run(Terminal(), MOVING)


def test_lines_elsewhere() -> None:
    text = run(io.StringIO(), MOVING)
    assert "of 0.0 MB (100 %)" in text
    assert "\r" not in text


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_silent(stream: type[io.StringIO]) -> None:
    assert run(stream(), MOVING, rank=1) == ""
    assert run(stream(), MOVING, enabled=False) == ""
    assert run(stream(), [{}, {0: {}}]) == ""


def interrupted() -> None:
    with JobProgress(lambda: MOVING[1], rank=0, stream=Terminal()):
        time.sleep(0.05)
        raise KeyboardInterrupt


def test_closes_when_the_load_fails() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [each for each in threading.enumerate() if each.name == "rankload-progress"]


def test_counters_that_fail_do_not_fail_the_load() -> None:
    def broken() -> dict[int, dict[str, float]]:
        raise RuntimeError("no")

    with JobProgress(broken, rank=0, stream=Terminal()):
        time.sleep(0.05)


def test_a_plan_tells_the_total_before_nodes_do_and_starts_the_rate_anew() -> None:
    steps: list[dict[int, dict[str, float]]] = [
        {0: {"bytes_done": 1e6, "bytes_total": 1e6}},
        {0: {"bytes_done": 1e6, "bytes_total": 1e6, "bytes_planned": 100e6}},
        {0: {"bytes_done": 3e6, "bytes_total": 51e6, "bytes_planned": 100e6}},
    ]
    assert [job_bytes(step)[1] for step in steps] == [1_000_000, 100_000_000, 100_000_000]
    assert "3.0 of 100.0 MB (3 %)" in run(io.StringIO(), steps)
    assert progress_line(3_000_000, 100_000_000, 2.0, before=1_000_000).endswith("1.0 MB/s, 1 min 37 s left")


def test_figures() -> None:
    assert job_bytes(MOVING[2]) == (4000, 4000)
    assert job_bytes({0: {"bytes_done": 5}}) == (5, 5)
    assert progress_line(500_000_000, 2_000_000_000, 2.0).endswith(
        "500.0 of 2000.0 MB (25 %), 250.0 MB/s, 6 s left"
    )
    assert progress_line(10, 10, 2.0).endswith("0.0 MB/s")
    assert progress_line(10_000_000, 2_010_000_000, 1.0).endswith("10.0 MB/s, 3 min 20 s left")
