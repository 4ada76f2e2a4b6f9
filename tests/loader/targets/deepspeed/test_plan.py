"""Plans for engines' tensors that are put together by hand: which saved elements go where, and what does not fit."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rankload.loader.errors import LayoutError
from rankload.loader.saved.contents import ENGINE, Saved
from rankload.loader.saved.copies import Copy
from rankload.loader.saved.model_parallel import ExpertLayer, ParallelLayout, Position
from rankload.loader.saved.partitions import Slot, shares
from rankload.loader.saved.regions import Run
from rankload.loader.saved.tensor import Piece, SavedTensor, StorageRef, Unread
from rankload.loader.saved.values import InertObject
from rankload.loader.targets.base import RestoreOptions
from rankload.loader.targets.deepspeed.engine import EngineTarget
from rankload.loader.targets.deepspeed.flats import MasterFlat
from rankload.loader.targets.deepspeed.live import LiveEngine, LowSlot
from rankload.loader.targets.deepspeed.plan import ModelPart, plan_model
from rankload.loader.targets.deepspeed.states import OptimizerPart, number_problem, plan_states
from zero_trees import tensor


def sharded(
    numel: int, world_size: int, *, dtype: str = "float32", unread: tuple[int, ...] = ()
) -> SavedTensor:
    """A parameter as stage 3 saves it: rank r's share begins at element 100 of its file."""
    pieces = [
        Piece(
            slot.run,
            100,
            (1,),
            Unread(f"lies partly in the files of saved rank {slot.rank}, which were not read")
            if slot.rank in unread
            else StorageRef(f"rank{slot.rank}", "0", 0, 4000, None),
        )
        for slot in shares(numel, world_size, 0)
    ]
    return SavedTensor.in_pieces(dtype, (numel,), pieces)


def saved_with(model: dict[str, Any], optimizer: dict[str, Any] | None = None, **fields: Any) -> Saved:
    state: dict[str, Any] = {"model": model, ENGINE: {}}
    if optimizer is not None:
        state["optimizers"] = {"AdamW": optimizer}
    return Saved("ckpt", "deepspeed", "deepspeed", state, **{"data_parallel_size": 3, **fields})


def stage_3(numel: int = 5, *, dtype: torch.dtype = torch.bfloat16, state: Any = None) -> LiveEngine:
    """The second of two ranks, which has the last elements of its one parameter, ``w``, from element 4 of a flat on."""
    master, low = torch.zeros(8), torch.zeros(8, dtype=dtype)
    (slot,) = (slot for slot in shares(numel, 2, 4) if slot.rank == 1)
    inner = SimpleNamespace(
        state={} if state is None else {master: state}, param_groups=[{"lr": 0.1, "betas": (0, 0)}]
    )
    return LiveEngine(
        engine=SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner)),
        kind="zero3",
        position=Position(1, 2),
        shapes={"w": (numel,)},
        dtypes={"w": str(dtype).removeprefix("torch.")},
        aliases={},
        buffers={},
        extra_state=(),
        flats=(MasterFlat(master, 0, (("w", slot),)),),
        low={"w": (LowSlot(low, slot, "weights of flat 0"),)},
        groups=(("w",),),
        slots_of={"w": ((0, slot),)},
    )


def where(copies: tuple[Copy, ...]) -> list[tuple[str, str, int, str, int, int]]:
    """Each copy as (name, file, its first element there, memory, the first element there, how many)."""
    return [
        (one.name, one.storage.file, one.source.offset, one.memory.key, one.target.offset, one.source.numel)
        for one in copies
    ]


def planned(live: LiveEngine, saved: Saved) -> OptimizerPart:
    return plan_states(live, saved, plan_model(live, saved, {}), "AdamW")


def test_shares_are_cast_from_masters_that_three_ranks_files_fill() -> None:
    live, weights = stage_3(), sharded(5, 3)
    model = plan_model(live, saved_with({"w": weights}, masters={"w": weights}), {})
    part = model.parameters["w"]
    # Of five elements three ranks had two, two and one; this rank has the last two.
    assert where(model.masters) == [
        ("fp32/w", "rank1", 101, "fp32 of flat 0", 4, 1),
        ("fp32/w", "rank2", 100, "fp32 of flat 0", 5, 1),
    ]
    assert (model.low, part.low) == ((), None)
    assert part.low_from_master == live.slots_of["w"]
    assert part.restored


