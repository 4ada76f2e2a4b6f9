"""Opening ZeRO checkpoints without a load: which files are read for which demand, and what comes out of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_files import LocalFiles
from rankload.loader.errors import CorruptError, LayoutError, NotFoundError
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.demand import Demand, ParameterDemand
from rankload.loader.saved.masters import name_masters
from rankload.loader.saved.model_parallel import ExpertLayer, LayerFile, ParallelLayout, Position
from rankload.loader.saved.partitions import shares
from rankload.loader.saved.regions import Run
from rankload.loader.saved.tensor import SavedTensor, StorageRef, Unread
from rankload.loader.sources.kinds import source_of
from rankload.loader.sources.single_file import SingleFile
from rankload.loader.sources.zero.contents import zero_contents
from rankload.loader.sources.zero.file_names import OptimNaming, model_file
from rankload.loader.sources.zero.layers import with_layers
from rankload.loader.sources.zero.layout import ZeroCheckpoint
from rankload.loader.sources.zero.model_states import read_model_states
from rankload.loader.sources.zero.open import Zero
from rankload.loader.sources.zero.optim_states import read_optim_states
from rankload.loader.sources.zero.tree import zero_saved
from safetensors.torch import load_file
from zero_folders import unpack_zero
from zero_trees import model_tree, optim_tree, tensor

EVERYTHING = Demand(Position(0, 2), optimizers=("AdamW",), schedulers=("WarmupLR",))
BF16 = OptimNaming("bf16_")


def real(found: SavedTensor) -> torch.Tensor:
    """Its elements, read piece by piece from the files."""
    dtype = getattr(torch, found.dtype)
    flat = torch.empty(found.numel, dtype=dtype)
    for piece in found.pieces:
        assert isinstance(piece.storage, StorageRef)
        with open(piece.storage.file, "rb") as file:
            file.seek(piece.storage.offset)
            storage = torch.frombuffer(bytearray(file.read(piece.storage.nbytes)), dtype=dtype)
        if isinstance(piece.region, Run):
            part = storage.as_strided((piece.region.length,), piece.stride, piece.offset)
            flat[piece.region.start : piece.region.stop] = part
        else:
            flat = storage.as_strided(piece.region.sizes, piece.stride, piece.offset).reshape(-1)
    return flat.view(found.shape)


def check_against(oracle: dict[str, torch.Tensor], saved: Saved, optimizer: str) -> None:
    """Every tensor of `saved`; `oracle` has them as float32, and the module's were bfloat16."""
    model, states = saved.state["model"], saved.state["optimizers"][optimizer]["state"]
    seen = set()
    for name, expected in oracle.items():
        kind, _, parameter = name.partition("/")
        if kind in ("module", "buffer"):
            got = real(model[parameter])
            got = got.to(torch.bfloat16) if kind == "module" else got
        else:
            got = real(saved.masters[parameter] if kind == "fp32" else states[parameter][kind])
        assert torch.equal(got.float(), expected), name
        seen.add(name)
    assert {f"fp32/{name}" for name in saved.masters} - seen == {"fp32/head.weight"}
    assert {f"{key}/{name}" for name, own in states.items() for key in own if key != "step"} <= seen


