"""Checkpoints of split models: pipeline stages and tensor parallelism. parallel_worker.py says what is held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from deepspeed_ranks import ENVIRONMENT, needs_deepspeed
from http_server import Served, counting_server
from places import DATA, SUPPORT
from processes import run_ranks
from rankload.loader.errors import CorruptError, LayoutError
from rankload.loader.saved.model_parallel import UNSPLIT, LayerFile, ParallelLayout
from rankload.loader.sources.zero.fields import Field
from rankload.loader.sources.zero.file_names import Needed, OptimNaming, model_file
from rankload.loader.sources.zero.layers import check_layers, read_layer, with_layers
from rankload.loader.sources.zero.model_parallel import check_layout, check_model_part, saved_layout
from rankload.loader.sources.zero.model_states import ModelStates, read_model_states
from zero_folders import unpack_zero
from zero_trees import tensor

WORKER = SUPPORT / "parallel_worker.py"
CORE = ("pipeline 1 bf16", "tensor 2 bf16", "tensor 3 bf16")
FURTHER = (
    "pipeline 0 fp32", "pipeline 1 fp32", "pipeline 1 BF16_Optimizer", "pipeline and tensor 1 bf16", "tensor 0 fp32",
    "tensor 0 bf16", "tensor 1 bf16",
)  # fmt: skip
OTHER_SETTINGS = (
    ("pipeline 1 bf16", "pipeline 1 fp32"),
    ("pipeline 1 fp32", "pipeline 1 BF16_Optimizer"),
    ("tensor 0 bf16", "tensor 3 bf16"),
    ("tensor 3 bf16", "tensor 0 fp32"),
    ("tensor 2 bf16", "tensor 3 bf16"),
    ("tensor 3 bf16", "tensor 1 bf16"),
)

# --- what files tell -------------------------------------------------------------------------------------------------


def stage_states(part: int, shapes: dict[str, tuple[int, ...]], **changes: Any) -> ModelStates:
    tree = {
        "module": None,
        "param_shapes": [shapes],
        "dp_world_size": 2,
        "mp_world_size": 2,
        "checkpoint_parallel_dimensions": {"pp_degree": 2, "tp_degree": 1},
        "global_steps": 3,
        "skipped_steps": 0,
        "epoch": 1,
        **changes,
    }
    return read_model_states(tree, file=f"mp_rank_{part:02d}")


def test_names_of_parts_files() -> None:
    assert model_file(0, partitioned=False, part=1) == "mp_rank_01_model_states.pt"
    assert model_file(2, partitioned=True, part=11) == "zero_pp_rank_2_mp_rank_11_model_states.pt"
    assert Needed(frozenset({0}), frozenset({1})).files(
        partitioned=False, naming=OptimNaming("bf16_"), part=3
    ) == ("mp_rank_03_model_states.pt", "bf16_zero_pp_rank_1_mp_rank_03_optim_states.pt")


def test_a_stages_file_tells_the_layout_and_takes_its_layers() -> None:
    states = stage_states(
        1, {"tied_modules.embed.weight": (5, 2), "4.up.weight": (3, 2), "loss_fn.scale": (1,)}
    )
    assert states.layout == ParallelLayout(2, 2, 1, pipeline=True)
    assert not states.partitioned
    assert states.client_state == {"epoch": 1}
    layers = [
        (
            LayerFile("layer_00", "tied_modules.embed."),
            {"weight": tensor(5, 2), "scale": tensor(3)},
            "layer_00",
        ),
        (LayerFile("layer_04", "4."), {"up.weight": tensor(3, 2)}, "layer_04"),
    ]
    found = with_layers(states, layers)
    assert list(found.module) == ["tied_modules.embed.weight", "tied_modules.embed.scale", "4.up.weight"]
    check_layers(states, ["4.up.weight", "tied_modules.embed.weight"])
    with pytest.raises(LayoutError, match=r"trained the layers 4 and trains 3, 4 in this job"):
        check_layers(states, ["4.up.weight", "3.up.weight"])
    layers[1] = (layers[1][0], {"up.weight": tensor(2, 2)}, "layer_04")
    with pytest.raises(
        CorruptError, match=r"layer_04: up.weight .* expected shape \(3, 2\), as mp_rank_01 tells"
    ):
        with_layers(states, layers)
    with pytest.raises(CorruptError, match="layer_04: the file holds"):
        read_layer([1], file="layer_04")


@pytest.mark.parametrize(
    ("tree", "layout", "spoken"),
    [
        ({"module": {}}, UNSPLIT, "neither pipeline stages nor tensor parallelism"),
        ({"module": {}, "mp_world_size": 2}, ParallelLayout(2, None, None), "2 model-parallel ranks"),
        (
            {"module": None, "mp_world_size": 4},
            ParallelLayout(4, None, None, pipeline=True),
            "4 model-parallel ranks of a pipeline",
        ),
        (
            {"module": None, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}},
            ParallelLayout(1, 1, 1, pipeline=True),
            "1 pipeline stage and tensor-parallel size 1 (a PipelineModule)",
        ),
        (
            {
                "module": {},
                "mp_world_size": 4,
                "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 4},
            },
            ParallelLayout(4, 1, 4),
            "1 pipeline stage and tensor-parallel size 4",
        ),
    ],
)
def test_layouts_as_files_tell_them(tree: dict[str, Any], layout: ParallelLayout, spoken: str) -> None:
    found = saved_layout(tree, Field("m"))
    assert found == layout
    assert str(found) == spoken
    check_layout(found, "m", layout, engine=True)


def test_older_files_fit_where_the_number_of_parts_does() -> None:
    check_layout(
        ParallelLayout(4, None, None, pipeline=True), "m", ParallelLayout(4, 2, 2, pipeline=True), engine=True
    )
    with pytest.raises(
        LayoutError, match="saved with 4 model-parallel ranks; this job's engine has 1 pipeline"
    ):
        check_layout(ParallelLayout(4, None, None), "m", ParallelLayout(2, 1, 2), engine=True)


def test_parts_of_other_checkpoints_are_refused() -> None:
    first, other = stage_states(0, {}), stage_states(1, {})
    check_model_part(first, other)
    for change in ({"global_steps": 4}, {"dp_world_size": 3}, {"mp_world_size": 3}):
        with pytest.raises(CorruptError, match=r"mp_rank_01 and mp_rank_00 differ .* not saved together"):
            check_model_part(first, stage_states(1, {}, **change))


# --- real engines ----------------------------------------------------------------------------------------------------


def run(world_size: int, *steps: Any, **options: Any) -> list[dict[str, Any]]:
    """Runs the worker's functions, each followed by its request, on all ranks; what rank 0 printed."""
    args = [step if isinstance(step, str) else json.dumps(step) for step in steps]
    extra = options.pop("env", None)
    finished = run_ranks(
        WORKER,
        world_size,
        args=args,
        deadline_s=options.pop("deadline_s", 300),
        env=lambda rank: {**ENVIRONMENT, **(extra(rank) if extra else {})},
        **options,
    )
    assert [rank.returncode for rank in finished] == [0] * world_size, finished
    return [json.loads(line) for line in finished[0].stdout.splitlines() if line.startswith("{")]