def test_what_was_frozen_when_it_was_saved_fills_the_weights_and_they_the_masters() -> None:
    live = stage_3()
    model = plan_model(live, saved_with({"w": sharded(5, 3, dtype="bfloat16")}), {})
    part = model.parameters["w"]
    assert (
        where(model.low)
        == where(model.low_of(live, {"w"}))
        == [
            ("model/w", "rank1", 101, "weights of flat 0", 4, 1),
            ("model/w", "rank2", 100, "weights of flat 0", 5, 1),
        ]
    )
    assert part.master_from_low == live.slots_of["w"]
    assert part.low_from_master == ()
    assert (model.masters, part.masters) == ((), None)
    assert model.low_of(live, set()) == ()


def test_masters_in_one_flat_are_planned_into_one_memory() -> None:
    """By which a restore knows that they can be read at once."""
    names = [f"w{n}" for n in range(8)]
    slots = {name: Slot(0, n, Run(0, 1)) for n, name in enumerate(names)}
    live = replace(
        stage_3(2),
        position=Position(0, 1),
        shapes=dict.fromkeys(names, (1,)),
        dtypes=dict.fromkeys(names, "bfloat16"),
        flats=(MasterFlat(torch.zeros(8), 0, tuple(slots.items())),),
        low={name: (LowSlot(torch.zeros(8), slot, "weights"),) for name, slot in slots.items()},
        groups=(tuple(names),),
        slots_of={name: ((0, slot),) for name, slot in slots.items()},
    )
    weights = {name: sharded(1, 1) for name in names}
    from_masters = plan_model(live, saved_with(weights, masters=weights), {})
    low = {name: sharded(1, 1, dtype="bfloat16") for name in names}
    from_low = plan_model(live, saved_with(low), {})
    for copies in (from_masters.masters, from_low.low):
        # Their files have each at the same place.
        assert [copy.target.offset for copy in copies] == list(range(8))
        assert len({id(copy.memory) for copy in copies}) == 1


def test_elements_in_files_that_were_not_read_are_an_error_only_where_they_are_wanted() -> None:
    live = stage_3()
    first = sharded(5, 3, unread=(0,))
    assert plan_model(live, saved_with({"w": first}, masters={"w": first}), {}).masters
    last = sharded(5, 3, unread=(2,))
    with pytest.raises(
        LayoutError, match="fp32/w lies partly in the files of saved rank 2, which were not read"
    ):
        plan_model(live, saved_with({"w": last}, masters={"w": last}), {})


def test_a_module_of_another_dtype_is_filled_from_masters_and_says_so() -> None:
    live = replace(stage_3(dtype=torch.float16), kind="zero")
    low = tensor(5, dtype="bfloat16", file="model")
    model = plan_model(live, saved_with({"w": low}, masters={"w": sharded(5, 3)}), {})
    part = model.parameters["w"]
    assert {copy.storage.file for copy in model.low} == {"rank1", "rank2"}
    assert part.from_saved_masters
    assert model.cast == {"model/w": "bfloat16 -> float16"}
    same = plan_model(live, saved_with({"w": tensor(5, dtype="float16", file="model")}), {})
    assert {copy.storage.file for copy in same.low} == {"model"}
    assert same.cast == {}


def test_state_is_planned_for_tensors_that_the_optimizer_will_make() -> None:
    weights = sharded(5, 3)
    step = tensor(file="rank0")
    moments = {"exp_avg": sharded(5, 3), "exp_avg_sq": sharded(5, 3)}
    optimizer = {
        "state": {"w": {**moments, "step": step}},
        "param_groups": [{"lr": 0.5, "betas": (1, 2), "params": ["w"]}],
    }
    whole = saved_with({"w": weights}, optimizer, masters={"w": weights})
    kept = {"state": {"w": {"exp_avg": moments["exp_avg"]}}, "param_groups": []}
    part = planned(stage_3(), whole)
    assert part.numbers == {0: {"step": step}}
    assert part.groups == {0: {"lr": 0.5, "betas": (1, 2)}}
    assert part.made == {0: {"exp_avg": "float32", "exp_avg_sq": "float32"}}
    assert part.filled == ((0, "exp_avg"), (0, "exp_avg_sq"))
    assert len(part.copies) == 4
    memory = part.copies[0].memory
    assert (memory.shape, memory.stride, memory.dtype, memory.plain) == ((8,), (1,), "float32", True)
    partly = planned(stage_3(), whole.with_tree({"state": {**whole.state, "optimizers": {"AdamW": kept}}}))
    # The optimizer needs the ignored ones too: they are zero.
    assert partly.made == part.made
    assert partly.filled == ((0, "exp_avg"),)
    assert (partly.numbers, partly.ignored_numbers, partly.groups) == ({}, {0: {"step": step}}, {})
    # A state that is there keeps its dtype.
    there = planned(stage_3(state={"exp_avg": torch.zeros(8, dtype=torch.float16)}), whole)
    assert [copy.memory.dtype for copy in there.copies] == ["float16"] * 2 + ["float32"] * 2


