"""torchdata's ``StatefulDataLoader`` goes on at another number of ranks: no sample is lost or repeated."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from processes import run_ranks

JOB = Path(__file__).parent / "torchdata_job.py"
SAMPLERS = ("DistributedSampler", "StatefulDistributedSampler")


@pytest.fixture(scope="module")
def torchdata(frameworks: str) -> str:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torchdata') is None)"
    if subprocess.run([frameworks, "-c", code], check=False).returncode:
        pytest.skip("torchdata is not installed")
    return frameworks


@pytest.mark.parametrize(
    ("function", "sampler"),
    [
        *(("no_sample_is_lost_or_repeated", sampler) for sampler in SAMPLERS),
        *(("with_workers", sampler) for sampler in SAMPLERS),
        *(("an_epoch_that_ended_begins_anew", sampler) for sampler in SAMPLERS),
        ("workers_of_new_ranks_have_seeds_of_their_own", None),
        ("what_cannot_be_divided_is_refused", None),
        ("ranks_at_different_positions_are_refused", None),
        ("a_global_sampler_counts_what_was_yielded", None),
    ],
)
def test_a_loader_at_another_number_of_ranks(torchdata: str, function: str, sampler: str | None) -> None:
    args = () if sampler is None else (sampler,)
    finished = run_ranks(f"{JOB}:{function}", 1, args=args, deadline_s=240, python=torchdata)
    assert [rank.returncode for rank in finished] == [0], finished


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_lines_of_the_docs(torchdata: str, world_size: int, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    for function, ranks in (("save", 2), ("resume", world_size)):
        finished = run_ranks(
            f"{JOB}:{function}_by_the_lines", ranks, args=(path,), deadline_s=120, python=torchdata
        )
        assert [rank.returncode for rank in finished] == [0] * ranks, finished
    told = [
        json.loads(line) for rank in finished for line in rank.stdout.splitlines() if line.startswith("{")
    ]
    samples = [sample for row in zip(*(one["samples"] for one in told), strict=True) for sample in row]
    assert samples == told[0]["order"][12:]
