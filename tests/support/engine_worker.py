"""What the ranks of test_engine.py do. Each function is run on every rank; an assertion ends its process."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_files import LocalFiles
from rankload.loader import LayoutError, MismatchError, State, load
from rankload.loader.formats.torch_file import read_index
from rankload.loader.materialize.tensors import TensorReader
from rankload.loader.saved.contents import Saved
from rankload.loader.saved.ignore import ignore
from rankload.loader.sources.kinds import source_of
from rankload.loader.sources.zero.file_names import model_file
from rankload.loader.targets.base import RestoreOptions, Work, carry_out
from rankload.loader.targets.deepspeed.engine import EngineTarget
from rankload.loader.targets.deepspeed.ownership import engine_behind
from safetensors.torch import load_file
from zero_model import LATER_DATA_SEED, TinyModel, full_state, lacking, make_engine, module_state, train


def main(*steps: str) -> None:
    """Does ``function folder function folder ...`` in one process group: starting the ranks costs most."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    torch.set_num_threads(1)
    for function, folder in zip(steps[::2], steps[1::2], strict=True):
        globals()[function](folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def open_for(folder: Path, target: EngineTarget, rank: int, world_size: int) -> Saved:
    """The checkpoint, of which the files that this rank needs are found and read as a load would."""
    files = LocalFiles(folder)
    return source_of(files).open(files, target.demand(rank, world_size))


def restore(
    folder: Path,
    engine: Any,
    rank: int,
    world_size: int,
    *,
    weights_only: bool = False,
    ignore_keys: Any = None,
    finish: bool = True,
) -> None:
    options = RestoreOptions(weights_only=weights_only, file=str(folder))
    target = EngineTarget(engine, options)
    saved = open_for(folder, target, rank, world_size)
    saved = saved.with_tree(ignore(saved.as_tree(), ignore_keys).tree)
    plan = target.plan(saved)
    plan.mismatch.raise_if_any(str(folder), strict=True)
    changed: list[str] = []
    restored = carry_out(plan, Work(TensorReader(verify="during"), options, changed.append))
    assert "model" in changed, changed
    assert restored
    torch.distributed.barrier()
    assert plan.finish is not None
    if finish:
        plan.finish()


def differences(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> list[str]:
    return sorted(
        name
        for name in expected.keys() | got.keys()
        if name not in expected or name not in got or not same_bits(expected[name], got[name])
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.detach().contiguous(), other.detach().contiguous()
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
    )


def own_state(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's tensors as they are: masters, optimizer state, low-precision flats, without any collective."""
    outer = engine.optimizer
    base = getattr(outer, "optimizer", outer)
    found: dict[str, torch.Tensor] = {}
    flats: list[torch.Tensor] = []
    for name in (
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
        "fp32_partitioned_groups_flat",
        "fp32_groups",
    ):
        for one in getattr(outer, name, None) or []:
            flats.extend(one if isinstance(one, list) else [one])
    if not flats:
        flats = [p for group in base.param_groups for p in group["params"]]
    for index, flat in enumerate(flats):
        found[f"master/{index}"] = flat.detach().clone()
        for key, value in base.state[flat].items():
            found[f"{key}/{index}"] = torch.as_tensor(value).detach().clone()
    for index, flat in enumerate(getattr(outer, "fp16_partitioned_groups_flat", None) or []):
        found[f"low/{index}"] = flat.detach().clone()
        _blank_paddings(outer.fp16_groups[index], [v for k, v in found.items() if k.endswith(f"/{index}")])
    return found


def _blank_paddings(parameters: list[Any], flats: list[torch.Tensor]) -> None:
    """Stage 3 leaves memory that was never written after the last rank's shares."""
    if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
        return
    offset = 0
    for parameter in parameters:
        offset += parameter.partition_numel()
        for flat in flats:
            if flat.dim():
                flat[offset - parameter.padding_size() : offset] = 0


def numbers(engine: Any) -> dict[str, Any]:
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "scheduler": engine.lr_scheduler.state_dict(),
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups],
    }


def fixtures(root: str) -> None:
    """Both checkpoints of tests/data, in full and weights only, against what DeepSpeed said when it saved."""
    rank, world_size = place()
    for stage in (1, 3):
        folder = Path(root, f"s{stage}-w4")
        oracle = load_file(folder / "oracle.safetensors")
        later = json.loads((folder / "oracle.json").read_text())
        engine = make_engine(stage, seed=5)
        restore(folder / "step3", engine, rank, world_size)
        wrong = differences(oracle, full_state(engine))
        assert not wrong, f"stage {stage}: {wrong}"
        assert engine.global_steps == later["global_steps"], engine.global_steps
        losses = train(engine, 2, rank, seed=LATER_DATA_SEED)
        # What bf16 arithmetic gives depends on the processor: exactly what DeepSpeed's own load leads to here, and
        # within rounding what it led to where the checkpoint was made.
        other = make_engine(stage, seed=6)
        other.load_checkpoint(str(folder), tag="step3")
        assert losses == train(other, 2, rank, seed=LATER_DATA_SEED), f"stage {stage}: {losses}"
        assert rank or losses == approximately(later["losses_after"]), f"stage {stage}: {losses}, {later}"
        report(
            rank, f"stage {stage}: {'exactly' if losses == later['losses_after'] else 'nearly'} the losses"
        )

        engine = make_engine(stage, seed=7)
        restore(folder / "step3", engine, rank, world_size, weights_only=True)
        assert not differences(weights(oracle), module_state(engine)), f"stage {stage}, weights only"
        assert engine.global_steps == 0
        check_masters_agree(engine)
        report(rank, f"stage {stage}: ok")


ADAM = {"type": "AdamW", "params": {"torch_adam": True}}

OTHER_LAYOUTS: dict[int, list[tuple[int, dict[str, Any]]]] = {
    1: [
        (0, {}),
        (1, {"zero": {"parameter_alignment": True}}),
        (2, {"dtype": "fp32"}),
        (3, {"zero": {"sub_group_size": 2000}}),
    ],
    3: [
        (0, {}),
        (1, {"config": {"data_types": {"grad_accum_dtype": "fp32"}}}),
        (3, {"dtype": "fp32"}),
    ],
}


def other_layouts(root: str) -> None:
    """The same checkpoints where world size, stage and precision are others: the arithmetic knows no difference."""
    rank, world_size = place()
    for source in (1, 3):
        folder = Path(root, f"s{source}-w4")
        oracle = load_file(folder / "oracle.safetensors")
        for target, options in OTHER_LAYOUTS[source]:
            what = f"stage {source} of 4 ranks -> {target} of {world_size} {options}"
            if reason := lacking({"stage": target, **options}):
                report(rank, f"{what}: left out, {reason}")
                continue
            engine = make_engine(target, seed=5, **options)
            restore(folder / "step3", engine, rank, world_size)
            wrong = []
            for name, value in (full_state(engine) if target else module_state(engine)).items():
                kind, _, parameter = name.partition("/")
                expected = oracle[name]
                if kind == "module" and options.get("dtype") == "fp32" and f"fp32/{parameter}" in oracle:
                    expected = oracle[f"fp32/{parameter}"]
                if not same_bits(expected, value):
                    wrong.append(name)
            assert not wrong, f"{what}: {wrong}"
            assert engine.global_steps == 3
            train(engine, 1, rank)
            engine = make_engine(target, seed=5, **options)
            restore(folder / "step3", engine, rank, world_size, weights_only=True)
            if options.get("dtype") != "fp32":
                assert not differences(weights(oracle), module_state(engine)), f"{what}, weights only"
            if target:
                check_masters_agree(engine)
            report(rank, f"{what}: ok")


def approximately(values: list[float]) -> Any:
    import pytest

    return pytest.approx(values, rel=1e-3)


def weights(oracle: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in oracle.items() if name.startswith(("module/", "buffer/"))}


def report(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


def check_masters_agree(engine: Any) -> None:
    """The fp32 masters, cast, are what the module computes with."""
    from deepspeed.utils import safe_get_full_fp32_param

    low = module_state(engine)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            master = safe_get_full_fp32_param(parameter).detach().to(parameter.dtype).float()
            assert same_bits(master, low[f"module/{name}"]), name


ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "stage 0 fp32": {"stage": 0, "dtype": "fp32"},
    "stage 0 bf16": {"stage": 0, "dtype": "bf16"},
    "stage 1 fp32": {"stage": 1, "dtype": "fp32"},
    "stage 1 bf16, round robin": {"stage": 1, "zero": {"round_robin_gradients": True}},
    "stage 2 bf16, elastic": {"stage": 2, "zero": {"elastic_checkpoint": True}},
    "stage 2 bf16, aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "stage 2 fp32, round robin, SGD": {
        "stage": 2, "dtype": "fp32", "zero": {"round_robin_gradients": True}, "optimizer": "SGD",
        "config": {"zero_allow_untested_optimizer": True},
    },
    "stage 1 BF16_Optimizer": {
        "stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}, "kind": "BF16_Optimizer",
    },
    "stage 3 bf16, subgroups": {"stage": 3, "zero": {"sub_group_size": 2000}},
    "stage 3 bf16, nothing persistent": {"stage": 3, "zero": {"stage3_param_persistence_threshold": 0}},
    "stage 3 fp32": {"stage": 3, "dtype": "fp32"},
    "stage 2 bf16, legacy files": {"stage": 2, "config": {"checkpoint": {"checkpoint_serialization": False}}},
}  # fmt: skip