def test_state_that_does_not_lie_along_the_parameter_is_refused() -> None:
    weights = sharded(5, 3)
    saved = saved_with(
        {"w": weights},
        {"state": {"w": {"row": tensor(2), "step": 1}}, "param_groups": [{"params": ["w"]}]},
        masters={"w": weights},
    )
    with pytest.raises(LayoutError, match=r"state/w/row has shape \(2,\), and its parameter \(5,\)"):
        planned(stage_3(), saved)
    whole = {"exp_avg": sharded(5, 3)}
    saved = saved_with({"w": weights}, {"state": {"w": whole}, "param_groups": []}, masters={"w": weights})
    with pytest.raises(LayoutError, match="keeps exp_avg in 2 elements for 8"):
        planned(stage_3(state={"exp_avg": torch.zeros(2)}), saved)


def test_tied_names_take_the_state_of_the_one_that_has_it() -> None:
    weights = sharded(5, 3)
    optimizer = {
        "state": {"embed": {"exp_avg": sharded(5, 3), "step": 3}},
        "param_groups": [{"lr": 0.5, "betas": (1, 2), "params": ["embed"]}],
    }
    saved = saved_with(
        {"w": weights, "embed": weights},
        optimizer,
        masters={"w": weights, "embed": weights},
        aliases={"w": "embed"},
    )
    live = stage_3()
    model = plan_model(live, saved, {})
    assert model.mismatch.unexpected == []
    part = plan_states(live, saved, model, "AdamW")
    assert part.mismatch.missing == []
    assert part.filled == ((0, "exp_avg"),)
    assert part.numbers == {0: {"step": 3}}
    assert part.groups == {0: {"lr": 0.5, "betas": (1, 2)}}


def test_parameters_that_one_job_alone_trained() -> None:
    live = stage_3()
    weights = sharded(5, 3)
    untrained = saved_with({"w": weights}, {"state": {}, "param_groups": []}, masters={"w": weights})
    assert planned(live, untrained).mismatch.missing == ["optimizers/AdamW/state/w"]
    states = {"state": {"w": {"exp_avg": sharded(5, 3)}}, "param_groups": [{"params": ["w"]}]}
    frozen = replace(live, groups=((),), flats=(), slots_of={})
    found = planned(frozen, saved_with({"w": weights}, states, masters={"w": weights}))
    assert found.mismatch.unexpected == ["optimizers/AdamW/state/w"]
    assert found.copies == ()


def test_numbers_that_must_agree_are_compared_once_they_are_here() -> None:
    """Those of which the file's own checksums say that they are equal need not be read for it."""
    live = stage_3()
    slot = live.flats[0].slots[0][1]
    live = replace(
        live,
        shapes={"w": (5,), "v": (5,)},
        dtypes={"w": "float32", "v": "float32"},
        flats=(replace(live.flats[0], slots=(("w", slot), ("v", slot))),),
        groups=(("w", "v"),),
        low={**live.low, "v": live.low["w"]},
        slots_of={"w": ((0, slot),), "v": ((0, slot),)},
    )

    def step(key: str, crc: int | None) -> SavedTensor:
        return SavedTensor.in_storage(StorageRef("elsewhere", key, 0, 4, crc), "float32", (), ())

    def part_with(other: object, crc: int | None = 7) -> OptimizerPart:
        weights = {name: sharded(5, 3) for name in ("w", "v")}
        state = {
            "w": {"exp_avg": sharded(5, 3), "step": step("1", crc)},
            "v": {"exp_avg": sharded(5, 3), "step": other},
        }
        saved = saved_with(
            weights, {"state": state, "param_groups": [{"params": ["w", "v"]}]}, masters=weights
        )
        model = plan_model(live, saved, {})
        return plan_states(live, saved, model, "AdamW", readable=lambda tensor: False)

    assert part_with(step("2", 7)).unchecked == {}
    differs, unsummed = step("2", 8), step("2", None)
    (compared,) = part_with(differs).unchecked.values()
    assert compared[1] is differs
    assert list(part_with(unsummed, None).unchecked) == ["optimizers/AdamW/state/v/step"]
    assert len(part_with(3).unchecked) == 1
    assert part_with(differs).mismatch.wrong == []
    assert number_problem("here", 3, 3) == []
    assert "has 3, but here it has 4" in number_problem("here", 3, 4)[0]


