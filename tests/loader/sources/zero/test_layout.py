"""The layout of ZeRO checkpoints: told right, for real ones and made-up ones, and refused where it cannot be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rankload.loader.errors import CorruptError, FormatError, LayoutError, RankloadError
from rankload.loader.formats.torch_file import read_index
from rankload.loader.saved.copies import Memory, copies_into
from rankload.loader.saved.demand import Demand
from rankload.loader.saved.ignore import ignore
from rankload.loader.saved.model_parallel import Position
from rankload.loader.saved.partitions import Slot
from rankload.loader.saved.regions import Laid, Run
from rankload.loader.saved.tensor import SavedTensor
from rankload.loader.saved.values import InertObject
from rankload.loader.sources.zero.contents import ZeroContents, zero_contents
from rankload.loader.sources.zero.file_names import Needed, OptimNaming, model_file, optim_namings
from rankload.loader.sources.zero.layout import named_by_optimizer, zero_checkpoint
from rankload.loader.sources.zero.model_states import read_model_states
from rankload.loader.sources.zero.optim_states import read_optim_states, read_whole_optimizer
from rankload.loader.sources.zero.partitioned import partitioned
from rankload.loader.sources.zero.tree import zero_saved
from zero_folders import unpack_zero
from zero_trees import model_tree, optim_tree, stage_3_tree, tensor

shapes = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=7)


@given(shapes, st.integers(1, 8), st.booleans())
def test_stages_1_and_2_against_rows_that_are_really_cut(
    sizes: list[tuple[int, ...]], ranks: int, aligned: bool
) -> None:
    named = {f"p{i}": shape for i, shape in enumerate(sizes)}
    row: list[Any] = []
    paddings = []
    for index, (name, shape) in enumerate(named.items()):
        row += [(name, i) for i in range(math.prod(shape))]
        padding = -len(row) % 8 if aligned and index < len(named) - 1 else 0
        paddings.append(padding)
        row += [None] * padding
    row += [None] * (-len(row) % (2 * ranks))
    part = len(row) // ranks
    optim = optim_tree([part], ranks)
    if aligned:
        optim["optimizer_state_dict"]["param_alignment_paddings"] = [paddings]
    layout = zero_checkpoint(
        read_model_states(model_tree([named], ranks), file="m"), read_optim_states(optim, file="o")
    )
    assert layout.partition_numel == (part,)
    check_pieces_against(layout, named, lambda rank, start: row[rank * part + start])


@given(st.lists(shapes, min_size=1, max_size=3), st.integers(1, 8))
def test_stage_3_against_parameters_that_are_really_cut(
    groups: list[list[tuple[int, ...]]], ranks: int
) -> None:
    named = [{f"p{g}.{i}": shape for i, shape in enumerate(sizes)} for g, sizes in enumerate(groups)]
    flats: dict[tuple[int, int], list[Any]] = {}
    for g, group in enumerate(named):
        for rank in range(ranks):
            flat = flats.setdefault((rank, g), [])
            for name, shape in group.items():
                share = math.ceil(math.prod(shape) / ranks)
                own = [(name, i) for i in range(math.prod(shape))][rank * share : (rank + 1) * share]
                flat += own + [None] * (share - len(own))
    optim = stage_3_tree([len(flats[0, g]) for g in range(len(named))], ranks)
    layout = zero_checkpoint(
        read_model_states(model_tree(named, ranks, stage3=True), file="m"), read_optim_states(optim, file="o")
    )
    assert layout.stage == 3
    for g, group in enumerate(named):
        check_pieces_against(layout, group, lambda rank, start, g=g: flats[rank, g][start])


def check_pieces_against(layout: Any, named: dict[str, tuple[int, ...]], element: Callable[..., Any]) -> None:
    for name, shape in named.items():
        got = [
            (piece.run.start + i, element(piece.rank, piece.start + i))
            for piece in layout.pieces(name)
            for i in range(piece.run.length)
        ]
        assert got == [(i, (name, i)) for i in range(math.prod(shape))]
        for piece in layout.pieces(name):
            assert layout.pieces(name, {piece.rank}) == [piece]
            assert list(layout.holders(name, piece.run)) == [piece.rank]
        everybody = [piece.rank for piece in layout.pieces(name)]
        assert list(layout.holders(name, Run(0, math.prod(shape)))) == everybody


def unpacked(tmp_path: Path, stage: int) -> Path:
    return unpack_zero(stage, tmp_path) / "step3"


def read_all(folder: Path, stage: int, ranks: range = range(4)) -> ZeroContents:
    models = {}
    optims = {}
    for rank in ranks:
        name = model_file(rank, partitioned=stage == 3)
        if stage == 3 or rank == 0:
            models[rank] = read_model_states(read_index(folder / name).tree, file=name)
        name = OptimNaming("bf16_").name(rank)
        optims[rank] = read_optim_states(read_index(folder / name).tree, file=name)
    return zero_contents(models, optims, weights_only=False)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_real_checkpoint_is_understood_from_rank_0s_files_alone(tmp_path: Path, stage: int) -> None:
    folder = unpacked(tmp_path, stage)
    whole = read_all(folder, stage)
    layout = whole.checkpoint
    assert (layout.stage, layout.world_size) == (stage, 4)
    assert layout.kinds == ("fp32", "exp_avg", "exp_avg_sq")
    assert layout.aliases == {"head.weight": "wte.weight"}
    assert layout.find("head.weight") == layout.parameters["wte.weight"]
    assert layout.group_of == {0: 0, 1: 1}
    alone = read_all(folder, stage, range(1))
    assert alone.checkpoint == layout
    for name, parameter in layout.parameters.items():
        if not parameter.frozen or stage == 3:
            assert sum(piece.run.length for piece in layout.pieces(name)) == parameter.numel
    # A rank whose file was not read is named when it is asked for.
    name = "blocks.1.down.weight"
    slot = layout.pieces(name)[-1]
    assert slot.rank == 3
    memory = Memory("here", "float32", (slot.run.length,), (1,), plain=True)
    for contents, ranks in (
        (whole, None),
        (read_all(folder, stage, range(3)), "rank 3"),
        (alone, "ranks? .*3"),
    ):
        tensor = partitioned(contents, layout.parameters[name], ["exp_avg"])["exp_avg"]
        assert tensor.shape == layout.parameters[name].shape
        copies = copies_into(tensor, Laid(slot.run, 0, (1,)), memory, name=f"exp_avg/{name}")
        if ranks is None:
            assert [copy.storage.file for copy in copies] == [str(folder / OptimNaming("bf16_").name(3))]
        else:
            told = f"^exp_avg/{name} lies partly in the files of saved {ranks}, which were not read"
            with pytest.raises(LayoutError, match=told):
                list(copies)
    if stage == 3:
        assert layout.parameters["frozen.weight"].frozen
        assert [p.run.length for p in layout.pieces("frozen.weight")] == [66] * 4


@pytest.mark.parametrize("stage", [1, 3])
def test_ignore_keys_see_composers_layout(tmp_path: Path, stage: int) -> None:
    contents = read_all(unpacked(tmp_path, stage), stage)
    demand = Demand(Position(0, 4), optimizers=("AdamW",), schedulers=("WarmupLR",))
    saved = zero_saved(contents, demand, name="z")
    tree = saved.as_tree()
    assert set(tree) == {"rng", "epoch", "state"}
    assert set(tree["state"]) == {"model", "optimizers", "schedulers", "engine"}
    assert set(tree["state"]["model"]) == set(contents.models[0].module)
    head = tree["state"]["model"]["head.weight"]
    assert isinstance(head, SavedTensor)
    assert (head.whole is None) == (stage == 3)
    assert head.shape == (97, 24)
    assert tree["state"]["model"]["count"].whole is not None
    adam = tree["state"]["optimizers"]["AdamW"]
    assert adam["state"]["odd"]["exp_avg"].shape == (7,)
    assert [group["params"][0] for group in adam["param_groups"]] == ["wte.weight", "odd"]
    assert "step" in adam["state"]["odd"]
    # The versions of the submodules come along, by which their own loading may go.
    assert saved.state["model"]._metadata.keys() >= {"", "head"}
    # Empty tensors are parameters that lie elsewhere, or were left out; extra state may be one too.
    model = contents.models[0]
    empty = {**model.module, "head._extra_state": tensor(0), "left.out": tensor(0)}
    more = zero_saved(
        replace(contents, models={**contents.models, 0: replace(model, module=empty)}), demand, name="z"
    )
    assert set(more.state["model"]) - set(empty) == set()
    assert "head._extra_state" in more.state["model"]
    assert ("left.out" in more.state["model"]) == (stage == 1)
    assert adam["state"]["odd"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    kept = ignore(
        tree,
        [
            "state/model/frozen*",
            "state/optimizers/*/state/odd/exp_avg",
            "state/optimizers/AdamW/param_groups/0",
            "*/schedulers",
            "state/engine/clip_grad",
            "state/engine/overflow",
        ],
    ).tree
    wanted = saved.with_tree(kept)
    assert wanted.whole is saved
    assert set(saved.state["model"]) - set(wanted.state["model"]) == {"frozen.weight"}
    left = wanted.state["optimizers"]["AdamW"]
    assert left["state"]["odd"].keys() == {"step", "exp_avg_sq"}
    assert all(left["state"][name] == adam["state"][name] for name in adam["state"] if name != "odd")
    # A group is identified by its first parameter: those that are left out shift the others.
    assert [group["params"][0] for group in left["param_groups"]] == ["odd"]
    assert left["param_groups"][0]["betas"] == (0.9, 0.999)
    assert "schedulers" not in wanted.state
    assert saved.state["schedulers"] == {"WarmupLR": {"last_batch_iteration": 2}}
    assert saved.engine_schedulers == {"WarmupLR"}
    assert "overflow" in saved.state["engine"]
    assert "overflow" not in wanted.state["engine"]
    only = zero_saved(contents, Demand(Position(0, 4), weights_only=True), name="z")
    assert set(only.as_tree()) == {"state", "epoch"}
    assert set(only.state) == {"model"}
    assert only.engine_schedulers == frozenset()


GROUPS = [{"a": (3, 4), "b": (5,)}, {"c": ()}]


def read_model(change: Callable[[dict[str, Any]], None] = lambda tree: None, **options: Any) -> Any:
    tree = copy.deepcopy(model_tree(GROUPS, 2, **options))
    change(tree)
    return read_model_states(tree, file="model.pt")


def read_optim(change: Callable[[dict[str, Any]], None] = lambda tree: None) -> Any:
    tree = optim_tree([10, 2], 2, paddings=[3, 1])
    change(tree["optimizer_state_dict"])
    return read_optim_states(tree, file="optim.pt")


def test_trimmed_elastic_and_untrimmed_partitions_are_all_understood() -> None:
    model = read_model()
    usual = zero_checkpoint(model, read_optim())

    def elastic(inner: dict[str, Any]) -> None:
        inner["base_optimizer_state"] = [
            {"step": tensor(), "exp_avg": tensor(7), "exp_avg_sq": tensor(7)},
            {"step": tensor(), "exp_avg": tensor(1), "exp_avg_sq": tensor(1)},
        ]

    def bf16_optimizer(inner: dict[str, Any]) -> None:
        del inner["zero_stage"]
        inner["single_partition_of_fp32_groups"] = [tensor(10), tensor(2)]
        inner["group_paddings"] = [0, 0]

    def old(inner: dict[str, Any]) -> None:
        inner["partition_count"] = 2
        inner["zero_stage"] = 1

    for change in (elastic, bf16_optimizer, old):
        assert zero_checkpoint(model, read_optim(change)) == usual
    assert read_optim(elastic).groups is None
    assert read_optim(bf16_optimizer).writer == "bf16"
    assert read_optim().scalars[0]["step"].shape == ()


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_set("dp_world_size", to=0), CorruptError, "dp_world_size holds 0"),
        (_set("dp_world_size", to=True), CorruptError, "whole number"),
        (_set("param_shapes", to={"a": 3}), CorruptError, "param_shapes .*expected a list"),
        (_set("param_shapes", 0, "a", to=(3, -4)), CorruptError, "param_shapes/0/a"),
        (_set("param_shapes", 1, "a", to=(3, 4)), CorruptError, "each parameter in one group"),
        (
            _set("param_shapes", 0, "a", to=(4, 4)),
            CorruptError,
            "module/a holds .*expected a tensor of shape",
        ),
        (_set("module", "a", to=None), CorruptError, "module/a holds None, expected a tensor"),
        (_set("module", "a", to=tensor(0)), CorruptError, "either all parameters or none"),
        (_set("shared_params", to=["a"]), CorruptError, "shared_params"),
        (_set("global_steps", to=-1), CorruptError, "global_steps"),
        (_set("global_steps", to="3"), CorruptError, "global_steps"),
        (_set("num_experts", to=4), LayoutError, "older DeepSpeed"),
        (_set("num_experts", to=[0]), CorruptError, "num_experts holds 0"),
        (_set("module", to=[]), CorruptError, "module holds a list"),
        (_set("mp_world_size", to=0), CorruptError, "mp_world_size holds 0"),
        (_set("checkpoint_parallel_dimensions", to={"pp_degree": 0}), CorruptError, "pp_degree holds 0"),
    ],
)
def test_model_files_that_cannot_be_are_refused(
    change: Callable[[Any], None], kind: type[RankloadError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        read_model(change)
    assert caught.value.path == "model.pt"
    assert "model.pt" in caught.value.message


BASE = "base_optimizer_state"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (_set("single_partition_of_fp32_groups", 0, to=tensor(8)), CorruptError, "fp32 of flat tensor 0"),
        (_set(BASE, "state", 0, "exp_avg", to=tensor(12)), CorruptError, "exp_avg of flat tensor 0"),
        (_set(BASE, "state", 0, "exp_avg", to=tensor(6)), LayoutError, "element by element"),
        (_set(BASE, "state", 0, "exp_avg", to=tensor(5, 2)), LayoutError, "element by element"),
        (
            _set(BASE, "state", 0, "exp_avg", to=InertObject("a.b")),
            LayoutError,
            "exp_avg holds a a.b",
        ),
        (_set(BASE, "state", 7, to={}), CorruptError, "index below 2"),
        (_set(BASE, "param_groups", 0, "params", to=[1]), CorruptError, "params"),
        (_set("zero_stage", to=3), CorruptError, "stage 1 or 2"),
        (_set("group_paddings", to=[0]), CorruptError, "group_paddings"),
        (_set("group_paddings", to=[-1, 0]), CorruptError, "group_paddings"),
        (_set("partition_count", to=[2, 1]), LayoutError, "only a group of experts"),
        (_set("partition_count", to=[4, 4]), LayoutError, "4, 4"),
        (_set("param_alignment_paddings", to=[[0], [0]]), CorruptError, "param_alignment_paddings/0"),
    ],
)
def test_optimizer_files_that_cannot_be_are_refused(
    change: Callable[[Any], None], kind: type[RankloadError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        zero_checkpoint(read_model(), read_optim(change))
    assert caught.value.path == "optim.pt"


def test_files_of_other_kinds_are_told_by_their_keys() -> None:
    with pytest.raises(FormatError, match="DeepSpeed model_states"):
        read_model_states({"state": {}}, file="x.pt")
    with pytest.raises(FormatError, match="optim_states"):
        read_optim_states([], file="x.pt")
    with pytest.raises(FormatError, match="'whatever'"):
        read_optim_states({"optimizer_state_dict": {"whatever": 1}}, file="x.pt")
    stage_3 = read_optim_states(stage_3_tree([9, 1], 2), file="o3.pt")
    with pytest.raises(CorruptError, match=r"stage 3.*not of one checkpoint"):
        zero_checkpoint(read_model(), stage_3)
    with pytest.raises(CorruptError, match="fp32 of flat tensor 0"):
        zero_checkpoint(read_model(stage3=True), read_optim_states(stage_3_tree([8, 1], 2), file="o3.pt"))
    with pytest.raises(LayoutError, match="partitioned over 4 ranks"):
        zero_checkpoint(read_model(stage3=True), read_optim_states(stage_3_tree([9, 1], 4), file="o3.pt"))


def test_files_that_were_not_saved_together_are_refused() -> None:
    models = {0: read_model(stage3=True), 1: read_model(_set("global_steps", to=4), stage3=True)}
    optims = {0: read_optim_states(stage_3_tree([9, 1], 2), file="o3.pt")}
    with pytest.raises(CorruptError, match="differ in their global_steps"):
        zero_contents(models, optims, weights_only=False)


def whole_optimizer(shapes: list[tuple[int, ...]], groups: list[list[int]]) -> dict[str, Any]:
    return {
        "state": {i: {"step": tensor(), "exp_avg": tensor(*shape)} for i, shape in enumerate(shapes)},
        "param_groups": [{"lr": 0.1, "params": members} for members in groups],
    }


def test_stage_0_takes_its_names_from_the_jobs_optimizer() -> None:
    tree = whole_optimizer([(2, 3), (5,), ()], [[0, 1], [2]])

    def stage_0(top: dict[str, Any]) -> None:
        top.update(param_shapes=None, optimizer=tree)

    contents = zero_contents({0: read_model(stage_0)}, {}, weights_only=False)
    assert contents.checkpoint.stage == 0
    seen = zero_saved(contents, Demand(Position(0, 1), optimizers=("AdamW",)), name="z")
    assert list(seen.state["optimizers"]["AdamW"]["state"]) == [0, 1, 2]
    assert seen.masters == {}
    optim = read_whole_optimizer(tree, file="model.pt")
    layout = named_by_optimizer(contents.checkpoint, optim, [[("a", (2, 3)), ("b", (5,))], [("c", ())]])
    assert {name: layout.parameters[name].group for name in "abc"} == {"a": 0, "b": 1, "c": 2}
    assert layout.pieces("a") == [Slot(0, 0, Run(0, 6))]
    with pytest.raises(LayoutError, match=r"groups of \[2, 1\] parameters, this job's of \[3\]"):
        named_by_optimizer(contents.checkpoint, optim, [[("a", (2, 3)), ("b", (5,)), ("c", ())]])
    with pytest.raises(LayoutError, match=r"exp_avg of the optimizer's parameter 1 has shape \(5,\), but x"):
        named_by_optimizer(contents.checkpoint, optim, [[("a", (2, 3)), ("x", (6,))], [("c", ())]])


def test_file_names_are_derived() -> None:
    assert model_file(3, partitioned=True) == "zero_pp_rank_3_mp_rank_00_model_states.pt"
    assert model_file(3, partitioned=False) == "mp_rank_00_model_states.pt"
    assert [naming.name(0) for naming in optim_namings(bf16=False)] == [
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_0_mp_rank_00optim_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00optim_states.pt",
    ]
    assert next(optim_namings(bf16=True)).prefix == "bf16_"
    naming = OptimNaming("bf16_")
    whole, first = model_file(0, partitioned=False), model_file(0, partitioned=True)
    assert Needed().files(partitioned=False, naming=None) == (whole,)
    both = Needed(frozenset({0, 2}), frozenset({10, 1}))
    assert both.files(partitioned=False, naming=naming) == (whole, naming.name(1), naming.name(10))
    assert both.files(partitioned=True, naming=naming) == (
        first,
        model_file(2, partitioned=True),
        naming.name(1),
        naming.name(10),
    )
    assert both - Needed() == Needed(frozenset({2}), frozenset({10, 1}))
    assert not both - both
    assert Needed() | Needed(frozenset({2}), frozenset({1, 10})) == both