def round_trips(root: str) -> None:
    """Saves with one engine, restores into others of another seed: fresh, trained already, and weights only.

    A rank that fails ends at once, and with it the others: going on to the next case would leave them waiting.
    """
    rank, world_size = place()
    for name in ROUND_TRIPS:
        folder = Path(root, name.replace(" ", "-").replace(",", ""))
        settings = dict(ROUND_TRIPS[name])
        kind = settings.pop("kind", None)
        if reason := lacking(settings, saves=True):
            report(rank, f"{name}: left out, {reason}")
            continue
        try:
            round_trip(folder, settings, rank, world_size, kind)
        except BaseException as error:
            error.add_note(f"in {name!r}")
            raise
        report(rank, f"{name}: ok")


def round_trip(folder: Path, settings: dict[str, Any], rank: int, world_size: int, kind: str | None) -> None:
    saver = make_engine(seed=0, **settings)
    if kind is not None:
        assert type(saver.optimizer).__name__ == kind, type(saver.optimizer)
    train(saver, 3, rank)
    saver.save_checkpoint(str(folder), tag="here", client_state={"epoch": 3})
    if "legacy" in str(folder):
        assert read_index(folder / "here" / model_file(0, partitioned=False)).format == "legacy"
    own, module, counts = own_state(saver), module_state(saver), numbers(saver)
    later = train(saver, 2, rank, seed=LATER_DATA_SEED)
    for trained in (0, 1):
        engine = make_engine(seed=7 + trained, **settings)
        train(engine, trained, rank, seed=3)
        restore(folder / "here", engine, rank, world_size)
        assert differences(own, own_state(engine)) == [], f"trained {trained}"
        assert differences(module, module_state(engine)) == [], f"trained {trained}"
        assert numbers(engine) == counts, (numbers(engine), counts)
        losses = train(engine, 2, rank, seed=LATER_DATA_SEED)
        assert losses == later, f"trained {trained}: {losses}, expected {later}"
    engine = make_engine(seed=9, **settings)
    before = own_state(engine)
    restore(folder / "here", engine, rank, world_size, weights_only=True)
    assert differences(module, module_state(engine)) == []
    assert engine.global_steps == 0
    states = {key: value for key, value in before.items() if not key.startswith(("master/", "low/"))}
    after = own_state(engine)
    assert differences(states, {k: v for k, v in after.items() if k in states}) == []
    assert all(k.startswith(("master/", "low/")) or k in states for k in after), sorted(after)