# --- an engine of stage 0 in fp32: torch's own optimizer ----------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.tied = self.head
        self.register_buffer("count", torch.zeros((), dtype=torch.long))


def plain_engine() -> Any:
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return SimpleNamespace(module=module, optimizer=optimizer, lr_scheduler=None)


def test_what_an_engine_demands() -> None:
    engine = plain_engine()
    demand = EngineTarget(engine, RestoreOptions(rename={"a": "b"}, weights_only=True)).demand(0, 1)
    assert (demand.position, demand.weights_only, demand.rename) == (Position(0, 1), True, {"a": "b"})
    assert (demand.optimizers, demand.schedulers) == (("AdamW",), ("scheduler",))
    assert demand.in_parts
    assert list(demand.parameters or ()) == ["conv.weight", "conv.bias", "head.weight"]
    weight = (demand.parameters or {})["conv.weight"]
    assert (weight.shape, weight.dtype) == ((3, 2, 2, 2), "float32")
    assert weight.updated == weight.computed == (Run(0, 24),)
    assert (demand.aliases, demand.others) == ({"tied.weight": "head.weight"}, ("count",))
    assert demand.groups == ((("conv.weight", (3, 2, 2, 2)), ("conv.bias", (3,)), ("head.weight", (3, 2))),)
    assert demand.layers == demand.experts == ()


def two_groups() -> tuple[Any, Saved]:
    """An engine with weight decays of 0.3 and 0, and a checkpoint that has one group with 0.1."""
    engine = plain_engine()
    weights = [engine.module.conv.weight, engine.module.head.weight]
    engine.optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.3}, {"params": [engine.module.conv.bias], "weight_decay": 0.0}]
    )
    model = {"conv.weight": tensor(3, 2, 2, 2), "conv.bias": tensor(3), "head.weight": tensor(3, 2)}
    state = {name: {"exp_avg": one, "exp_avg_sq": one, "step": 3} for name, one in model.items()}
    group = {"lr": 0.5, "betas": (0, 0), "eps": 0, "weight_decay": 0.1, "params": list(model)}
    saved = saved_with({**model, "count": tensor(dtype="int64")}, {"state": state, "param_groups": [group]})
    return engine, saved


def test_one_saved_group_for_two_that_differ_is_asked_about() -> None:
    engine, saved = two_groups()
    (wrong,) = EngineTarget(engine, RestoreOptions()).plan(saved).mismatch.wrong
    assert "groups 0, 1 differ (weight_decay 0.3, 0.0)" in wrong
    assert "of the checkpoint's group 0" in wrong
    for chosen, gets in (
        ("checkpoint", {"lr": 0.5, "betas": (0, 0), "eps": 0, "weight_decay": 0.1}),
        ("job", None),
    ):
        plan = EngineTarget(engine, RestoreOptions(hyperparameters=chosen)).plan(saved)  # type: ignore[arg-type]
        assert plan.mismatch.wrong == []
        (step,) = plan.steps
        assert getattr(step, "optimizer").groups == ({} if gets is None else {0: gets, 1: gets})  # noqa: B009
    engine.optimizer.param_groups[1]["weight_decay"] = 0.3
    assert EngineTarget(engine, RestoreOptions()).plan(saved).mismatch.wrong == []


def test_another_kind_of_optimizer_is_missing_and_nothing_of_it_is_restored() -> None:
    engine, saved = two_groups()
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), momentum=0.9)
    with pytest.warns(UserWarning, match="another kind than SGD"):
        plan = EngineTarget(engine, RestoreOptions(strict=False)).plan(saved)
    (missing,) = plan.mismatch.missing
    assert missing.startswith("optimizers/SGD: the checkpoint's optimizer is of another kind than SGD")
    assert plan.not_restored == ("state/optimizers/AdamW",)
    assert not [copy for copy in plan.copies if not copy.name.startswith("model/")]


