"""A mixture of experts' layout: told from made-up files whose rows are really cut, and refused where it cannot be."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, LayoutError
from rankload.loader.saved.model_parallel import EXPERTS, ExpertLayer
from rankload.loader.saved.values import InertObject
from rankload.loader.sources.zero.experts import (
    check_experts,
    expert_files,
    expert_ranks,
    optimizer_file,
    with_experts,
)
from rankload.loader.sources.zero.file_names import Needed, OptimNaming
from rankload.loader.sources.zero.layout import zero_checkpoint
from rankload.loader.sources.zero.model_states import ModelStates, read_model_states
from rankload.loader.sources.zero.needs import files_of_runs
from rankload.loader.sources.zero.optim_states import OptimStates, read_optim_states
from zero_trees import model_tree, optim_tree, tensor

SHAPES = {"up": (3, 2), "down": (5,)}


def local_names(layer: int, count: int) -> dict[str, tuple[int, ...]]:
    return {
        f"moe{layer}{EXPERTS}{local}.{name}": shape
        for local in range(count)
        for name, shape in SHAPES.items()
    }


def model_of(
    ranks: int, layers: list[tuple[int, int]], *, data_first: bool = False, stage_0: Any = None
) -> ModelStates:
    """Rank 0's model file of `layers` of (experts, ep_size): one dense group, then one for each layer."""
    tree = model_tree([{"dense": (7, 3)}], ranks)
    tree["param_shapes"] += [local_names(index, count // ep) for index, (count, ep) in enumerate(layers)]
    tree["num_experts"] = [count for count, _ in layers]
    tree["ds_config"]["use_data_before_expert_parallelism"] = data_first
    if stage_0 is not None:
        tree.update(param_shapes=None, optimizer=stage_0)
    return read_model_states(tree, file="model.pt")


def optim_of(numels: list[int], counts: list[int], padding: int = 0) -> OptimStates:
    tree = optim_tree(numels, 1, paddings=[0] * (len(numels) - 1) + [padding])
    tree["optimizer_state_dict"]["partition_count"] = counts
    return read_optim_states(tree, file="optim.pt")


def here(layers: list[tuple[int, int]], ep_ranks: list[int]) -> tuple[ExpertLayer, ...]:
    """What a rank of this job has of `layers`."""
    return tuple(
        ExpertLayer(f"moe{index}", index, count, ep, ep_rank)
        for index, ((count, ep), ep_rank) in enumerate(zip(layers, ep_ranks, strict=True))
    )


def files_of(layers: tuple[ExpertLayer, ...]) -> dict[str, tuple[Any, str]]:
    """The files of a rank's experts, as DeepSpeed writes them."""
    return {
        name: (
            {f"{layer.name}{EXPERTS}{expert}.{key}": tensor(*shape) for key, shape in SHAPES.items()},
            name,
        )
        for layer in layers
        for expert, name in zip(layer.experts, expert_files(layer), strict=True)
    }


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_each_expert_rank_finds_its_own_row(
    ep: int, copies: int, count: int, data_first: bool, data: Any
) -> None:
    """Every expert-parallel rank's row is cut over the ranks that have its experts, and over no others."""
    ranks, experts = ep * copies, ep * count
    numel = sum(math.prod(shape) for shape in SHAPES.values()) * count
    part = 2 * math.ceil(numel / (2 * copies))
    dense = 2 * math.ceil(21 / (2 * ranks))
    members: dict[int, list[int]] = {}
    for rank in range(ranks):
        members.setdefault(rank // copies if data_first else rank % ep, []).append(rank)
    held: set[tuple[int, int]] = set()
    for ep_rank in range(ep):
        layers = here([(experts, ep)], [ep_rank])
        model = with_experts(
            model_of(ranks, [(experts, ep)], data_first=data_first), layers, files_of(layers)
        )
        layout = zero_checkpoint(model, optim_of([dense, part], [ranks, copies]))
        assert layout.partition_numel == (dense, part)
        row = [(name, i) for name, shape in local_names(0, count).items() for i in range(math.prod(shape))]
        for name, shape in local_names(0, count).items():
            covered = []
            for piece in layout.pieces(name):
                position = members[ep_rank].index(piece.rank)
                for step in range(piece.run.length):
                    assert row[position * part + piece.start + step] == (name, piece.run.start + step)
                    covered.append(piece.run.start + step)
                    held.add((piece.rank, piece.start + step))
            assert covered == list(range(math.prod(shape)))
        assert {piece.rank for piece in layout.pieces("dense")} <= set(range(ranks))
        wanted = {name: [piece.run for piece in layout.pieces(name)] for name in local_names(0, count)}
        assert files_of_runs(layout, wanted).optims <= set(members[ep_rank])
    # Every expert of the layer was found once, and none twice.
    assert len(held) == numel * ep


def test_experts_get_the_names_that_they_have_on_this_rank() -> None:
    layers = here([(4, 2), (2, 2)], [1, 1])
    files = files_of(layers)
    assert sorted(files) == [
        "layer_0_expert_2_mp_rank_00_model_states.pt",
        "layer_0_expert_3_mp_rank_00_model_states.pt",
        "layer_1_expert_1_mp_rank_00_model_states.pt",
    ]
    model = with_experts(model_of(4, [(4, 2), (2, 2)]), layers, files)
    third = files["layer_0_expert_3_mp_rank_00_model_states.pt"][0]
    assert model.module[f"moe0{EXPERTS}1.up"] is third[f"moe0{EXPERTS}3.up"]
    assert set(model.module) == {"dense", "seen", *local_names(0, 2), *local_names(1, 1)}
    needed = Needed(frozenset({0}), frozenset({1}), frozenset(files))
    assert needed.files(partitioned=False, naming=OptimNaming())[2:] == tuple(sorted(files))
    assert not needed - needed


def test_stage_0_takes_the_optimizer_of_the_widest_group() -> None:
    groups = [{"params": [0], "lr": 0.1}, {"params": [1], "lr": 0.1, "moe": True, "name": "ep_size_2"}]
    optimizer = {"state": {}, "param_groups": groups}
    layers = here([(4, 2), (4, 4)], [1, 3])
    assert optimizer_file(layers) == "expp_rank_3_mp_rank_00_optim_states.pt"
    layers = here([(4, 2)], [1])
    model = model_of(4, [(4, 2)], stage_0=optimizer)
    check_experts(model, layers)
    own = {"state": {}, "param_groups": groups[:1]}
    files = {**files_of(layers), optimizer_file(layers): ({"optimizer": own}, "expp.pt")}
    changed = with_experts(model, layers, files)
    assert changed.optimizer is own
    assert changed.optimizer_file == "expp.pt"
    for wrapped in (optimizer, {"optimizer_state_dict": optimizer, "fp32_groups": []}):
        with pytest.raises(
            LayoutError, match=r"groups of ep_size_2, and this job has ep_size_4 \(moe0: 4 experts"
        ):
            check_experts(model_of(4, [(4, 2)], stage_0=wrapped), here([(4, 4)], [1]))
        check_experts(model_of(4, [(4, 2)], stage_0=wrapped), here([(4, 4)], [1]), weights_only=True)


def test_other_experts_than_saved_are_told_with_both_layouts() -> None:
    model = model_of(4, [(4, 2), (2, 2)])
    for layers, message in (
        ([(8, 2), (2, 2)], r"2 MoE layers of 4, 2 experts, and this job has 2 MoE layers of 8, 2 experts"),
        ([(4, 2)], r"this job has 1 MoE layer of 4 experts \(moe0: 4 experts, ep_size 2\)"),
        ([], "this job has a module without MoE layers"),
    ):
        with pytest.raises(LayoutError, match=message):
            check_experts(model, here(layers, [0] * len(layers)))
    dense = read_model_states(model_tree([{"dense": (7, 3)}], 4), file="model.pt")
    with pytest.raises(LayoutError, match="was saved by a module without MoE layers, and this job has 1 MoE"):
        check_experts(dense, here([(4, 2)], [0]))


def test_another_expert_parallel_size_is_told_with_both() -> None:
    layers = here([(4, 4)], [1])
    model = with_experts(model_of(4, [(4, 2)]), layers, files_of(layers))
    with pytest.raises(LayoutError, match="moe0: 4 experts, ep_size 2 saved and 4 here") as caught:
        zero_checkpoint(model, optim_of([6, 12], [4, 2]))
    assert caught.value.path == "optim.pt"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 1], "in another order than rank 0's"),
        ([4, 3], r"partitioned over \[4, 3\] ranks, and 4 saved it"),
        ([2, 2], "only a group of experts"),
    ],
)
def test_groups_that_are_cut_otherwise_are_refused(counts: list[int], message: str) -> None:
    layers = here([(4, 2)], [0])
    model = with_experts(model_of(4, [(4, 2)]), layers, files_of(layers))
    with pytest.raises(LayoutError, match=message):
        zero_checkpoint(model, optim_of([6, 12], counts))


