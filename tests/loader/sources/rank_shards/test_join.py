"""Trees of several ranks as one: what belongs together, and what does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from rankload.loader.errors import CorruptError, FormatError, LayoutError
from rankload.loader.formats.pickle.inert import Ordered
from rankload.loader.saved.regions import row_major_stride
from rankload.loader.saved.shards import REPLICATE, SHARD, STRIDED, Placement, Spread
from rankload.loader.saved.strided import Box
from rankload.loader.saved.tensor import SavedTensor, StorageRef
from rankload.loader.saved.values import InertShard, InertTensor
from rankload.loader.sources.rank_shards.join import Joined, RankTree, join_trees

Shape = tuple[int, ...]
ROWS = (Placement(SHARD, 0),)


def stored(rank: int, shape: Shape, *, crc32: int | None = None, dtype: str = "float32") -> SavedTensor:
    numel = 1
    for size in shape:
        numel *= size
    storage = StorageRef(f"{rank}.pt", "data/0", 0, 4 * numel, crc32)
    return SavedTensor.in_storage(storage, dtype, shape, row_major_stride(shape))


def dtensor(
    rank: int,
    spread: Spread,
    local: Shape,
    *,
    shape: Shape = (5, 4),
    dtype: str = "float32",
    local_dtype: str = "float32",
) -> InertShard:
    return InertShard(
        "torch.distributed.tensor.DTensor",
        kind="DTensor, one rank's shard of a tensor",
        dtype=dtype,
        shape=shape,
        spread=spread,
        local=stored(rank, local, dtype=local_dtype),
        world_size=2,
    )


def row(at: int | None, mesh: Shape = (2,), **more: Any) -> Spread:
    return Spread(
        **{"mesh": mesh, "coordinate": None if at is None else (at,), "placements": ROWS, "origin": 0, **more}
    )


def sharded(rank: int, *boxes: tuple[Box, SavedTensor]) -> InertShard:
    return InertShard("ShardedTensor", dtype="float32", shape=(5, 4), boxes=boxes, world_size=2)


def joined(trees: Sequence[Any], path: str = "") -> Joined:
    return join_trees([RankTree(f"{rank}.pt", tree) for rank, tree in enumerate(trees)], path)


def places(tensor: SavedTensor) -> list[tuple[str, Box, int]]:
    return [(piece.storage.file, piece.region, piece.offset) for piece in tensor.pieces]


def test_a_tensor_has_a_piece_in_each_ranks_file() -> None:
    found = joined([{"w": dtensor(0, row(0), (3, 4))}, {"w": dtensor(1, row(1), (2, 4))}]).tree["w"]
    assert places(found) == [("0.pt", Box((0, 0), (3, 4)), 0), ("1.pt", Box((3, 0), (2, 4)), 0)]


def test_ranks_that_keep_the_same_give_it_once() -> None:
    placements = (Placement(REPLICATE), Placement(SHARD, -1))
    trees = [
        dtensor(rank, Spread((2, 2), at, placements, 0), (5, 2))
        for rank, at in enumerate(itertools.product(range(2), range(2)))
    ]
    found = joined(trees).tree
    assert places(found) == [("0.pt", Box((0, 0), (5, 2)), 0), ("1.pt", Box((0, 2), (5, 2)), 0)]


def test_what_tensor_parallelism_leaves_whole_lies_on_a_mesh_for_each_of_its_ranks() -> None:
    trees = [dtensor(rank, row(rank // 2, origin=rank % 2), (3 - rank // 2, 4)) for rank in range(4)]
    assert [file for file, _, _ in places(joined(trees).tree)] == ["0.pt", "2.pt"]


def test_ranks_outside_of_the_mesh_hold_nothing() -> None:
    trees = [dtensor(rank, row(at), (3 - rank, 4)) for rank, at in enumerate((0, 1))]
    found = joined([*trees, dtensor(2, row(None, origin=None), (0,))]).tree
    assert [file for file, _, _ in places(found)] == ["0.pt", "1.pt"]


def test_parts_of_a_strided_shard_lie_apart() -> None:
    placements = (Placement(SHARD, 0), Placement(STRIDED, 0, 2))
    trees = [
        dtensor(rank, Spread((2, 2), at, placements, 0), (2,), shape=(8,))
        for rank, at in enumerate(itertools.product(range(2), range(2)))
    ]
    boxes = [("0.pt", 0, 0), ("1.pt", 1, 0), ("0.pt", 2, 1), ("1.pt", 3, 1)]
    boxes += [(f"{2 + int(file[0])}.pt", start + 4, offset) for file, start, offset in boxes]
    assert places(joined(trees).tree) == [
        (file, Box((start,), (1,)), offset) for file, start, offset in boxes
    ]


def test_shards_that_say_their_own_places() -> None:
    first, second = Box((0, 0), (3, 4)), Box((3, 0), (2, 4))
    found = joined([sharded(0, (first, stored(0, (3, 4)))), sharded(1, (second, stored(1, (2, 4))))]).tree
    assert places(found) == [("0.pt", first, 0), ("1.pt", second, 0)]


def test_names_of_any_rank_stay_in_order_and_all_else_is_the_lowest_ranks() -> None:
    first, second = Ordered({"a": 1, "l": [1, (2, 3)], "x": [1]}), {"b": 2, "a": 7, "l": [8, (9, 9)], "x": 3}
    first._metadata = {"": {"version": 1}}
    found = joined([first, second]).tree
    assert found == {"a": 1, "l": [1, (2, 3)], "x": [1], "b": 2}
    assert found._metadata == {"": {"version": 1}}
    assert "b" not in first
    assert joined([first, second]).partial == ("b",)
    assert joined([first, second]).differing == ("a", "l/0", "l/1/0", "l/1/1")


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (stored(1, (3,), crc32=5), False),
        (stored(1, (3,)), False),
        (stored(1, (3,), crc32=6), True),
        (stored(1, (4,), crc32=5), True),
        (stored(1, (3,), crc32=5, dtype="int32"), True),
        (None, True),
    ],
)
def test_tensors_that_are_not_the_same_on_all_ranks_are_told(other: Any, differs: bool) -> None:
    found = joined([{"m": {"seen": stored(0, (3,), crc32=5)}}, {"m": {"seen": other}}], "p")
    assert found.differing == (("p/m/seen",) if differs else ())


def pair(**more: Any) -> list[InertShard]:
    return [dtensor(0, row(0), (3, 4)), dtensor(1, **{"spread": row(1), "local": (2, 4), **more})]


def with_problem() -> list[InertShard]:
    shards = pair()
    shards[1].problem = "its DeviceMesh has no _coordinate_on_dim"
    return shards


PARTIAL = Spread((2,), (1,), (Placement("Partial"),), 0)
OVERLAPPING = Spread((2,), (1,), (Placement(REPLICATE),), 0)
NINE = (1,) * 9


@pytest.mark.parametrize(
    ("shards", "error", "part"),
    [
        (pair(spread=row(0), local=(3, 4)), CorruptError, r"0\.pt and 1\.pt both hold the shard of w at \(0,\)"),
        (pair(spread=row(2)), CorruptError, r"1\.pt: w is of coordinate \(2,\), outside of its mesh of \(2,\)"),
        (pair(local=(3, 4)), CorruptError, r"1\.pt: w holds a shard of shape \(3, 4\), expected \(2, 4\)"),
        (pair(local_dtype="int32"), CorruptError, r"1\.pt: w is float32 and holds a shard of int32"),
        (pair(shape=(6, 4)), CorruptError, r"w is float32 of shape \(5, 4\) in 0\.pt, and .* of \(6, 4\) in 1\.pt"),
        (pair(dtype="float16"), CorruptError, r"and float16 of \(5, 4\) in 1\.pt"),
        (pair(spread=row(1, mesh=(3,))), CorruptError, r"mesh of \(2,\) in 0\.pt.* mesh of \(3,\) in 1\.pt"),
        (pair(spread=OVERLAPPING), CorruptError, r"placed as \(Shard\(0\)\) .* \(Replicate\) .* in 1\.pt"),
        (pair(spread=PARTIAL), LayoutError, r"1\.pt: w is a DTensor placed as Partial\(0\); only Shard"),
        (pair()[:1], CorruptError, r"shards of w in 1 file, from 0\.pt on, .* \(5, 4\): the pieces hold 12 of 20"),
        ([pair()[0], stored(1, (2, 4))], CorruptError, r"w is a DTensor.* in 0\.pt, and a tensor in 1\.pt"),
        ([stored(0, (2, 4)), pair()[1]], CorruptError, r"w is a DTensor.* in 1\.pt, and a tensor in 0\.pt"),
        (
            [pair()[0], InertTensor(kind="sparse COO tensor", global_name="x")],
            CorruptError,
            r"a sparse COO tensor in 1\.pt",
        ),
        (with_problem(), FormatError, r"1\.pt: w is a torch\.distributed\.tensor\.DTensor .* no _coordinate_on_dim"),
        (
            [dtensor(0, row(0, mesh=(1,)), NINE, shape=NINE)],
            LayoutError,
            r"0\.pt: w is a shard of 9 dimensions; at most 8",
        ),
        (
            [sharded(0, (Box((0, 0), (3, 4)), stored(0, (2, 4))))],
            CorruptError,
            r"0\.pt: w has a shard of shape \(2, 4\) for a place of \(3, 4\)",
        ),
        (
            [sharded(0, (Box((4, 0), (3, 4)), stored(0, (3, 4))))],
            CorruptError,
            r"0\.pt: w of shape \(5, 4\) has a shard at \(4, 0\)",
        ),
        ([sharded(0, (Box((4,), (1,)), stored(0, (1,))))], CorruptError, r"has a shard at \(4,\)"),
        ([sharded(0)], CorruptError, "the pieces hold 0 of 20 elements"),
        (
            [sharded(rank, (Box((rank, 0), (3, 4)), stored(rank, (3, 4)))) for rank in (0, 2)],
            CorruptError,
            "24 of 20 elements",
        ),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_named(shards: list[Any], error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        joined([{"w": one} for one in shards])


def test_a_shard_of_one_repeated_element_is_no_shard() -> None:
    shard = dtensor(0, row(0, mesh=(1,)), (5, 4))
    storage = StorageRef("0.pt", "data/0", 0, 4, None)
    shard.local = SavedTensor.in_storage(storage, "float32", (5, 4), (0, 0))
    with pytest.raises(CorruptError, match="several elements in one place"):
        joined([{"w": shard}])
