"""Partitioned parameters as saved tensors: each element where it lies, and what cannot be is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, LayoutError
from rankload.loader.saved.copies import Memory, copies_into
from rankload.loader.saved.regions import Laid, Run, check_cover
from rankload.loader.saved.tensor import SavedTensor, StorageRef, Unread
from rankload.loader.sources.zero.contents import ZeroContents, zero_contents
from rankload.loader.sources.zero.layout import SavedParameter, ZeroCheckpoint
from rankload.loader.sources.zero.model_states import read_model_states
from rankload.loader.sources.zero.optim_states import OptimStates, read_optim_states
from rankload.loader.sources.zero.partitioned import FROZEN, all_partitioned, partitioned
from zero_trees import model_tree, optim_tree, tensor


def optim_of(rank: int, **tensors: dict[int, SavedTensor]) -> OptimStates:
    read = read_optim_states(optim_tree([4], 2), file=f"optim{rank}.pt")
    return replace(read, tensors={"fp32": {0: tensor(4)}, **tensors})


def contents_of(stage: int, shape: tuple[int, ...], optims: dict[int, OptimStates]) -> ZeroContents:
    """One parameter ``x`` of `shape`, whose elements begin at the second of its group; partitions of 4."""
    model = read_model_states(model_tree([{"x": (1,)}], 2), file="model.pt")
    parameters = {"x": SavedParameter("x", shape, 0, 1)}
    checkpoint = ZeroCheckpoint(stage, 2, parameters, {}, (4,), {0: 0}, ("fp32", "exp_avg"))
    return ZeroContents(checkpoint, {0: model}, optims)


def strided(rank: int, numel: int, *, offset: int = 0, step: int = 1, dtype: str = "float32") -> SavedTensor:
    storage = StorageRef(f"rank{rank}", "0", 0, 4 * (offset + numel * step), None)
    return SavedTensor.in_storage(storage, dtype, (numel,), (step,), offset)


def places(found: SavedTensor) -> dict[int, tuple[str, int]]:
    """Each element of the flattened tensor to its file and place there; those that are not read are left out."""
    check_cover(found.shape, [piece.region for piece in found.pieces])
    return {
        piece.region.start + i: (piece.storage.file, piece.offset + i * piece.stride[0])
        for piece in found.pieces
        if isinstance(piece.storage, StorageRef) and isinstance(piece.region, Run)
        for i in range(piece.region.length)
    }


def test_pieces_begin_where_the_flat_tensors_do() -> None:
    one, other = strided(0, 4, offset=3, step=2), strided(1, 4, offset=5)
    zero = contents_of(1, (2, 3), {0: optim_of(0, exp_avg={0: one}), 1: optim_of(1, exp_avg={0: other})})
    found = partitioned(zero, zero.checkpoint.parameters["x"], zero.checkpoint.kinds)
    assert found.keys() == {"fp32", "exp_avg"}
    assert places(found["exp_avg"]) == {
        **{i: ("rank0", 3 + 2 * (1 + i)) for i in range(3)},
        **{3 + i: ("rank1", 5 + i) for i in range(3)},
    }
    # All kinds are cut alike.
    for piece, same in zip(found["exp_avg"].pieces, found["fp32"].pieces, strict=True):
        assert piece.region is same.region


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.sampled_from([1, 2]), st.data())
def test_all_at_once_are_as_each_by_itself(numels: list[int], step: int, data: st.DataObject) -> None:
    """Also where a parameter lies in two partitions, its rank's file was not read, or has no such state."""
    size = -(-sum(numels) // 3) + data.draw(st.integers(0, 2))
    read = data.draw(st.sets(st.integers(0, 2), min_size=1))
    lacks = data.draw(st.sampled_from([-1, *read]))
    optims = {
        rank: replace(
            optim_of(rank),
            tensors={
                "fp32": {0: strided(rank, size, offset=7)},
                "exp_avg": {} if rank == lacks else {0: strided(rank, size, offset=2, step=step)},
            },
        )
        for rank in sorted(read)
    }
    starts = [sum(numels[:index]) for index in range(len(numels))]
    parameters = {
        f"p{index}": SavedParameter(f"p{index}", (numel,), 0, start)
        for index, (numel, start) in enumerate(zip(numels, starts, strict=True))
    }
    checkpoint = ZeroCheckpoint(1, 3, parameters, {}, (size,), {0: 0}, ("fp32", "exp_avg"))
    model = read_model_states(model_tree([{"x": (1,)}], 3), file="model.pt")
    zero = ZeroContents(checkpoint, {0: model}, optims)
    together = all_partitioned(zero, checkpoint.kinds)
    assert list(together) == list(parameters)
    for name, parameter in parameters.items():
        alone = partitioned(zero, parameter, checkpoint.kinds)
        assert list(together[name]) == list(alone)
        for kind, own in alone.items():
            other = together[name][kind]
            assert (other.dtype, other.shape, other.whole) == (own.dtype, own.shape, own.whole)
            assert [(one.region, one.offset, one.stride, one.storage) for one in other.pieces] == [
                (one.region, one.offset, one.stride, one.storage) for one in own.pieces
            ]
            assert other.row == own.row


def test_tensors_are_looked_at_once_for_all_the_parameters_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = contents_of(1, (2, 3), {0: optim_of(0), 1: optim_of(1)})
    looked_at: list[tuple[str, int]] = []
    flat = ZeroContents.flat

    def count(self: ZeroContents, parameter: SavedParameter, kind: str, rank: int) -> SavedTensor | None:
        looked_at.append((kind, rank))
        return flat(self, parameter, kind, rank)

    monkeypatch.setattr(ZeroContents, "flat", count)
    parameters = [SavedParameter("x", (1,), 0, offset) for offset in range(8)]
    zero.checkpoint.parameters.clear()
    for parameter in parameters:
        zero.checkpoint.parameters["x"] = parameter
        found = partitioned(zero, parameter, ["fp32"])["fp32"]
        assert places(found) == {0: ("nowhere", parameter.offset % 4)}
    assert looked_at == [("fp32", 0), ("fp32", 1)]


def test_what_is_not_all_of_a_parameter_is_an_error() -> None:
    optims = {0: optim_of(0, exp_avg={0: strided(0, 4)}), 1: optim_of(1, exp_avg={0: strided(1, 4)})}
    zero = contents_of(1, (8,), optims)
    with pytest.raises(CorruptError, match=r"model.pt: exp_avg of x: elements \[1, 9\) do not lie in 2"):
        partitioned(zero, zero.checkpoint.parameters["x"], ["exp_avg"])
    for wrong, error, text in (
        (strided(1, 2), CorruptError, "optim1.pt: .* exp_avg of x, of saved rank 1, has 2 elements, expected at l"),
        (tensor(2, 2), CorruptError, r"optim1.pt: .* has shape \(2, 2\), expected one dimension"),
        (strided(1, 4, dtype="bfloat16"), CorruptError, "optim1.pt: .* bfloat16, and that of another rank float32"),
    ):  # fmt: skip
        zero = contents_of(1, (6,), {0: optims[0], 1: optim_of(1, exp_avg={0: wrong})})
        with pytest.raises(error, match=text) as caught:
            partitioned(zero, zero.checkpoint.parameters["x"], ["exp_avg"])
        assert caught.value.path == "optim1.pt"


def test_state_that_a_rank_lacks_is_an_error_where_it_is_wanted() -> None:
    memory = Memory("here", "float32", (6,), (1,), plain=True)
    for optims, reason in (
        ({1: optim_of(1)}, "cannot be restored: saved rank 1 has no exp_avg of it"),
        ({}, "lies partly in the files of saved rank 1, which were not read"),
    ):
        zero = contents_of(1, (6,), {0: optim_of(0, exp_avg={0: strided(0, 4)}), **optims})
        found = partitioned(zero, zero.checkpoint.parameters["x"], ["exp_avg"])["exp_avg"]
        assert places(found) == {i: ("rank0", 1 + i) for i in range(3)}
        assert len(list(copies_into(found, Laid(Run(0, 3), 0, (1,)), memory, name="exp_avg/x"))) == 1
        with pytest.raises(LayoutError, match=f"^exp_avg/x {reason}$"):
            list(copies_into(found, memory.whole, memory, name="exp_avg/x"))
    zero = contents_of(1, (6,), {0: optim_of(0)})
    assert partitioned(zero, zero.checkpoint.parameters["x"], ["exp_avg"]) == {}


@given(st.sampled_from([1, 3]), st.lists(st.integers(0, 9), max_size=3), st.integers(1, 9), st.data())
def test_files_that_were_not_read_are_one_piece_between_those_that_were(
    stage: int, sizes: list[int], ranks: int, data: Any
) -> None:
    shape = tuple(sizes)
    numel = math.prod(shape)
    flat = 1 + (-(-numel // ranks) if stage == 3 else numel)
    read = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    model = read_model_states(model_tree([{"x": (1,)}], ranks), file="model.pt")
    checkpoint = ZeroCheckpoint(
        stage, ranks, {"x": SavedParameter("x", shape, 0, 1)}, {}, (flat,), {0: 0}, ("fp32",)
    )
    tensors = {rank: {"fp32": {0: strided(rank, flat)}} for rank in read}
    optims = {rank: replace(optim_of(rank), tensors=tensors[rank]) for rank in read}
    zero = ZeroContents(checkpoint, {0: model}, optims)
    found = partitioned(zero, checkpoint.parameters["x"], ["fp32"])["fp32"]
    expected = {
        slot.run.start + i: (f"rank{slot.rank}", slot.start + i)
        for slot in checkpoint.pieces("x")
        for i in range(slot.run.length)
        if slot.rank in read
    }
    assert places(found) == expected
    assert len(found.pieces) <= 2 * len(read) + 1
    for piece in found.pieces:
        if isinstance(piece.storage, Unread):
            assert isinstance(piece.region, Run)
            holders = checkpoint.holders("x", piece.region)
            assert not read & set(holders)
            assert f" {holders[0]}" in piece.storage.reason
            assert str(holders[-1]) in piece.storage.reason


def test_ranks_that_do_not_follow_each_other_are_listed() -> None:
    """A group of experts is cut over the ranks that have them."""
    group = (tuple(range(1, 40, 2)),)
    zero = contents_of(1, (79,), {0: optim_of(0, exp_avg={0: strided(0, 4)})})
    zero = replace(zero, checkpoint=replace(zero.checkpoint, world_size=40, group_ranks=group))
    (piece,) = partitioned(zero, zero.checkpoint.parameters["x"], ["exp_avg"])["exp_avg"].pieces
    assert isinstance(piece.storage, Unread)
    assert "of saved ranks 1, 3, 5, 7, 9, 11, 13, 15, ..., which" in piece.storage.reason


def test_a_frozen_parameter_lies_in_the_model_files() -> None:
    tree = {**model_tree([{"x": (5,)}], 2, stage3=True), "frozen_param_shapes": {"ice": (3,)}}
    models = {
        rank: read_model_states({**tree, "frozen_param_fragments": fragments}, file=f"model{rank}.pt")
        for rank, fragments in enumerate(({"ice": strided(0, 2, dtype="bfloat16")}, {}))
    }
    checkpoint = ZeroCheckpoint(
        3, 2, {"ice": SavedParameter("ice", (3,), -1, 0)}, {}, (3,), {0: 0}, ("fp32",)
    )
    for held, reason in (
        (models, "saved rank 1 has no share of it"),
        ({0: models[0]}, "of saved rank 1, which"),
    ):
        zero = ZeroContents(checkpoint, held, {})
        found = partitioned(zero, checkpoint.parameters["ice"], [FROZEN])[FROZEN]
        assert (found.dtype, found.shape) == ("bfloat16", (3,))
        assert places(found) == {0: ("rank0", 0), 1: ("rank0", 1)}
        assert isinstance(found.pieces[1].storage, Unread)
        assert reason in found.pieces[1].storage.reason
    with pytest.raises(LayoutError, match="share of frozen parameter ice has shape"):
        zero_contents({0: replace(models[0], frozen_fragments={"ice": tensor(1)})}, {}, weights_only=True)