def particulars(root: str) -> None:
    """Ignored parts, mismatches, offloaded optimizers, and a restore that is not finished."""
    rank, world_size = place()
    for stage in (1, 3):
        folder = Path(root, f"particulars-{stage}")
        saver = make_engine(stage, seed=0)
        train(saver, 3, rank)
        saver.save_checkpoint(str(folder), tag="here")
        expected = full_state(saver)
        later = train(saver, 2, rank, seed=LATER_DATA_SEED)
        ignored_parts(folder / "here", stage, expected, rank, world_size)
        report(rank, f"stage {stage}, ignored parts: ok")
        mismatches(folder / "here", stage, rank, world_size)
        report(rank, f"stage {stage}, mismatches: ok")
        offloaded(folder / "here", stage, expected, later, rank, world_size)
        report(rank, f"stage {stage}, offloaded optimizer: ok")
    engine = make_engine(3, seed=11)
    restore(Path(root, "particulars-3", "here"), engine, rank, world_size, finish=False)
    assert train(engine, 2, rank, seed=LATER_DATA_SEED) == later


def ignored_parts(
    folder: Path, stage: int, expected: dict[str, torch.Tensor], rank: int, world_size: int
) -> None:
    engine = make_engine(stage, seed=4)
    train(engine, 1, rank, seed=3)
    before, lr = full_state(engine), engine.lr_scheduler.state_dict()
    group = dict(engine.optimizer.optimizer.param_groups[1])
    restore(
        folder,
        engine,
        rank,
        world_size,
        ignore_keys=[
            "state/model/blocks.1.*",
            "state/model/count",
            "state/optimizers/AdamW/state/odd/exp_avg",
            "state/optimizers/AdamW/state/wte.weight",
            "state/optimizers/AdamW/param_groups/1",
            "state/schedulers",
            "state/engine/global_samples",
        ],
    )
    own = {
        *(
            f"{kind}/{name}"
            for kind in ("module", "fp32")
            for name in (n.partition("/")[2] for n in expected)
            if name.startswith("blocks.1.")
        ),
        "buffer/count",
        "exp_avg/odd",
        "exp_avg/wte.weight",
        "exp_avg_sq/wte.weight",
    }
    after = full_state(engine)
    wrong = [
        name for name in after if not same_bits(after[name], (before if name in own else expected)[name])
    ]
    assert not wrong, wrong
    assert engine.lr_scheduler.state_dict() == lr
    assert engine.global_steps == 3
    assert engine.optimizer.optimizer.param_groups[1]["lr"] == group["lr"]
    assert engine.optimizer.optimizer.param_groups[0]["lr"] != group["lr"]

    engine = make_engine(stage, seed=4)
    restore(folder, engine, rank, world_size, ignore_keys=["state/optimizers"])
    assert not engine.optimizer.optimizer.state or all(
        not state for state in engine.optimizer.optimizer.state.values()
    )
    assert not differences(weights(expected), module_state(engine))
    train(engine, 1, rank)

    engine = make_engine(stage, seed=4)
    restore(folder, engine, rank, world_size, ignore_keys=["*/exp_avg", "*/step"])
    after = full_state(engine)
    assert all(bool((after[name] == 0).all()) for name in after if name.startswith("exp_avg/"))
    assert not differences(weights(expected), weights(after))
    train(engine, 1, rank)