def test_a_group_of_experts_and_others_cannot_be() -> None:
    tree = model_tree([{"dense": (7, 3), **local_names(0, 2)}], 4)
    for name in local_names(0, 2):
        del tree["module"][name]
    tree["num_experts"] = [4]
    layers = here([(4, 2)], [0])
    model = with_experts(read_model_states(tree, file="model.pt"), layers, files_of(layers))
    with pytest.raises(LayoutError, match="only a group of experts"):
        zero_checkpoint(model, optim_of([22], [2]))


def changed(files: dict[str, tuple[Any, str]], change: Any) -> dict[str, tuple[Any, str]]:
    name = "layer_0_expert_1_mp_rank_00_model_states.pt"
    return {**files, name: (change(dict(files[name][0])), name)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: [], "expected a dict"),
        (lambda tree: {"dense": tensor(7, 3)}, "parameters of expert 1 alone"),
        (lambda tree: {key.replace(f"{EXPERTS}1", f"{EXPERTS}0"): tree[key] for key in tree}, "of expert 1"),
        (lambda tree: {**tree, f"moe0{EXPERTS}1.up": tensor(2, 3)}, r"expected a tensor of shape \(3, 2\)"),
        (lambda tree: {**tree, f"moe0{EXPERTS}1.up": InertObject("a.b")}, "expected a tensor of shape"),
        (lambda tree: {f"moe0{EXPERTS}1.up": tensor(3, 2)}, "which no expert's file holds"),
    ],
)
def test_expert_files_that_cannot_be_are_refused(change: Any, message: str) -> None:
    layers = here([(4, 2)], [0])
    files = changed(files_of(layers), change)
    with pytest.raises(CorruptError, match=message):
        zero_checkpoint(with_experts(model_of(4, [(4, 2)]), layers, files), optim_of([6, 12], [4, 2]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ds_autoep_layers", [{"num_experts": 4}], "AutoEP"),
        ("num_experts", 4, "older DeepSpeed"),
        ("mp_world_size", 2, "tensor"),
    ],
)
def test_experts_of_other_kinds_are_refused_by_name(key: str, value: Any, message: str) -> None:
    tree = model_tree([{"dense": (7, 3)}], 4)
    tree.update({"num_experts": [4], key: value})
    with pytest.raises(LayoutError, match=message):
        read_model_states(tree, file="model.pt")


def test_the_ranks_of_an_expert_group() -> None:
    assert expert_ranks(8, 2, 1, False) == (1, 3, 5, 7)
    assert expert_ranks(8, 2, 1, True) == (4, 5, 6, 7)
    assert expert_ranks(4, 1, 0, False) == expert_ranks(4, 1, 0, True) == (0, 1, 2, 3)
