"""What a plan says of ranks and nodes: every element has its ranks, and nothing but indexes is fetched."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from bad_server import Behaviour, bad_server
from places import DATA
from rankload.loader import AccessError, LayoutError, OptionError
from rankload.loader.planning.jobs import TARGETS, job_of
from rankload.loader.planning.loads import LoadPlan, plan_load
from rankload.loader.planning.nodes import joined_reads
from rankload.loader.planning.restores import Slice, region_text
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.copies import Copy, Memory, reads_of
from rankload.loader.saved.regions import Run, whole_box
from rankload.loader.saved.strided import Box, Layout
from rankload.loader.saved.tensor import StorageRef
from wide_model import MODEL_BYTES, save_trained
from zero_folders import unpack_zero

DCP = DATA / "dcp-fsdp2-w2/ckpt"


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {stage: unpack_zero(stage, tmp_path_factory.mktemp("zero")) for stage in (1, 3)}


def slices(path: Path, target: str, world_size: int) -> list[tuple[Slice, ...]]:
    plans = (plan_load(path, world_size=world_size, target=target, rank=rank) for rank in range(world_size))
    return [plan.ranks[rank].slices for rank, plan in enumerate(plans)]


def elements(one: Slice) -> Counter[int]:
    """How often it has each element, by its number in row-major order."""
    numbers = torch.arange(math.prod(one.shape)).reshape(one.shape)
    if isinstance(one.region, Run):
        own = numbers.flatten()[one.region.start : one.region.stop]
    else:
        own = numbers
        for dim, (start, size) in enumerate(zip(one.region.starts, one.region.sizes, strict=True)):
            own = own.narrow(dim, start, size)
    return Counter(own.flatten().tolist())


def held(of_ranks: list[tuple[Slice, ...]], part: str) -> dict[str, Counter[int]]:
    found: dict[str, Counter[int]] = {}
    for each in of_ranks:
        for one in each:
            if one.part == part:
                found.setdefault(one.name, Counter()).update(elements(one))
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["dcp", "zero1", "zero3"])
def test_ranks_have_all_elements_as_often_as_the_target_keeps_them(
    zero: dict[int, Path], source: str, target: str
) -> None:
    world_size = 3
    path = DCP if source == "dcp" else zero[int(source[-1])]
    of_ranks = slices(path, target, world_size)
    times = {
        "plain": (world_size, world_size),
        "fsdp2": (1, 1),
        "stage0": (world_size, world_size),
        "stage1": (world_size, 1),
        "stage2": (world_size, 1),
        "stage3": (1, 1),
    }[target]
    weights, states = held(of_ranks, "weights"), held(of_ranks, "optimizer")
    shapes = {one.name: one.shape for each in of_ranks for one in each}
    assert len(weights) > 8
    assert len(states) > 20
    for found, expected in ((weights, times[0]), (states, times[1])):
        for name, counted in found.items():
            # Buffers and numbers are everybody's.
            whole = name in ("seen", "count") or name.endswith("/step") or not shapes[name]
            numbers = range(math.prod(shapes[name]))
            assert counted == Counter(dict.fromkeys(numbers, world_size if whole else expected)), name
    masters = held(of_ranks, "masters")
    low = {one.name for each in of_ranks for one in each if one.part == "weights" and one.dtype == "bfloat16"}
    trained = {name.rpartition("/")[0] for name in states}
    if not target.startswith("stage"):
        assert not masters
    else:
        # Elsewhere the module's own weights are updated.
        assert masters.keys() == (trained if target in ("stage1", "stage2") else trained & low)
    for name, counted in masters.items():
        numbers = range(math.prod(shapes[name]))
        assert counted == Counter(dict.fromkeys(numbers, world_size if target == "stage0" else 1)), name


def test_nodes_share_ranks_evenly_and_add_up(zero: dict[int, Path]) -> None:
    plan = plan_load(zero[1], world_size=4, n_nodes=2, target="stage2")
    assert [one.ranks for one in plan.nodes] == [(0, 1), (2, 3)]
    assert [one.node for one in plan.ranks] == [0, 0, 1, 1]
    assert sum(plan.by_file.values()) == plan.fetched_bytes == sum(one.fetched_bytes for one in plan.nodes)
    # The optimizer's files of two saved ranks each, and the model's.
    assert [len([one for one in node.files if one.fetched_bytes > 20_000]) for node in plan.nodes] == [3, 3]
    for node in plan.nodes:
        own = [plan.ranks[rank] for rank in node.ranks]
        kept = sum(one.weights_bytes + one.optimizer_bytes + one.staging_bytes for one in own)
        assert node.memory_bytes == kept + node.shared_bytes
    assert (plan.local, plan.kind, plan.saved_world_size, plan.world_size) == (True, "deepspeed", 4, 4)
    assert not any(one.slices for one in plan.ranks)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"world_size": 3, "n_nodes": 2}, "as many ranks on each node"),
        ({"world_size": 0}, "as many ranks"),
        ({"world_size": 2, "target": "stage4"}, "stage4"),
        ({"world_size": 2, "rank": 2}, "rank=2"),
    ],
)
def test_what_is_no_job_is_refused(arguments: dict[str, int], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        plan_load(DCP, **arguments)


def test_a_layout_that_cannot_be_restored_is_told(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="has no model"):
        job_of(Saved("file.pt", "monolithic", "composer", {"optimizers": {}}), "plain", 2)
    folder = unpack_zero(1, tmp_path)
    file = next(folder.rglob("mp_rank_00_model_states.pt"))
    tree = torch.load(file, weights_only=False)
    tree["mp_world_size"] = 2
    torch.save(tree, file)
    with pytest.raises(LayoutError, match="only the data-parallel size may differ") as caught:
        plan_load(folder, world_size=4, target="stage1")
    assert "met by" not in str(caught.value)


def test_nothing_but_indexes_is_fetched_and_no_cache_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("RANKLOAD_CACHE_DIR", str(cache))
    save_trained(tmp_path / "model.pt")
    with bad_server({"/model.pt": Behaviour((tmp_path / "model.pt").read_bytes())}) as server:
        plan = plan_load(server.url("/model.pt"), world_size=2, n_nodes=2)
        assert server.sent_bytes < 600_000
    assert not list(cache.iterdir())
    (node, _) = plan.nodes
    assert MODEL_BYTES * 3 < node.fetched_bytes < 3.2 * MODEL_BYTES
    assert node.cache_bytes == node.fetched_bytes
    assert plan.fetched_bytes == 2 * node.fetched_bytes


def test_a_cache_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    cache = tmp_path / "scratch" / "cache"
    plan = plan_load(DCP, world_size=2, options={"cache_dir": str(cache)})
    assert plan.fetched_bytes
    assert not list(cache.iterdir())
    assert not cache.stat().st_mode & 0o077
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AccessError, match="can't be made"):
        plan_load(DCP, world_size=2, options={"cache_dir": str(tmp_path / "file" / "cache")})


def a_copy(start: int, stop: int, *, storage: int = 0, dtype: str = "float32") -> Copy:
    """A copy of elements of a storage; as it is into memory of the same dtype."""
    size = (stop - start,)
    return Copy(
        "w",
        StorageRef("f", str(storage), storage << 10, 1 << 10, None),
        "float32",
        Layout(size, (1,), start),
        Memory("w", dtype, size, (1,), plain=True),
        Layout(size, (1,), 0),
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([a_copy(40, 60)], [a_copy(0, 20), a_copy(80, 90)]),
        ([a_copy(0, 50)], [a_copy(20, 30)]),
        ([a_copy(0, 50), a_copy(40, 70)], [a_copy(60, 90), a_copy(0, 10, dtype="bfloat16")]),
        ([a_copy(0, 50, dtype="bfloat16")], [a_copy(50, 90)]),
        ([a_copy(0, 50)], [a_copy(0, 50, storage=1)]),
    ],
)
def test_reads_of_two_lots_of_copies_are_those_of_all_together(one: list[Copy], other: list[Copy]) -> None:
    joined, together = joined_reads(reads_of(one), reads_of(other)), reads_of([*one, *other])
    assert joined.keys() == together.keys()
    for storage, reads in together.items():
        assert (joined[storage].ranges, joined[storage].direct) == (reads.ranges, reads.direct)


def by_mode(path: str, mode: str) -> LoadPlan:
    return plan_load(path, world_size=2, n_nodes=2, options={"mode": mode})


def test_modes_differ_in_who_fetches(tmp_path: Path) -> None:
    save_trained(tmp_path / "model.pt")
    with bad_server({"/model.pt": Behaviour((tmp_path / "model.pt").read_bytes())}) as server:
        url = server.url("/model.pt")
        node, job, direct = (by_mode(url, mode) for mode in ("node", "job", "direct"))
    assert job.fetched_bytes < 0.55 * node.fetched_bytes
    taken = sum(one.from_nodes_bytes for one in job.nodes)
    assert job.fetched_bytes + taken == node.fetched_bytes
    assert not sum(one.direct_bytes for one in node.ranks)
    # The weights; what an optimizer without shards gets is made as it was saved.
    assert 0.9 * MODEL_BYTES < direct.ranks[0].direct_bytes <= MODEL_BYTES
    assert direct.nodes[0].cache_bytes == direct.nodes[0].fetched_bytes - direct.ranks[0].direct_bytes


def test_regions_in_words() -> None:
    assert region_text(whole_box((2, 3)), (2, 3)) == region_text(Run(0, 6), (2, 3)) == "all"
    assert region_text(Run(1, 4), (2, 3)) == "elements 1 to 4 of 6"
    assert region_text(Box((1, 0), (1, 3)), (2, 3)) == "[1:2, 0:3]"
    assert region_text(Box((2, 0), (0, 3)), (2, 3)) == "nothing"


def test_it_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from rankload.loader.planning.loads import plan_load\n"
        "plan_load(sys.argv[1], world_size=4, target='fsdp2')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(DCP)], check=True, timeout=60)