def mismatches(folder: Path, stage: int, rank: int, world_size: int) -> None:
    engine = make_engine(stage, seed=4)
    before = own_state(engine)
    target = EngineTarget(engine, RestoreOptions())
    saved = open_for(folder, target, rank, world_size)
    model = dict(saved.state["model"])
    model["stranger"] = model.pop("odd")
    model["gain"] = model["blocks.0.norm.bias"]
    model["seen"] = model["count"]
    saved = replace(saved, state={**saved.state, "model": model})
    plan = target.plan(saved)
    assert plan.mismatch.missing == ["model/odd", "optimizers/AdamW/state/odd"], plan.mismatch
    assert plan.mismatch.unexpected == ["model/stranger"], plan.mismatch
    assert plan.mismatch.wrong == [
        "model/gain: expected shape (1,), got (24,)",
        "model/seen: expected shape (5,), got ()",
    ], plan.mismatch
    assert differences(before, own_state(engine)) == []

    one_short = make_engine(stage, seed=4, optimizer="SGD", config={"zero_allow_untested_optimizer": True})
    plan = EngineTarget(one_short, RestoreOptions()).plan(saved)
    assert any("optimizer is of another kind" in line for line in plan.mismatch.missing), plan.mismatch


def offloaded(
    folder: Path,
    stage: int,
    expected: dict[str, torch.Tensor],
    later: list[float],
    rank: int,
    world_size: int,
) -> None:
    engine = make_engine(
        stage,
        seed=4,
        zero={"offload_optimizer": {"device": "cpu"}},
        config={"zero_force_ds_cpu_optimizer": False},
    )
    restore(folder, engine, rank, world_size)
    assert differences(expected, full_state(engine)) == []
    assert train(engine, 2, rank, seed=LATER_DATA_SEED) == later