def test_a_parameter_whose_memory_is_not_contiguous_is_filled_by_its_strides() -> None:
    target = EngineTarget(plain_engine(), RestoreOptions(weights_only=True))
    model = {"conv.weight": tensor(3, 2, 2, 2), "conv.bias": tensor(3), "head.weight": tensor(3, 2)}
    plan = target.plan(saved_with({**model, "count": tensor(dtype="int64")}))
    assert plan.mismatch.missing == plan.mismatch.unexpected == plan.mismatch.wrong == []
    (copy,) = (one for one in plan.copies if one.name == "model/conv.weight")
    assert (copy.memory.shape, copy.memory.stride) == ((3, 2, 2, 2), (8, 1, 4, 2))
    assert copy.source.numel == 24
    assert not copy.target.is_contiguous
    assert {one.name for one in plan.copies} == {f"model/{name}" for name in (*model, "count")}


def numbered(*groups: int, lr: float = 0.2) -> dict[str, Any]:
    """An optimizer's state by numbers, with groups of so many parameters of the shapes of `MODEL`."""
    shapes = [(3, 2, 2, 2), (3,), (3, 2), (1,)]
    numbers = list(range(sum(groups)))
    return {
        "state": {
            number: {"step": 3, "exp_avg": tensor(*shapes[number]), "exp_avg_sq": tensor(*shapes[number])}
            for number in numbers
        },
        "param_groups": [
            {"lr": lr, "betas": (0, 0), "eps": 1e-8, "params": [numbers.pop(0) for _ in range(size)]}
            for size in groups
        ],
    }


MODEL = {"conv.weight": tensor(3, 2, 2, 2), "conv.bias": tensor(3), "tied.weight": tensor(3, 2)}


def test_a_file_that_no_engine_saved_gives_its_optimizer_by_the_order_of_the_groups() -> None:
    engine = plain_engine()
    saved = saved_with({**MODEL, "count": tensor(dtype="int64")}, numbered(3), data_parallel_size=None)
    saved.state["optimizers"]["SGD"] = {"state": {}, "param_groups": []}
    with pytest.warns(UserWarning, match=r"has optimizer state \(SGD\), and this State has AdamW"):
        plan = EngineTarget(engine, RestoreOptions()).plan(saved)
    assert (plan.mismatch.missing, plan.mismatch.unexpected, plan.mismatch.wrong) == ([], [], [])
    assert plan.not_restored == ("state/optimizers/SGD",)
    assert {one.name for one in plan.copies if "exp_avg" in one.name} == {
        f"{key}/{name}"
        for key in ("exp_avg", "exp_avg_sq")
        for name in ("conv.weight", "conv.bias", "head.weight")
    }
    kept = EngineTarget(engine, RestoreOptions()).plan(
        saved.with_tree({"state": {**saved.state, "optimizers": {}}})
    )
    assert (kept.mismatch.missing, kept.not_restored) == ([], ())
    assert not [one for one in kept.copies if "exp_avg" in one.name]


