"""Jobs that SIGKILL ends in the middle of a save: the newest whole checkpoint is taken, and the rest has a reason.

A few points of each writer; `make kills` takes fifty of each, Trainer's too, for docs/resuming.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
from deepspeed_ranks import needs_deepspeed
from killed_saves import WRITERS, plain_reason
from places import REPOSITORY, SUPPORT

POINTS = 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What followed after each kill, by writer."""
    writers = "dcp,save_checkpoint" + (",deepspeed-1" if find_spec("deepspeed") else "")
    told = tmp_path_factory.mktemp("killed") / "told.json"
    command = [
        SUPPORT / "killed_saves.py",
        "--writers",
        writers,
        "--points",
        POINTS,
        "--quick",
        "--json",
        told,
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)], check=False, timeout=280, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(told.read_text())  # type: ignore[no-any-return]


@pytest.mark.whole_jobs
@pytest.mark.parametrize(
    "writer", ["dcp", "save_checkpoint", pytest.param("deepspeed-1", marks=needs_deepspeed)]
)
def test_the_newest_whole_one_is_taken_after_a_kill(killed: dict[str, list[Any]], writer: str) -> None:
    assert len(killed[writer]) == POINTS
    for one in killed[writer]:
        assert one["problems"] == [], one
        # Step 1 was whole before the job was told to go on.
        assert 1 in one["whole"], one
        assert one["took_newest"] == max(one["whole"]), one
        assert one["took"] in one["whole"], one
        assert all(reason for _, reason in one["passed"]), one


def test_the_page_has_a_row_for_each_writer() -> None:
    page = (REPOSITORY / "docs" / "resuming.md").read_text()
    table = page.partition("<!-- kills: begin -->")[2].partition("<!-- kills: end -->")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["| writer", *(f"| {one.title}" for one in WRITERS.values())]


def test_reasons_are_counted_without_what_differs_between_kills() -> None:
    for reason, plain in (
        (
            "/tmp/kills-1/run/global_step12/zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged: no zip; fetch",
            "zero_pp_rank_N_mp_rank_N_optim_states.pt is damaged: no zip",
        ),
        ("checkpoint-2 has no trainer_state.json", "checkpoint-N has no trainer_state.json"),
        ("/r/step-3/__1_0.distcp is cut short: expected at least 5,448,425 bytes, got 12",
         "__N_0.distcp is cut short"),
    ):  # fmt: skip
        assert plain_reason(reason) == plain
