"""Whose files a rank needs, against an oracle that asks for each element by itself who has it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import LayoutError
from rankload.loader.saved.demand import Demand, ParameterDemand
from rankload.loader.saved.model_parallel import Position
from rankload.loader.saved.partitions import cut, shares
from rankload.loader.saved.regions import Run
from rankload.loader.sources.zero.file_names import Needed
from rankload.loader.sources.zero.layout import FROZEN_GROUP, SavedParameter, ZeroCheckpoint
from rankload.loader.sources.zero.model_states import read_model_states
from rankload.loader.sources.zero.needs import all_files, files_of_runs, likeliest, own_files, wanted_runs
from zero_trees import model_tree

NOTHING = Needed(frozenset(), frozenset())


def layout(stage: int, sizes: list[int], ranks: int, frozen: frozenset[int] = frozenset()) -> ZeroCheckpoint:
    """One group of parameters ``p0``, ``p1`` ...; those in `frozen` belong to no optimizer."""
    parameters = {}
    offset = 0
    for index, size in enumerate(sizes):
        if index in frozen:
            parameters[f"p{index}"] = SavedParameter(f"p{index}", (size,), FROZEN_GROUP, 0)
            continue
        parameters[f"p{index}"] = SavedParameter(f"p{index}", (size,), 0, offset)
        offset += -(-size // ranks) if stage == 3 else size
    partition = offset if stage == 3 else 2 * -(-offset // (2 * ranks))
    return ZeroCheckpoint(stage, ranks, parameters, {"alias": "p0"}, (partition,), {0: 0}, ("fp32",))


def owner(checkpoint: ZeroCheckpoint, name: str, element: int) -> int:
    parameter = checkpoint.parameters[name]
    if checkpoint.stage == 3:
        return element // math.ceil(parameter.numel / checkpoint.world_size)
    return (parameter.offset + element) // checkpoint.partition_numel[0]


@given(
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(1, 8),
    st.frozensets(st.integers(0, 5), max_size=2),
    st.data(),
)
def test_exactly_the_ranks_that_hold_a_wanted_element(
    stage: int, sizes: list[int], ranks: int, frozen: frozenset[int], data: st.DataObject
) -> None:
    checkpoint = layout(stage, sizes, ranks, frozen)
    wanted: dict[str, list[Run]] = {}
    models: set[int] = set()
    optims: set[int] = set()
    for index, size in enumerate(sizes):
        # Runs may overlap: masters and what the module computes with want the same elements.
        for _ in range(data.draw(st.integers(0, 2))):
            start = data.draw(st.integers(0, size))
            length = data.draw(st.integers(0, size - start))
            wanted.setdefault(f"p{index}", []).append(Run(start, length))
            if index in frozen and stage < 3:
                continue  # whole in the first rank's model file
            holders = models if index in frozen else optims
            holders |= {owner(checkpoint, f"p{index}", start + i) for i in range(length)}
    assert files_of_runs(checkpoint, wanted) == Needed(frozenset(models), frozenset(optims))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 8), st.integers(1, 8))
def test_another_partition_of_the_same_row_needs_its_neighbours_and_the_one_that_is_read_first(
    sizes: list[int], saved: int, ranks: int
) -> None:
    checkpoint = layout(1, sizes, saved)
    partition = layout(1, sizes, ranks).partition_numel[0]
    everybody: set[int] = set()
    for rank in range(ranks):
        wanted: dict[str, list[Run]] = {}
        for name, parameter in checkpoint.parameters.items():
            slots = cut(parameter.offset, parameter.numel, partition, ranks)
            wanted[name] = [slot.run for slot in slots if slot.rank == rank]
        needed = files_of_runs(checkpoint, wanted).optims
        assert len(needed) <= -(-partition // checkpoint.partition_numel[0]) + 1 if needed else True
        if ranks == saved:
            assert needed <= {rank}
            assert likeliest(rank, ranks, saved) == rank
        if needed and sum(sizes) == partition * ranks == checkpoint.partition_numel[0] * saved:
            assert likeliest(rank, ranks, saved) in needed
        everybody |= needed
    row = [(name, i) for name, one in checkpoint.parameters.items() for i in range(one.numel)]
    assert everybody == {owner(checkpoint, name, i) for name, i in row}


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_shares_of_stage_3_need_the_one_that_is_read_first(numel: int, saved: int, ranks: int) -> None:
    checkpoint = layout(3, [numel], saved)
    for rank in range(ranks):
        wanted = {"p0": [slot.run for slot in shares(numel, ranks, 0) if slot.rank == rank]}
        needed = files_of_runs(checkpoint, wanted).optims
        if wanted["p0"] and numel % saved == numel % ranks == 0:
            assert likeliest(rank, ranks, saved) in needed
        assert len(needed) <= -(-saved // ranks) + 2


@given(st.integers(1, 9), st.integers(1, 9))
def test_what_is_read_first_exists_and_all_is_all(saved: int, ranks: int) -> None:
    for rank in range(ranks):
        own = own_files(rank, ranks, saved, partitioned=True, with_optimizer=True)
        assert own.optims <= own.models <= set(range(saved))
        assert {0} | ({rank} & set(range(saved))) <= own.models
        assert not own - all_files(saved, partitioned=True, with_optimizer=True)
    assert own_files(0, ranks, saved, partitioned=False, with_optimizer=False) == Needed()


def test_what_no_rank_has_is_an_error_and_other_names_are_left_alone() -> None:
    checkpoint = layout(1, [4], 2)
    assert files_of_runs(checkpoint, {"stranger": [Run(0, 9)]}) == NOTHING
    assert files_of_runs(checkpoint, {"alias": [Run(3, 1)]}).optims == {1}
    with pytest.raises(LayoutError, match=r"p0: element 4 .* no saved piece"):
        files_of_runs(checkpoint, {"p0": [Run(2, 3)]})


def test_what_is_wanted_is_what_is_updated_and_what_the_model_file_has_otherwise() -> None:
    checkpoint = layout(1, [4, 6, 8], 2)
    model = read_model_states(model_tree([{"p0": (4,), "p1": (6,)}], 2), file="model.pt")
    updated, computed = (Run(0, 2),), (Run(0, 4),)

    def asked(size: int, dtype: str = "bfloat16") -> ParameterDemand:
        return ParameterDemand((size,), dtype, updated, computed)

    demand = Demand(
        Position(0, 1),
        parameters={"p0": asked(4), "p1": asked(7), "p2": asked(8), "new": asked(4)},
        aliases={"again": "p0"},
        others=("seen",),
    )
    # p2 is in no file but the optimizer's; p1 has another shape here, and nobody saved the new one.
    wanted = wanted_runs(demand, checkpoint, model)
    assert wanted == {"p0": [*updated], "p2": [*updated, *computed]}
    other = replace(demand, parameters={**(demand.parameters or {}), "p0": asked(4, "float16")})
    assert wanted_runs(other, checkpoint, model)["p0"] == [*updated, *computed]
    assert wanted_runs(demand, replace(checkpoint, stage=3), model)["p0"] == [*updated, *computed]
    renamed = replace(demand, rename={"p0": "again", "p2": "new"})
    # The first name of a tied parameter is the one that is asked for; p2's shape is not that of the new one.
    assert wanted_runs(renamed, checkpoint, model) == {"p0": [*updated]}
    assert wanted_runs(replace(demand, parameters=None), checkpoint, model) == {}
