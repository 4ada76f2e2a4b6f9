"""A checkpoint that one process opens, without a job and without torch."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from places import DATA
from rankload.loader import LayoutError, NotFoundError
from rankload.loader.alone import EVERYTHING, OUTLINE, open_alone
from rankload.loader.saved.demand import Demand
from rankload.loader.saved.model_parallel import Position


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    for name in ("deepspeed-zero1-w4", "deepspeed-zero3-w4"):
        with tarfile.open(DATA / f"{name}.tar") as archive:
            archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(("stage", "of_set"), [(1, 5), (3, 8)])
def test_the_outline_of_zero_reads_two_files_and_names_all(zero: Path, stage: int, of_set: int) -> None:
    path = zero / f"s{stage}-w4"
    with open_alone(path) as opened:
        assert len(opened.files.fetched) == 2
        assert len(opened.saved.files) == of_set
        outline = opened.saved
    with open_alone(path, EVERYTHING) as opened:
        assert len(opened.files.fetched) == of_set
        assert {one.name for one in opened.saved.files} == {
            Path(file.path).name for file in opened.files.fetched
        }
        shapes = {name: value.shape for name, value in opened.saved.state["model"].items()}
    assert {name: value.shape for name, value in outline.state["model"].items()} == shapes
    assert (outline.world_size, outline.step) == (4, 3)


@pytest.mark.parametrize(
    ("name", "kind", "step", "of_set"),
    [
        ("trainer-plain-w2/ckpt", "monolithic", 4, 6),
        ("accelerate-zero2-w2/ckpt", "deepspeed", 4, 6),
        ("dcp-fsdp2-w2/ckpt", "dcp", 3, 3),
        ("lightning-mp-w2/ckpt", "dcp", 3, 4),
        ("rank-shards-w2", "rank-shards", None, 6),
        ("safetensors-sharded-index/ckpt", "sharded", None, None),
    ],
)
@pytest.mark.parametrize("demand", [OUTLINE, EVERYTHING], ids=["outline", "everything"])
def test_every_kind_names_its_files(
    demand: Demand, name: str, kind: str, step: int | None, of_set: int | None
) -> None:
    with open_alone(DATA / name, demand) as opened:
        assert opened.saved.kind == kind
        assert opened.saved.step == step
        for one in opened.saved.files:
            path = Path(opened.files.object_of(one))
            assert path.stat().st_size >= one.least_bytes
        assert of_set is None or len(opened.saved.files) == of_set


def test_weights_alone_need_no_path_to_the_other_archives() -> None:
    first = DATA / "composer-zero1-w2" / "ep1-ba4-rank0.pt.tar"
    with open_alone(first, Demand(Position(0, 1), weights_only=True)) as opened:
        assert opened.saved.state["model"]
    for demand in (OUTLINE, EVERYTHING):
        with pytest.raises(LayoutError, match=r"first of 2 ranks' archives"), open_alone(first, demand):
            pass


def test_what_the_block_raises_is_raised_as_it_is(zero: Path) -> None:
    with pytest.raises(KeyError, match="mine"), open_alone(zero / "s1-w4"):
        raise KeyError("mine")
    with pytest.raises(NotFoundError) as caught, open_alone(zero / "nothing"):
        pass
    assert "met by" not in str(caught.value)


def test_it_imports_no_torch(zero: Path) -> None:
    code = (
        "import sys\n"
        "from rankload.loader.alone import open_alone\n"
        "for path in sys.argv[1:]:\n"
        "    with open_alone(path) as opened:\n"
        "        assert opened.saved.state['model']\n"
        "assert 'torch' not in sys.modules\n"
    )
    paths = [zero / "s1-w4", DATA / "dcp-fsdp2-w2/ckpt", DATA / "safetensors-sharded-index/ckpt"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True, timeout=60)
