"""Which items of a DCP folder a rank reads: those with an element that it keeps, by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_files import LocalFiles
from places import DATA
from rankload.loader.formats.dcp_metadata import ChunkedTensor, Item, Items, Metadata, read_metadata
from rankload.loader.formats.torch_file import FileIndex
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.demand import Demand, ParameterDemand, ShardDemand
from rankload.loader.saved.division import Division
from rankload.loader.saved.model_parallel import Position
from rankload.loader.saved.node_file import FileItem
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import Unread
from rankload.loader.sources.dcp.needs import wanted_items
from rankload.loader.sources.dcp.open import Dcp
from rankload.loader.sources.dcp.values import blank
from region_cases import boxes, positions, runs

Place = tuple[int, ...]


def test_of_files_those_that_have_what_this_rank_keeps() -> None:
    """The second rank of two that saved has its shards and the buffers in its own file."""
    folder = DATA / "dcp-fsdp2-w2/ckpt"
    listed = read_metadata(str(folder / ".metadata"), name="it").tensors
    chunks = {
        key.removeprefix("model."): (one.shape, one.division.boxes[1])
        for key, one in listed.items()
        if key.startswith("model.") and len(one.items) == 2
    }
    demand = Demand(
        Position(1, 2),
        weights_only=True,
        shards={name: ShardDemand(shape, box) for name, (shape, box) in chunks.items()},
        others=("seen", "count"),
    )
    files = LocalFiles(folder, first=[".metadata"])
    assert Dcp().recognises(files)
    saved = Dcp().open(files, demand)
    assert files.fetched == ["__1_0.distcp"]
    weight = saved.state["model"]["wte.weight"]
    assert [isinstance(piece.storage, Unread) for piece in weight.pieces] == [True, False]
    everything = Dcp().open(LocalFiles(folder, first=[".metadata"]), Demand(Position(1, 2)))
    assert len(everything.state["model"]["wte.weight"].storages) == 2


@pytest.mark.parametrize("name", ["dcp-fsdp2-w2", "dcp-tp-fsdp-w4", "lightning-mp-w2"])
def test_of_an_optimizer_that_is_left_out_no_item_is_read(name: str) -> None:
    """Neither its tensors' nor its settings'; all others are."""
    folder = DATA / name / "ckpt"
    metadata = read_metadata(str(folder / ".metadata"), name="it")
    asked = {}
    for optimizer in (True, False):
        files = ItemsAsked(folder, first=[".metadata"])
        Dcp().open(files, Demand(Position(0, 1), optimizer=optimizer))
        asked[optimizer] = files.keys
    everything = {*metadata.tensors, *metadata.objects}
    of_optimizer = {key for key in everything if key.startswith("optim")}
    assert asked == {True: everything, False: everything - of_optimizer}
    assert len(of_optimizer) > 30


class ItemsAsked(LocalFiles):
    """Keeps the keys of the items that are read."""

    keys: frozenset[str] = frozenset()

    def items(self, wanted: Sequence[FileItem], stage: str) -> list[FileIndex]:
        # Of a chunk, its place in the tensor follows the key.
        self.keys = frozenset(one.key.partition("[")[0] for one in wanted)
        return super().items(wanted, stage)


def cuts(size: int, at: Sequence[int]) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(one % (size + 1) for one in at)})
    return [(start, stop - start) for start, stop in itertools.pairwise(edges)] or [(0, 0)]


@st.composite
def chunked(draw: st.DrawFn, key: str = "w") -> ChunkedTensor:
    """A tensor in a grid of chunks, each an item of its own."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    axes = [cuts(size, draw(st.lists(st.integers(0, 5), max_size=2))) for size in shape]
    boxes = [
        Box(tuple(start for start, _ in one), tuple(size for _, size in one))
        for one in itertools.product(*axes)
    ]
    return in_items(Division(shape, tuple(boxes)), f"{key}.distcp")


def in_items(division: Division, file: str) -> ChunkedTensor:
    """Chunks that lie so, each an item of its own of the file."""
    items = Items.of(Item(file, 10 * number, 10) for number in range(len(division.boxes)))
    return ChunkedTensor("float32", division, items)


def asked_of(weight: ChunkedTensor, moment: ChunkedTensor, demand: Demand) -> dict[Item, bool]:
    metadata = Metadata({"w": weight, "m": moment}, {"lr": Item("w.distcp", 9999, 1)}, {})
    stands_in = blank(metadata)
    state = {
        "model": {"w": stands_in["w"]},
        "optimizers": {"A": {"state": {"w": {"exp_avg": stands_in["m"]}}, "param_groups": stands_in["lr"]}},
    }
    outline = Saved("it", "dcp", "", state)
    found = wanted_items(metadata, outline, {id(value): key for key, value in stands_in.items()}, demand)
    return {
        metadata.tensors[key].items[number]: whole
        for key, numbers in found.items()
        if key != "lr"
        for number, whole in numbers
    }


def wanted(weight: ChunkedTensor, moment: ChunkedTensor, demand: Demand) -> tuple[set[Item], set[Item]]:
    found = asked_of(weight, moment, demand)
    of_weight, of_moment = ({item for item in found if item.file == f"{name}.distcp"} for name in "wm")
    return of_weight, of_moment


def holding(tensor: ChunkedTensor, kept: set[int]) -> set[Item]:
    return {
        item
        for box, item in zip(tensor.division.boxes, tensor.items, strict=True)
        if positions(tensor.shape, box) & kept
    }


@given(st.data())
def test_a_box_of_a_sharded_parameter(data: st.DataObject) -> None:
    weight = data.draw(chunked())
    box = data.draw(boxes(weight.shape))
    moment = in_items(weight.division, "m.distcp")
    demand = Demand(Position(0, 1), shards={"w": ShardDemand(weight.shape, box)})
    of_weight, of_moment = wanted(weight, moment, demand)
    kept = positions(weight.shape, box)
    assert of_weight == holding(weight, kept)
    assert of_moment == holding(moment, kept)
    for item, whole in asked_of(weight, moment, demand).items():
        box = weight.division.boxes[item.offset // 10]
        assert whole == (positions(weight.shape, box) <= kept)
    without = Demand(Position(0, 1), optimizer=False, shards=demand.shards)
    assert wanted(weight, moment, without) == (of_weight, set())


@given(st.data())
def test_runs_of_an_engines_parameter(data: st.DataObject) -> None:
    weight = data.draw(chunked())
    updated, computed = (data.draw(runs(weight.shape)) for _ in range(2))
    moment = in_items(weight.division, "m.distcp")
    asked = ParameterDemand(weight.shape, "float32", (updated,), (computed,))
    of_weight, of_moment = wanted(weight, moment, Demand(Position(0, 1), parameters={"w": asked}))
    its = set(range(updated.start, updated.stop))
    assert of_weight == holding(weight, its | set(range(computed.start, computed.stop)))
    assert of_moment == holding(moment, its)


@given(chunked(), chunked("m"))
def test_all_where_it_is_not_known(weight: ChunkedTensor, moment: ChunkedTensor) -> None:
    all_of = [set(tensor.items) for tensor in (weight, moment)]
    assert list(wanted(weight, moment, Demand(Position(0, 1)))) == all_of
    assert list(wanted(weight, moment, Demand(Position(0, 1), weights_only=True))) == [all_of[0], set()]
    if weight.shape and moment.shape != weight.shape:
        box = Box((0,) * len(weight.shape), (0,) * len(weight.shape))
        assert list(
            wanted(weight, moment, Demand(Position(0, 1), shards={"w": ShardDemand(weight.shape, box)}))
        ) == [set(), all_of[1]]
