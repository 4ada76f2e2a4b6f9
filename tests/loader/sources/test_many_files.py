"""Of thousands of files a rank opens those that it needs; what it plans grows with what it keeps alone."""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from many_files import write_dcp, write_zero
from rankload.loader.alone import EVERYTHING, OUTLINE, open_alone
from rankload.loader.fetch import items
from rankload.loader.formats import torch_items
from rankload.loader.planning.jobs import TargetName, job_of
from rankload.loader.planning.recording import RankFiles
from rankload.loader.planning.restores import restore_of
from rankload.loader.saved.copies import reads_of
from rankload.loader.saved.shares import Shares
from rankload.loader.saved.tensor import SavedTensor
from rankload.loader.sources.kinds import open_saved

FILES = 256
PARAMETERS = 20
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@dataclass(frozen=True)
class Planned:
    asked: set[str]
    """Names of the files that the rank's node needs."""
    opened: list[str]
    """Names of those that were opened for it, as often as they were; the first ones were open before."""
    copies: int
    reads: int
    """Storages that it reads."""
    pieces: int
    """Of its saved parameters, how many are in a list of pieces."""


def planned(folder: Path, target: TargetName, world_size: int, rank: int) -> Planned:
    global _opened
    with open_alone(folder, OUTLINE) as outline:
        job = job_of(outline.saved, target, world_size)
        recorder = RankFiles(outline.files)
        _opened = []
        try:
            saved = open_saved(recorder, job.demand(rank))
            names = [os.path.basename(path) for path in _opened if path.startswith(str(folder))]
        finally:
            _opened = None
        restore = restore_of(job, rank, saved)
        model = [one for one in saved.state["model"].values() if isinstance(one, SavedTensor)]
    return Planned(
        {os.path.basename(path) for path in recorder.asked},
        names,
        len(restore.copies),
        len(reads_of(restore.copies)),
        sum(len(one.pieces) for one in model if not isinstance(one.pieces, Shares)),
    )


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zero(tmp_path_factory.mktemp("zero") / "saved", ranks=FILES, parameters=PARAMETERS)


@pytest.fixture(scope="module")
def dcp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dcp(
        tmp_path_factory.mktemp("dcp") / "saved", files=FILES, parameters=PARAMETERS, shards=32, rows=8
    )


def zero_files(models: set[int], optims: range) -> set[str]:
    return {f"zero_pp_rank_{one}_mp_rank_00_model_states.pt" for one in models} | {
        f"bf16_zero_pp_rank_{one}_mp_rank_00_optim_states.pt" for one in optims
    }


def test_one_rank_of_as_many_opens_three_files_of_zero(zero: Path) -> None:
    found = planned(zero, "stage3", FILES, 100)
    assert found.asked == zero_files({0, 100}, range(100, 101))
    assert found.asked >= set(found.opened)
    # The weights, two tensors of the optimizer's state, and its step.
    assert found.copies == 3 * PARAMETERS + PARAMETERS
    assert found.reads == 3 + 1
    assert not found.pieces


def test_one_rank_of_8_opens_the_files_of_its_share_of_zero(zero: Path) -> None:
    found = planned(zero, "stage3", 8, 3)
    own = range(3 * FILES // 8, 4 * FILES // 8)
    assert found.asked == zero_files({0, 3, own.start}, own)
    assert found.asked >= set(found.opened)
    assert found.copies == 3 * PARAMETERS * len(own) + PARAMETERS
    assert found.reads == 3 * len(own) + 1
    # No object for each piece of each parameter: there are as many as files times parameters.
    assert not found.pieces


def test_one_rank_of_as_many_opens_the_files_of_its_chunks_of_dcp(dcp: Path) -> None:
    found = planned(dcp, "fsdp2", FILES, 100)
    # 32 chunks of 8 rows: each rank has a row of one chunk of each tensor, which lies in one file of a group of 32.
    chunks = {f"__{group * 32 + 100 // 8}_0.distcp" for group in range(FILES // 32)}
    assert {name for name in found.asked if name.endswith("_0.distcp")} == chunks
    assert found.asked >= set(found.opened)
    # To know it by its first bytes, and for all of its items.
    assert max(Counter(found.opened).values()) == 2
    assert found.copies == found.reads == 3 * PARAMETERS


def test_one_rank_of_8_opens_each_file_of_its_chunks_of_dcp(dcp: Path) -> None:
    found = planned(dcp, "fsdp2", 8, 3)
    chunks = {f"__{group * 32 + chunk}_0.distcp" for group in range(FILES // 32) for chunk in range(12, 16)}
    assert {name for name in found.asked if name.endswith("_0.distcp")} == chunks
    assert found.asked >= set(found.opened)
    # To know it by its first bytes, and for all of its items.
    assert max(Counter(found.opened).values()) == 2
    assert found.copies == found.reads == 3 * PARAMETERS * 4


def test_of_items_that_are_alike_one_is_taken_apart(dcp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the items of a file that follow each other are one read."""
    taken, read = [], []
    read_zip, read_file = torch_items.read_zip, items._OpenFile.read
    monkeypatch.setattr(torch_items, "read_zip", lambda *a, **b: taken.append(a) or read_zip(*a, **b))
    monkeypatch.setattr(items._OpenFile, "read", lambda *a: read.append(a[1]) or read_file(*a))
    found = planned(dcp, "fsdp2", 8, 3)
    files = {name for name in found.asked if name.endswith("_0.distcp")}
    assert len(files) == 32
    times = Counter(map(os.path.basename, read))
    assert {times[name] for name in files} == {1}
    # One of the tensors, and each of the objects: twice, as they are read for the outline too.
    assert len(taken) <= 1 + 2 * 5


def test_all_files_are_read_with_few_of_them_open(dcp: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + FILES // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    try:
        with open_alone(dcp, EVERYTHING) as opened:
            assert len(opened.files.fetched) > FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