@pytest.mark.parametrize("stage", [1, 3])
def test_all_of_a_folder(stage: int, tmp_path: Path) -> None:
    root = unpack_zero(stage, tmp_path)
    files = LocalFiles(root / "step3")
    source = source_of(files)
    assert isinstance(source, Zero)
    saved = source.open(files, EVERYTHING)
    check_against(load_file(root / "oracle.safetensors"), saved, "AdamW")
    assert (saved.name, saved.kind, saved.layout) == (str(root / "step3"), "deepspeed", "deepspeed")
    assert (saved.world_size, saved.data_parallel_size) == (4, 4)
    assert saved.aliases == {"head.weight": "wte.weight"}
    assert saved.masters["head.weight"] is saved.masters["wte.weight"]
    assert (saved.masters["odd"] is saved.state["model"]["odd"]) == (stage == 3)
    assert "frozen.weight" not in saved.masters
    assert saved.engine_schedulers == set(saved.state["schedulers"]) == {"WarmupLR"}
    assert saved.state["engine"]["global_steps"] == 3
    assert saved.extra == {"epoch": 3}
    assert len(saved.rng or []) == 1
    assert (saved.rng_per_rank, saved.own_rng) == (stage == 3, True)
    assert saved.notes == ("resharded from 4 ranks to 2 ranks",)
    wanted = {BF16.name(rank) for rank in range(4)}
    wanted |= {model_file(rank, partitioned=True) for rank in range(1, 4)} if stage == 3 else set()
    assert set(files.fetched) == wanted
    assert files.stages == [
        "read first",
        "find optimizer file of rank 0",
        "fetch",
        "read",
        "further files",
        "read states",
    ]
    last = Zero().open(LocalFiles(root / "step3"), replace(EVERYTHING, position=Position(3, 4)))
    assert last.own_rng == (stage == 3)
    assert last.notes == ()


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_alone(stage: int, tmp_path: Path) -> None:
    files = LocalFiles(unpack_zero(stage, tmp_path) / "step3")
    saved = Zero().open(files, Demand(Position(1, 2), weights_only=True))
    assert set(saved.state) == {"model"}
    assert (saved.rng, saved.extra, saved.engine_schedulers) == (None, {"epoch": 3}, frozenset())
    assert bool(files.fetched) == (stage == 3)
    assert bool(saved.masters) == (stage == 3)
    assert bool(saved.notes) == (stage == 3)


def engine_demand(saved: Saved, runs: Callable[[int], tuple[Run, ...]], dtype: str, **other: Any) -> Demand:
    """What a rank demands that updates and computes with `runs` of each trained parameter of `saved`."""
    parameters = {
        name: ParameterDemand(value.shape, dtype, runs(value.numel), runs(value.numel))
        for name, value in saved.state["model"].items()
        if name in saved.masters and name not in saved.aliases
    }
    aliases = {alias: owner for alias, owner in saved.aliases.items() if owner in parameters}
    return replace(EVERYTHING, parameters=parameters, aliases=aliases, **other)


def own_share(rank: int, world_size: int) -> Callable[[int], tuple[Run, ...]]:
    def runs(numel: int) -> tuple[Run, ...]:
        return tuple(slot.run for slot in shares(numel, world_size, 0) if slot.rank == rank)

    return runs