@pytest.mark.parametrize(
    ("optimizers", "missing", "wrong"),
    [
        ({}, "optimizers/AdamW: the checkpoint has none", None),
        (
            {"SGD": numbered(3), "Adamax": numbered(3)},
            "optimizers/AdamW: the checkpoint has SGD, Adamax",
            None,
        ),
        (
            {"AdamW": numbered(2, 1)},
            None,
            "optimizers/AdamW: expected parameter groups of [3] parameters, got [2, 1]; the checkpoint does not name "
            "its optimizer's parameters, so they can only be matched by position: make the groups that were saved, or "
            "leave the optimizer out with LoadOptions(leave_out=['optimizer'])",
        ),
        (
            {"AdamW": {"state": {}}},
            None,
            "optimizers/AdamW/param_groups: expected a list of dicts with params",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_the_engines_is_told(
    optimizers: dict[str, Any], missing: str | None, wrong: str | None
) -> None:
    saved = saved_with({**MODEL, "count": tensor(dtype="int64")}, data_parallel_size=None)
    saved.state["optimizers"] = optimizers
    plan = EngineTarget(plain_engine(), RestoreOptions()).plan(saved)
    assert plan.mismatch.missing == ([missing] if missing else [])
    assert plan.mismatch.wrong == ([wrong] if wrong else [])
    assert plan.not_restored == tuple(f"state/optimizers/{name}" for name in optimizers)
    if missing:
        with pytest.warns(UserWarning, match=re.escape(missing)):
            EngineTarget(plain_engine(), RestoreOptions(strict=False)).plan(saved)


def test_an_engine_without_an_optimizer_leaves_the_checkpoints_and_says_so() -> None:
    engine = plain_engine()
    engine.optimizer = None
    saved = saved_with({**MODEL, "count": tensor(dtype="int64")}, numbered(3))
    for size in (1, None):
        with pytest.warns(UserWarning, match="this State has no optimizer"):
            plan = EngineTarget(engine, RestoreOptions()).plan(replace(saved, data_parallel_size=size))
        assert plan.not_restored == ("state/optimizers/AdamW",)
        assert (plan.mismatch.missing, plan.mismatch.unexpected) == ([], [])


def test_a_file_of_a_whole_model_goes_to_whole_models_alone() -> None:
    engine = plain_engine()
    saved = saved_with({**MODEL, "count": tensor(dtype="complex64")}, data_parallel_size=None)
    target = EngineTarget(engine, RestoreOptions(weights_only=True))
    assert target.plan(saved).mismatch.wrong == ["model/count: expected int64, got complex64"]
    for change, message in (
        ({"experts": (ExpertLayer("moe", 0, 4, 2, 0),)}, "experts are spread over ranks"),
        ({"position": Position(0, 1, 0, ParallelLayout(2, 1, 2))}, "the checkpoint has a whole model"),
    ):
        split = EngineTarget(engine, RestoreOptions(weights_only=True))
        split.__dict__["_live"] = replace(target._live, **change)
        with pytest.raises(LayoutError, match=message):
            split.plan(saved)
        # Files that DeepSpeed saved tell the parts.
        split.plan(replace(saved, data_parallel_size=1))


class Kept(torch.nn.Module):
    """A parameter without dimensions, buffers, and extra state that is not there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("size", torch.zeros(1))
        self.register_buffer("wide", torch.zeros(1).expand(2))
        self.extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def kept_plan(parts: Any = lambda path: True, **other: Any) -> tuple[Any, Kept]:
    module = Kept()
    engine = SimpleNamespace(
        module=module, optimizer=torch.optim.AdamW(module.parameters()), lr_scheduler=None
    )
    model = {
        "scale": tensor(1),
        "mask": tensor(2, dtype="uint8"),
        "size": tensor(),
        "wide": tensor(2),
        "_extra_state": tensor(7),
        **other,
    }
    options = RestoreOptions(weights_only=True, comes_in_parts=parts)
    return EngineTarget(engine, options).plan(saved_with(model)), module


def test_an_engines_buffers_numbers_and_extra_state_are_those_of_a_module() -> None:
    plan, _ = kept_plan(wide=None)
    assert plan.mismatch.missing == plan.mismatch.unexpected == []
    # The expanded buffer is found in the check.
    (wrong,) = plan.mismatch.wrong
    assert wrong.startswith("model/wide: has several elements in one place of memory")
    assert plan.cast == {"model/mask": "uint8 -> bool"}
    (step,) = plan.steps
    # The file is not there yet: the mask's values are compared before the first change.
    assert set(step.trees) == {"state/model/_extra_state", "values of model/mask"}
    assert {copy.memory.key: copy.memory.shape for copy in step.copies} == {
        "model/scale": (1,),
        "model/mask": (2,),
        "model/size": (1,),
    }
    lacking, _ = kept_plan(other=1)
    assert lacking.mismatch.unexpected == ["model/other"]


def test_an_engine_misses_the_extra_state_that_the_checkpoint_lacks() -> None:
    module = Kept()
    engine = SimpleNamespace(
        module=module, optimizer=torch.optim.AdamW(module.parameters()), lr_scheduler=None
    )
    model = {"scale": tensor(), "mask": tensor(2, dtype="bool"), "size": tensor(1), "wide": tensor(2)}
    plan = EngineTarget(engine, RestoreOptions(weights_only=True)).plan(saved_with(model))
    assert plan.mismatch.missing == ["model/_extra_state"]


NO_SCALER = "engine/loss_scaler DynamicLossScaler: the checkpoint has LossScaler"


@pytest.mark.parametrize(
    ("theirs", "mine", "missing", "left"),
    [
        ("DynamicLossScaler", "LossScaler", [], ("state/engine/loss_scaler",)),
        ("LossScaler", "DynamicLossScaler", [NO_SCALER], ()),
        ("DynamicLossScaler", "DynamicLossScaler", [], ()),
    ],
)
def test_a_loss_scaler_without_counterpart_is_told(
    theirs: str, mine: str, missing: list[str], left: tuple[str, ...]
) -> None:
    engine = plain_engine()
    engine.optimizer.loss_scaler = type(mine, (), {})()
    engine.random_ltd_scheduler = SimpleNamespace(load_state_dict=print) if not left else None
    model = {"conv.weight": tensor(3, 2, 2, 2), "conv.bias": tensor(3), "head.weight": tensor(3, 2)}
    none_yet = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}]}
    saved = saved_with({**model, "count": tensor(dtype="int64")}, none_yet)
    scaler = InertObject(f"deepspeed.runtime.fp16.loss_scaler.{theirs}", known=True)
    saved.state[ENGINE] = {"loss_scaler": scaler, "random_ltd": {"step": 1}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = EngineTarget(engine, RestoreOptions()).plan(saved)
    assert [one for one in plan.mismatch.missing if not one.startswith("optimizers/")] == missing
    assert plan.not_restored == (("state/engine/random_ltd", *left) if left else ())
    assert ["no counterpart" in str(one.message) for one in told] == [True] * bool(left)
    left_out = RestoreOptions(leave_out=frozenset({"scaler", "optimizers"}))
    plan = EngineTarget(engine, left_out).plan(saved.without(left_out.leave_out))
    assert (plan.mismatch.missing, "state/engine/loss_scaler" in plan.not_restored) == ([], False)
    del saved.state[ENGINE]["random_ltd"]
    missing_too = EngineTarget(engine, RestoreOptions(strict=False)).plan(saved).mismatch.missing
    assert [one for one in missing_too if "random_ltd" in one] == (
        ["engine/random_ltd: the checkpoint has none"] if not left else []
    )


def test_an_optimizer_that_the_checkpoint_lacks_is_missing_and_one_that_was_ignored_is_not() -> None:
    live = stage_3()
    part = plan_model(live, saved_with({"w": sharded(5, 3)}), {})
    lacking = plan_states(live, saved_with({"w": sharded(5, 3)}), part, "AdamW")
    assert lacking.refused
    assert lacking.mismatch.missing == ["optimizers/AdamW: the checkpoint has none"]
    saved = saved_with({"w": sharded(5, 3)}, {"state": {}, "param_groups": [{"lr": 0.2, "params": ["w"]}]})
    without = saved.with_tree({"state": {"model": saved.state["model"]}})
    ignored = plan_states(live, without, part, "AdamW")
    assert (ignored.refused, ignored.mismatch.missing, ignored.groups) == (False, [], {})


def test_an_engine_without_an_optimizer_takes_nothing_of_the_checkpoints() -> None:
    live = replace(stage_3(), engine=SimpleNamespace(optimizer=None), flats=(), slots_of={}, groups=())
    saved = saved_with({"w": sharded(5, 3)}, {"state": {}, "param_groups": [{"lr": 0.2, "params": ["w"]}]})
    planned = plan_states(live, saved, ModelPart(), "AdamW")
    assert (planned.refused, planned.mismatch.missing, planned.groups) == (False, [], {})
    assert plan_states(live, saved_with({}), ModelPart(), "AdamW").mismatch.missing == []


def test_an_engines_frozen_parameters_may_lack_and_a_prefix_is_explained() -> None:
    live = stage_3()
    lacking = plan_model(replace(live, frozen=("w",)), saved_with({}), {}).mismatch
    assert (lacking.missing, lacking.frozen, lacking.advice) == (["model/w"], ["model/w"], [])
    prefixed = plan_model(live, saved_with({"model.w": sharded(5, 3)}), {}).mismatch
    assert prefixed.frozen == []
    assert prefixed.advice == [
        'Pass LoadOptions(rename={"model.": ""}): with it 1 more of the model\'s names are found.'
    ]
    assert plan_model(live, saved_with({"model.w": sharded(4, 3)}), {}).mismatch.advice == []