def wrong(told: Sequence[dict[str, Any]]) -> list[Any]:
    return [(one["source"], one["target"], one["problems"]) for one in told if one["problems"]]


def saved_as(root: Path, setting: str, world_size: int) -> str:
    return str(root / f"{setting.replace(' ', '-')}-of-{world_size}")


def same_error(told: dict[str, Any], kind: str, *parts: str) -> None:
    assert len(set(told["errors"])) == 1, told
    assert told["changed"] == [], told
    assert told["errors"][0].startswith(f"{kind}: "), told
    for part in parts:
        assert part in told["errors"][0], told


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four ranks, restored at once at their own size by new engines of the same ranks."""
    root = tmp_path_factory.mktemp("saved")
    cases = [[setting, 4, setting] for setting in CORE]
    told = run(
        4,
        *("save", {"root": str(root), "settings": CORE}),
        *("restore", {"root": str(root), "oracles": str(root), "cases": cases}),
        "refuse",
        {
            "cases": [
                [saved_as(root, "pipeline 1 bf16", 4), "pipeline 1 bf16 of 4", {}],
                [saved_as(root, "tensor 3 bf16", 4), "tensor 1 bf16 of 4", {}],
            ]
        },
        *(
            "partly",
            {"cases": [[saved_as(root, CORE[0], 4), f"{CORE[0]} of 4", {"load_weights_only": True}, []]]},
        ),
    )
    (root / "told.json").write_text(json.dumps(told[len(CORE) :]))
    return root


@needs_deepspeed
def test_four_ranks_go_on_exactly_where_they_were(saved: Path) -> None:
    told = json.loads((saved / "told.json").read_text())[: len(CORE)]
    assert not wrong(told)
    assert all(one["tensors"] > 50 and one["apart"] == 0 and one["saved_world_size"] == 4 for one in told)
    assert "2 pipeline stages and tensor-parallel size 1" in told[0]["notes"][0]
    assert told[0]["derived"] == [f"rng of rank {rank} (from rank 0's state)" for rank in (1, 3)]
    assert told[2]["derived"] == []


@needs_deepspeed
def test_other_stages_and_tensor_parallel_sizes_are_refused_alike_on_all_ranks(saved: Path) -> None:
    stages, tensors, weights = json.loads((saved / "told.json").read_text())[len(CORE) :]
    same_error(stages, "LayoutError", "with 2 pipeline stages", "engine has 4 pipeline stages")
    same_error(
        tensors, "LayoutError", "with 1 pipeline stage and tensor-parallel size 2", "tensor-parallel size 4"
    )
    assert weights["problems"] == []
    # Every tensor of the four stages, the tied one in two of them.
    assert weights["compared"] == 37
    assert weights["steps"] == 0
    assert not [name for name in weights["files"] if "optim" in name]


@needs_deepspeed
def test_at_another_data_parallel_size_each_node_fetches_its_part_once(saved: Path, tmp_path: Path) -> None:
    """Four ranks' checkpoints on two nodes of one rank; what does not fit is the same error on both."""
    served = {
        f"/{path.relative_to(saved)}": Served(path.read_bytes())
        for path in saved.rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    pipeline, tensors = saved_as(saved, "pipeline 1 bf16", 4), saved_as(saved, "tensor 2 bf16", 4)
    lacking = shutil.copytree(pipeline, tmp_path / "lacking")
    (lacking / "global_step3" / "layer_04-model_states.pt").unlink()
    mixed = shutil.copytree(pipeline, tmp_path / "mixed")
    name = "global_step3/mp_rank_01_model_states.pt"
    shutil.copy(Path(tensors, name), mixed / name)
    unpack_zero(1, tmp_path)
    single = str(DATA / "composer-monolithic-w2" / "weights-ba8-rank0.pt")
    cases = [
        [pipeline, "pipeline 1 bf16 wider", {}],
        [pipeline, "pipeline 1 bf16 by parameters", {}],
        [str(lacking), "pipeline 1 bf16", {}],
        [str(mixed), "pipeline 1 bf16", {}],
        [pipeline, "tensor 2 bf16", {}],
        [str(tmp_path / "s1-w4"), "tensor 2 bf16", {}],
        [single, "pipeline 1 bf16", {"load_weights_only": True}],
        [pipeline, "module", {}],
        [tensors, "module", {"load_weights_only": True}],
    ]
    ignored = {
        "ignore_keys": ["state/model/1.*", "state/optimizers/*", "state/engine/*"],
        "options": {"verify": "off"},
    }
    with counting_server(served) as server:
        told = run(
            2,
            "restore",
            {"root": server.url(""), "oracles": str(saved), "cases": [[one, 4, one] for one in CORE]},
            *("refuse", {"cases": cases}),
            *("partly", {"cases": [[pipeline, "pipeline 1 bf16", ignored, ["module/1.", "buffer/1."]]]}),
            nodes=(1, 1),
            env=lambda rank: {"RANKLOAD_CACHE_DIR": str(tmp_path / f"cache{rank}")},
        )
        gets = {path: server.gets(path) for path in served if path.endswith("states.pt")}
    assert not wrong(told[:3])
    assert "resharded from 2 ranks to 1 rank" in told[0]["notes"][1]
    # The first file tells the layout to everybody; the tied layer is both stages'.
    shared = {name for name, count in gets.items() if count == 2}
    assert {name.rsplit("/", 1)[1] for name in shared if "pipeline" in name} == {
        "layer_00-model_states.pt",
        "mp_rank_00_model_states.pt",
    }
    assert {name.rsplit("/", 1)[1] for name in shared if "tensor-3" in name} == {
        "zero_pp_rank_0_mp_rank_00_model_states.pt"
    }
    assert set(gets.values()) == {1, 2}, gets
    errors = told[3 : 3 + len(cases)]
    same_error(errors[0], "MismatchError", "4.up.weight", "(9, 12)", "(7, 12)")
    same_error(errors[1], "LayoutError", "mp_rank_0", "trained the layers ", "in this job")
    same_error(errors[2], "NotFoundError", "layer_04-model_states.pt", "needed by rank 1")
    same_error(errors[3], "CorruptError", "not saved together")
    same_error(
        errors[4], "LayoutError", "with 2 pipeline stages", "1 pipeline stage and tensor-parallel size 2"
    )
    same_error(errors[5], "LayoutError", "with neither pipeline stages nor tensor parallelism")
    same_error(errors[6], "LayoutError", "2 pipeline stages", "has a whole model")
    same_error(errors[7], "LayoutError", "2 pipeline stages", "no DeepSpeed engine")
    same_error(errors[8], "LayoutError", "tensor-parallel size 2", "no DeepSpeed engine")
    partly = told[-1]
    assert partly["problems"] == []
    assert partly["stay"] == 9
    assert partly["steps"] == 0


@pytest.mark.takes_long
@needs_deepspeed
def test_further_settings_and_sizes(saved: Path) -> None:
    cases = [[one, 4, one] for one in FURTHER] + [[source, 4, target] for source, target in OTHER_SETTINGS]
    told = run(
        4,
        *("save", {"root": str(saved), "settings": FURTHER}),
        *("restore", {"root": str(saved), "oracles": str(saved), "cases": cases}),
        deadline_s=500,
    )
    assert not wrong(told[len(FURTHER) :])
    halves = [[one, 4, one] for one in FURTHER if one != "pipeline and tensor 1 bf16"]
    request = {"root": str(saved), "oracles": str(saved)}
    assert not wrong(run(2, "restore", {**request, "cases": halves}, deadline_s=500))
    more = [
        [one, 4, one] for one in (*CORE, *FURTHER) if "0" not in one and one != "pipeline and tensor 1 bf16"
    ]
    assert not wrong(run(6, "restore", {**request, "cases": more}, deadline_s=500))


@needs_deepspeed
def test_three_stages(tmp_path: Path) -> None:
    setting = "pipeline 1 bf16 of 3"
    request = {"root": str(tmp_path), "oracles": str(tmp_path)}
    run(3, "save", {"root": str(tmp_path), "settings": [setting]})
    assert not wrong(run(6, "restore", {**request, "cases": [[setting, 3, setting]]}))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_own_tensor_parallelism(stage: int, tmp_path: Path) -> None:
    setting = f"DeepSpeed's tensor {stage} bf16"
    request = {"root": str(tmp_path), "oracles": str(tmp_path), "cases": [[setting, 4, setting]]}
    told = run(4, "save", {"root": str(tmp_path), "settings": [setting]}, "restore", request)
    assert not wrong(told[1:])
    assert not wrong(run(2, "restore", request))