def test_only_the_files_that_have_wanted_elements_are_read(tmp_path: Path) -> None:
    """Rank 1 of 2 keeps the second half of each parameter: at stage 3 that of saved ranks 2 and 3."""
    folder = unpack_zero(3, tmp_path) / "step3"
    whole = Zero().open(LocalFiles(folder), EVERYTHING)
    files = LocalFiles(folder)
    demand = engine_demand(whole, own_share(1, 2), "bfloat16", position=Position(1, 2))
    saved = Zero().open(files, demand)
    assert files.fetched[:3] == [model_file(rank, partitioned=True) for rank in (1, 2)] + [BF16.name(2)]
    assert BF16.name(3) in files.fetched[3:]
    assert BF16.name(0) not in files.fetched
    assert files.stages[-4:] == ["further files", "fetch others", "read others", "read states"]
    up = saved.masters["blocks.0.up.weight"]
    first, *rest = up.pieces
    assert isinstance(first.storage, Unread)
    assert first.storage.reason == "lies partly in the files of saved ranks 0 to 1, which were not read"
    assert first.region == Run(0, 72 * 24 // 2)
    expected = real(whole.masters["blocks.0.up.weight"]).flatten()
    got = real(replace(up, shape=(up.numel // 2,), pieces=tuple(map(_second_half, rest))))
    assert torch.equal(got, expected[up.numel // 2 :])


def _second_half(piece: Any) -> Any:
    region = Run(piece.region.start - 72 * 24 // 2, piece.region.length)
    return type(piece)(region, piece.offset, piece.stride, piece.storage)


@pytest.mark.parametrize(("dtype", "further"), [("bfloat16", False), ("float32", True)])
def test_a_module_of_another_dtype_takes_its_weights_from_the_masters(
    dtype: str, further: bool, tmp_path: Path
) -> None:
    """Below stage 3 the model file has what the module computes with, unless it is of another dtype."""
    folder = unpack_zero(1, tmp_path) / "step3"
    whole = Zero().open(LocalFiles(folder), EVERYTHING)
    demand = engine_demand(whole, lambda numel: (Run(0, numel),), dtype, position=Position(0, 4))
    parameters = {
        name: one._replace(updated=(Run(0, 1),) if name == "wte.weight" else ())
        for name, one in (demand.parameters or {}).items()
    }
    files = LocalFiles(folder)
    Zero().open(files, replace(demand, parameters=parameters))
    assert files.fetched[0] == BF16.name(0)
    assert bool(files.fetched[1:]) == further
    assert ("fetch others" in files.stages) == further
    files = LocalFiles(folder)
    other = {f"net.{name}": one for name, one in parameters.items()}
    renamed = {name: f"net.{name}" for name in parameters}
    aliases = {"net.head.weight": "net.wte.weight"}
    Zero().open(files, replace(demand, parameters=other, aliases=aliases, rename=renamed))
    assert bool(files.fetched[1:]) == further


def as_archives(folder: Path, target: Path, states: Any = None) -> list[Path]:
    """What Composer's archives of a stage 1 job would hold, once they are unpacked."""
    archives = [target / f"rank{rank}" for rank in range(4)]
    for rank, archive in enumerate(archives):
        (archive / "deepspeed").mkdir(parents=True)
        shutil.copy(folder / BF16.name(rank), archive / "deepspeed")
    shutil.copy(folder / model_file(0, partitioned=False), archives[0] / "deepspeed")
    if states is not None:
        torch.save(states, archives[0] / "composer_states.pt")
    return archives


def test_archives_and_what_composer_keeps_beside(tmp_path: Path) -> None:
    root = unpack_zero(1, tmp_path)
    states = {
        "state": {"timestamp": {"batch": 3}, "schedulers": {"Cosine": {"t": 1}}, "rank_zero_seed": 17},
        "rng": [{"python": rank} for rank in range(4)],
        "note": "kept",
    }
    archives = as_archives(root / "step3", tmp_path / "archives", states)
    files = LocalFiles(archives[0], archives=archives)
    assert isinstance(source_of(files), Zero)
    saved = Zero().open(files, EVERYTHING)
    check_against(load_file(root / "oracle.safetensors"), saved, "AdamW")
    assert (saved.name, saved.kind, saved.layout) == (str(archives[0]), "composer-zero", "composer")
    assert set(saved.state["schedulers"]) == {"Cosine", "WarmupLR"}
    assert saved.engine_schedulers == {"WarmupLR"}
    assert saved.state["timestamp"] == {"batch": 3}
    assert saved.rng == states["rng"]
    assert not saved.rng_per_rank
    assert saved.extra == {"epoch": 3, "note": "kept"}
    assert saved.rank_zero_seed == 17
    assert files.fetched == [str(one) for one in archives[1:]]
    assert "fetch: names" in files.stages
    weights = Zero().open(LocalFiles(archives[0], archives=archives), replace(EVERYTHING, weights_only=True))
    assert set(weights.state) == {"model"}
    assert (weights.layout, weights.rng) == ("deepspeed", None)


def test_archives_that_lack_files_or_are_of_split_models_are_refused(tmp_path: Path) -> None:
    archives = as_archives(unpack_zero(1, tmp_path) / "step3", tmp_path / "archives")
    saved = Zero().open(LocalFiles(archives[0], archives=archives), EVERYTHING)
    assert saved.layout == "deepspeed"
    with pytest.raises(LayoutError, match="first of 4 ranks' archives"):
        Zero().open(LocalFiles(archives[0], archives=archives[:2]), EVERYTHING)
    (archives[2] / "deepspeed" / BF16.name(2)).rename(archives[2] / "other")
    with pytest.raises(NotFoundError, match=rf"needs .*{BF16.name(2)}.*, which is not in .*rank2 \(other\)"):
        Zero().open(LocalFiles(archives[0], archives=archives), EVERYTHING)
    (archives[0] / "deepspeed" / model_file(0, partitioned=False)).unlink()
    with pytest.raises(NotFoundError, match=r"has no mp_rank_00_model_states.pt or zero_pp_rank_0_mp"):
        Zero().open(LocalFiles(archives[0], archives=archives), EVERYTHING)


def test_a_folder_that_lacks_files_or_is_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = unpack_zero(1, tmp_path) / "step3"
    split = Position(0, 2, 0, ParallelLayout(2, 2, 1, pipeline=True))
    with pytest.raises(
        LayoutError, match=r"with neither pipeline stages nor .*; this job's engine has 2 pipe"
    ):
        Zero().open(LocalFiles(folder), replace(EVERYTHING, position=split, parameters={}))
    experts = (ExpertLayer("moe", 0, 4, 2, 0),)
    with pytest.raises(LayoutError, match="without MoE layers, and this job has 1 MoE layer of 4 experts"):
        Zero().open(LocalFiles(folder), replace(EVERYTHING, parameters={}, experts=experts))
    (folder / BF16.name(3)).unlink()
    with pytest.raises(NotFoundError, match=r"zero_pp_rank_3_mp_rank_00_optim_states.pt is not there"):
        Zero().open(LocalFiles(folder), EVERYTHING)
    for rank in range(3):
        (folder / BF16.name(rank)).unlink()
    with pytest.raises(NotFoundError, match=r"step3 has no optimizer file of rank 0; looked for bf16_zero"):
        Zero().open(LocalFiles(folder), EVERYTHING)


def test_what_is_no_zero_checkpoint_is_a_single_file(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": {}, "param_groups": []}, "n": 1}, path)
    files = LocalFiles(path)
    assert isinstance(source_of(files), SingleFile)
    saved = source_of(files).open(
        files, replace(EVERYTHING, layout={"model": "model", "optimizer": "optimizer"})
    )
    assert (saved.name, saved.kind, saved.layout) == (str(path), "monolithic", "hand-written")
    assert list(saved.state["optimizers"]) == ["AdamW"]
    assert (saved.world_size, saved.data_parallel_size, saved.masters) == (None, None, {})
    assert torch.equal(real(saved.state["model"]["w"]), torch.ones(2))


# --- made-up files ---------------------------------------------------------------------------------------------------


def stage_0(with_masters: bool) -> Any:
    shapes = [(2, 3), (5,)]
    inner = {
        "state": {i: {"step": tensor(), "exp_avg": tensor(*shape)} for i, shape in enumerate(shapes)},
        "param_groups": [{"lr": 0.1, "params": [0, 1]}],
    }
    masters = [[tensor(*shape) for shape in shapes]]
    tree = model_tree([{"a": (2, 3), "b": (5,)}], 2)
    optimizer = {"optimizer_state_dict": inner, "fp32_groups": masters} if with_masters else inner
    tree.update(param_shapes=None, optimizer=optimizer, shared_params={"tied": "a"})
    tree["module"]["tied"] = tree["module"]["a"]
    return read_model_states(tree, file="model.pt"), masters[0]


GROUPS = ((("a", (2, 3)), ("b", (5,))),)


def test_stage_0_for_an_engine_has_its_names() -> None:
    model, masters = stage_0(with_masters=True)
    contents = zero_contents({0: model}, {}, weights_only=False)
    demand = replace(EVERYTHING, parameters={}, groups=GROUPS)
    saved = zero_saved(contents, demand, name="z")
    optimizer = saved.state["optimizers"]["AdamW"]
    assert list(optimizer["state"]) == ["a", "b"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": ["a", "b"]}]
    assert optimizer["state"]["b"]["exp_avg"].whole is not None
    assert saved.masters == {"a": masters[0], "b": masters[1], "tied": masters[0]}
    with pytest.raises(LayoutError, match=r"groups of \[2\] parameters, this job's of \[1\]"):
        zero_saved(contents, replace(demand, groups=((("a", (2, 3)),),)), name="z")


@pytest.mark.parametrize(
    ("prefix", "rename"),
    [("_checkpoint_wrapped_module.", {}), ("module._orig_mod.", {}), ("net.", {"": "net."})],
)
def test_stage_0_for_an_engine_of_other_names_has_the_checkpoints(
    prefix: str, rename: dict[str, str]
) -> None:
    model, masters = stage_0(with_masters=True)
    contents = zero_contents({0: model}, {}, weights_only=False)
    asked = {f"{prefix}{name}": ParameterDemand(shape, "float32") for name, shape in GROUPS[0]}
    groups = (tuple((f"{prefix}{name}", shape) for name, shape in GROUPS[0]),)
    demand = replace(EVERYTHING, parameters=asked, groups=groups, rename=rename)
    saved = zero_saved(contents, demand, name="z")
    assert list(saved.state["optimizers"]["AdamW"]["state"]) == ["a", "b"]
    assert saved.masters == {"a": masters[0], "b": masters[1], "tied": masters[0]}
    # Where this job ties other names, the owner of the saved state counts all the same.
    alias = replace(demand, parameters={f"{prefix}x": asked[f"{prefix}a"], f"{prefix}b": asked[f"{prefix}b"]})
    alias = replace(
        alias, aliases={f"{prefix}tied": f"{prefix}x"}, groups=(((f"{prefix}x", (2, 3)), groups[0][1]),)
    )
    assert list(zero_saved(contents, alias, name="z").state["optimizers"]["AdamW"]["state"]) == ["a", "b"]
    apart = replace(demand, parameters=None)
    named = name_masters(zero_saved(contents, apart, name="z"), groups, rename)
    assert named.masters == {"a": masters[0], "b": masters[1]}


def test_stage_0_for_another_target_keeps_its_numbers_and_gives_masters() -> None:
    model, masters = stage_0(with_masters=True)
    contents = zero_contents({0: model}, {}, weights_only=False)
    saved = zero_saved(contents, EVERYTHING, name="z")
    assert list(saved.state["optimizers"]["AdamW"]["state"]) == [0, 1]
    assert (saved.masters, saved.unnamed_masters) == ({}, ((masters[0], masters[1]),))
    # Only the job's optimizer knows their names, as it is when the restore is planned.
    assert name_masters(saved, GROUPS).masters == {"a": masters[0], "b": masters[1]}
    # A master of one element may have been kept with a dimension less.
    small = replace(
        saved, unnamed_masters=((SavedTensor.in_storage(masters[0].storages[0], "float32", (1,), (1,)),),)
    )
    scalar = {**saved.state, "model": {"a": small.unnamed_masters[0][0]}}
    assert list(name_masters(replace(small, state=scalar), [[("a", ())]]).masters) == ["a"]
    assert name_masters(saved, ()) is saved
    without = saved.with_tree({"state": {"optimizers": saved.state["optimizers"]}})
    assert name_masters(without, [[("c", (1,))]]) is without
    with pytest.raises(LayoutError, match=r"groups of \[2\] parameters, this job's of \[1\]"):
        name_masters(saved, [[("a", (4, 2))]])
    named = zero_saved(contents, replace(EVERYTHING, parameters={}, groups=GROUPS), name="z")
    expected = {"a": masters[0], "b": masters[1], "tied": masters[0]}
    assert (named.masters, named.unnamed_masters) == (expected, ())
    plain = zero_contents({0: stage_0(with_masters=False)[0]}, {}, weights_only=False)
    assert zero_saved(plain, EVERYTHING, name="z").unnamed_masters == ()
    assert zero_saved(plain, replace(EVERYTHING, parameters={}, groups=GROUPS), name="z").masters == {}
    # Where the optimizer is left out, its groups may be others than this job's; masters still need them.
    left_out = replace(EVERYTHING, parameters={}, groups=((("b", (5,)),),), optimizer=False)
    assert list(zero_saved(plain, left_out, name="z").state["optimizers"]["AdamW"]["state"]) == [0, 1]
    with pytest.raises(LayoutError, match=r"groups of \[2\] parameters, this job's of \[1\]"):
        zero_saved(contents, left_out, name="z")


def test_masters_stand_in_for_what_no_layer_file_has() -> None:
    """Of a pipeline's stage: a loss function's parameters, say."""
    tree = {
        **model_tree([], 1),
        "module": None,
        "param_shapes": [{"3.up": (3, 2), "loss_fn.scale": (2,)}],
        "mp_world_size": 2,
        "checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1},
    }
    bare = read_model_states(tree, file="mp_rank_01")
    up = tensor(3, 2, dtype="bfloat16")
    model = with_layers(bare, [(LayerFile("layer_03", "3."), {"up": up}, "layer_03")])
    optims = {0: read_optim_states(optim_tree([8], 1), file="optim")}
    position = Position(0, 1, 1, ParallelLayout(2, 2, 1, pipeline=True))
    contents = zero_contents({0: model}, optims, weights_only=False)
    saved = zero_saved(contents, replace(EVERYTHING, position=position), name="z")
    assert saved.state["model"]["3.up"] is up
    assert saved.masters["loss_fn.scale"] is saved.state["model"]["loss_fn.scale"]
    assert saved.masters["3.up"].pieces[0].region == Run(0, 6)
    assert (saved.world_size, saved.data_parallel_size, saved.rng_per_rank) == (2, 1, True)
    assert saved.notes == (f"each rank restores its own part of the model: {position.layout}",)
    weights = zero_contents({0: model}, {}, weights_only=True)
    assert set(zero_saved(weights, Demand(position, weights_only=True), name="z").state["model"]) == {"3.up"}


def test_a_pipelines_layer_files_are_read_with_the_stages_own(tmp_path: Path) -> None:
    """Weights alone come from the layer files whatever the number of stages, and else from the same stage's files."""
    layout = ParallelLayout(2, 2, 1, pipeline=True)
    tree = {
        "module": None, "param_shapes": [{"0.up": (3,)}], "dp_world_size": 1, "mp_world_size": 2,
        "checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1}, "global_steps": 3, "skipped_steps": 0,
    }  # fmt: skip
    torch.save(tree, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({**tree, "param_shapes": [{"1.up": (3,)}]}, tmp_path / "mp_rank_01_model_states.pt")
    for layer in (0, 1):
        torch.save({"up": torch.full((3,), layer)}, tmp_path / f"layer_{layer:02d}-model_states.pt")
    optim = {
        "zero_stage": 1, "loss_scaler": None, "partition_count": 1, "group_paddings": [1],
        "single_partition_of_fp32_groups": [torch.ones(3)],
        "base_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
    }  # fmt: skip
    torch.save({"optimizer_state_dict": optim}, tmp_path / OptimNaming().name(0, 1))
    torch.save({"optimizer_state_dict": optim}, tmp_path / OptimNaming().name(0, 0))
    layers = (LayerFile("layer_01-model_states.pt", "1."),)
    kept = {"1.up": ParameterDemand((3,), "float32", (Run(0, 3),), (Run(0, 3),))}
    demand = Demand(Position(0, 1, 1, layout), parameters=kept, groups=((("1.up", (3,)),),), layers=layers)
    files = LocalFiles(tmp_path)
    saved = Zero().open(files, demand)
    assert files.fetched == [
        "mp_rank_01_model_states.pt",
        OptimNaming().name(0, 1),
        "layer_01-model_states.pt",
    ]
    assert real(saved.state["model"]["1.up"]).tolist() == [1, 1, 1]
    others = replace(demand, groups=((("2.up", (3,)),),))
    with pytest.raises(LayoutError, match="trained the layers 1 and trains 2 in this job"):
        Zero().open(LocalFiles(tmp_path), others)
    Zero().open(LocalFiles(tmp_path), replace(others, rename={"a": "b"}))
    # A job of four stages takes weights alone, by the first stage's model file.
    four = Position(0, 1, 3, ParallelLayout(4, 4, 1, pipeline=True))
    files = LocalFiles(tmp_path)
    saved = Zero().open(files, replace(demand, position=four, weights_only=True))
    assert files.fetched == ["layer_01-model_states.pt"]
    assert real(saved.state["model"]["1.up"]).tolist() == [1, 1, 1]
    with pytest.raises(LayoutError, match=r"with 2 pipeline stages .* engine has 4 pipeline stages"):
        Zero().open(LocalFiles(tmp_path), replace(demand, position=four))


def test_a_layout_that_does_not_hold_a_parameter_is_damage() -> None:
    model = read_model_states(model_tree([{"a": (2, 3), "b": (5,)}], 2), file="model.pt")
    optims = {0: read_optim_states(optim_tree([6], 2), file="optim.pt")}
    contents = zero_contents({0: model}, optims, weights_only=False)
    small: ZeroCheckpoint = replace(contents.checkpoint, partition_numel=(4,))
    assert math.prod((2, 3)) + 5 > 2 * 4
    with pytest.raises(CorruptError, match=r"model.pt: fp32, .* of b: elements \[6, 11\) do not lie"):
        zero_saved(replace(contents, checkpoint=small), EVERYTHING, name="z")