INNER: dict[str, dict[str, Any]] = {
    "stage 0 fp32": {"stage": 0, "dtype": "fp32"},
    "stage 0 bf16": {"stage": 0, "dtype": "bf16"},
    "stage 1 bf16": {"stage": 1},
    "stage 1 BF16_Optimizer": {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "stage 2 fp32": {"stage": 2, "dtype": "fp32"},
    "stage 3 bf16": {"stage": 3},
    "stage 3 fp32": {"stage": 3, "dtype": "fp32"},
}


def inner_modules(root: str) -> None:
    """An engine's module, and what else stands for the engine: training goes on as the uninterrupted run does."""
    rank, _ = place()
    for name, settings in INNER.items():
        if reason := lacking(settings, saves=True):
            report(rank, f"inner, {name}: left out, {reason}")
            continue
        folder = Path(root, name.replace(" ", "-"))
        saver = make_engine(seed=0, **settings)
        train(saver, 2, rank)
        saver.save_checkpoint(str(folder), tag="here")
        later = train(saver, 2, rank, seed=LATER_DATA_SEED)
        expected = module_state(saver)
        engine = make_engine(seed=5, **settings)
        wrapped = torch.compile(engine.module) if settings["stage"] in (1, 3) else engine.module
        ways = [State(engine.module), State(wrapped, [engine.optimizer])]
        if name == "stage 0 fp32":
            # Its torch optimizer is restored as it is, and the engine's counters are left.
            ways[1] = State(engine.module, engine.optimizer, schedulers=engine.lr_scheduler)
        for state in ways:
            train(engine, 1, rank, seed=3)
            load(str(folder), state, progress_bar=False)
            assert train(engine, 2, rank, seed=LATER_DATA_SEED) == later, name
            assert differences(expected, module_state(engine)) == [], name
        report(rank, f"inner, {name}: ok")
        saver.destroy()
    refused_modules(Path(root, "stage-1-bf16"), Path(root, "stage-3-bf16"))
    report(rank, "inner, refused: ok")


def refused_modules(stage_1: Path, stage_3: Path) -> None:
    """Where it is not certain which engine is meant, or there is none, the error says so and nothing is changed."""
    import deepspeed

    for stage, folder in ((1, stage_1), (3, stage_3)):
        engine = make_engine(stage, seed=5)
        before = own_state(engine)
        part, wrapper, other = engine.module.blocks, torch.nn.Sequential(engine.module), TinyModel(2)
        for state, said in (
            (State(part), "not that engine's whole module, which is a TinyModel"),
            (State(wrapper), "not that engine's whole module"),
            (State(other, engine.optimizer), "an optimizer of a DeepSpeed engine, and the model is not"),
        ):
            with pytest.raises(LayoutError, match=f"{said}.*State.model=engine"):
                load(str(folder), state, progress_bar=False)
        stranger = torch.optim.SGD(engine.module.parameters())
        with pytest.raises(MismatchError, match="optimizers/SGD: it is not the engine's"):
            load(str(folder), State(engine.module, stranger), progress_bar=False)
        assert differences(before, own_state(engine)) == []
    engine = make_engine(1, seed=5)
    again = deepspeed.initialize(model=engine.module, config={**engine.config, "optimizer": ADAM})[0]
    with pytest.raises(LayoutError, match="is the module of 2 DeepSpeed engines"):
        load(str(stage_1), State(engine.module), progress_bar=False)
    engine.destroy()
    assert engine_behind(again.module, []) is again
    again.destroy()
    # Nothing of DeepSpeed's is left: the module is one like any other.
    own = torch.optim.AdamW([p for p in again.module.parameters() if p.requires_grad])
    assert engine_behind(again.module, [own]) is None
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        partitioned = TinyModel(3)
    with pytest.raises(LayoutError, match="DeepSpeed has partitioned"):
        load(str(stage_3), State(partitioned), progress_bar=False)


def other_kinds(root: str) -> None:
    """Adam's state into AdamW, and this job's hyperparameters: at stages 0 to 3 alike."""
    rank, _ = place()
    after: dict[int, dict[str, torch.Tensor]] = {}
    for stage in (0, 1, 2, 3):
        folder = str(Path(root, f"adam-{stage}"))
        adam = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": False}}
        saver = make_engine(stage, "fp32", seed=0, config={"optimizer": adam})
        assert not groups_of(saver)[0]["decoupled_weight_decay"]
        train(saver, 2, rank)
        saver.save_checkpoint(folder, tag="here")
        engine = make_engine(stage, "fp32", seed=5)
        groups_of(engine)[0]["weight_decay"] = 0.7
        with pytest.warns(UserWarning, match="decoupled_weight_decay=False, this job's True, which it keeps"):
            load(folder, State(engine), progress_bar=False, options={"hyperparameters": "job"})
        assert groups_of(engine)[0]["weight_decay"] == 0.7, stage
        with pytest.warns(UserWarning, match="decoupled_weight_decay"):
            load(folder, State(engine), progress_bar=False)
        assert groups_of(engine)[0]["weight_decay"] == 0.1, stage
        assert groups_of(engine)[0]["decoupled_weight_decay"], stage
        train(engine, 1, rank, seed=LATER_DATA_SEED)
        after[stage] = module_state(engine)
        train(saver, 1, rank, seed=LATER_DATA_SEED)
        assert not nearly(module_state(saver), after[stage]), stage
        assert nearly(after[0], after[stage]), stage
        report(rank, f"other kinds, stage {stage}: ok")


def groups_of(engine: Any) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = getattr(engine.optimizer, "optimizer", engine.optimizer).param_groups
    return groups


def nearly(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


if __name__ == "__main__":
    from processes import end_together

    main(*sys.argv[1:])
    end_together()
