"""Carries out a plan on a DeepSpeed engine: fills its tensors in place, then sets numbers, counters and schedulers.

In this order: `fill_tensors`, `set_numbers`, `relink`, `set_engine`; `cast_masters` once more when weights that the
node's ranks share are there. No collective is used here, and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...materialize.objects import materialize
from ...materialize.tensors import CopyRequest, TensorReader, read_tensor
from ...saved.values import InertObject, LazyTensor
from ..module import NoteChange
from .plan import EnginePlan, Fill
from .target import flat_view


def fill_tensors(plan: EnginePlan, reader: TensorReader) -> None:
    """Reads weights, masters, optimizer state and buffers straight into the engine's tensors, in the files' order.

    Then casts the shares and masters that come from each other, and sets extra state. Raises `CorruptError` where
    bytes are missing or do not match their checksum.
    """
    target = plan.target
    requests = [_request(destination, fill) for destination, fill in plan.low]
    requests += [_request(flat_view(target.flats[index].master), fill) for index, fill in plan.masters]
    if plan.states or plan.fresh_keys:
        state = target.optimizer.state
        for index, keys in plan.fresh_keys.items():
            _make_state(plan, index, keys)
        requests += [
            _request(flat_view(state[target.flats[index].master][key]), fill)
            for index, key, fill in plan.states
        ]
    requests += [
        CopyRequest(source, target.buffers[name].detach(), f"model/{name}")
        for name, source in plan.buffers.items()
    ]
    reader.copy(requests)
    _derive(plan)
    cast_masters(plan, shared=False)
    for name, value in plan.extra_state.items():
        owner = target.engine.module.get_submodule(name.rpartition("_extra_state")[0].rstrip("."))
        owner.set_extra_state(materialize(value, reader=reader, path=f"state/model/{name}"))


def _request(destination: torch.Tensor, fill: Fill) -> CopyRequest:
    if destination.dim() != 1:
        # A parameter whose memory is not contiguous, which is only ever filled whole.
        return CopyRequest(fill.source, destination, fill.name, fill.source_start, fill.length)
    part = destination[fill.target_start : fill.target_start + fill.length]
    return CopyRequest(fill.source, part, fill.name, fill.source_start, fill.length)


def _make_state(plan: EnginePlan, index: int, keys: Mapping[str, str]) -> None:
    """Gives the optimizer the state tensors that it would make at its first step."""
    flat = plan.target.flats[index]
    state = plan.target.optimizer.state[flat.master]
    for key, dtype in keys.items():
        if not isinstance(state.get(key), torch.Tensor):
            saved = getattr(torch, dtype)
            state[key] = torch.zeros_like(
                flat.master,
                dtype=flat.master.dtype if saved.is_floating_point else saved,
                memory_format=torch.preserve_format,
                requires_grad=False,
            )


@torch.no_grad()
def _derive(plan: EnginePlan) -> None:
    """Casts the module's shares at stage 3 from this rank's masters."""
    target = plan.target
    for name, slot in plan.low_from_master:
        part = slice(slot.start, slot.start + slot.length)
        low = next(one for one in target.low[name] if one.slot == slot)
        low.flat[part].copy_(target.flats[slot.place.group].master.data[part])


@torch.no_grad()
def cast_masters(plan: EnginePlan, *, shared: bool) -> None:
    """Casts masters that no file holds from the module's weights: with `shared` those of ``plan.shared``, which come
    after the others; else the others."""
    target = plan.target
    for name, index, slot in plan.master_from_low:
        if (name in plan.shared) != shared:
            continue
        master = flat_view(target.flats[index].master)
        for low in target.low[name]:
            if master.dim() != 1 or low.flat.dim() != 1:
                master.copy_(low.flat)
                continue
            begin = low.slot.start + slot.param_start - low.slot.param_start
            master[slot.start : slot.start + slot.length].copy_(low.flat[begin : begin + slot.length])


def set_numbers(plan: EnginePlan, reader: TensorReader) -> None:
    """Sets the optimizer's ``step`` and the like, and its hyperparameters."""
    target = plan.target
    for index, saved in plan.all_scalars.items():
        flat = target.flats[index]
        state = target.optimizer.state[flat.master] if _has_state(plan, index) else None
        if state is None:
            continue
        for key, value in saved.items():
            if key in plan.scalars.get(index, {}):
                state[key] = _number_like(value, state.get(key), reader)
            elif key not in state:
                # It was ignored, but the optimizer needs it with the others.
                zero = _number_like(value, None, reader)
                state[key] = (
                    torch.zeros_like(zero) if isinstance(zero, torch.Tensor) else zero and type(zero)(0)
                )
    for index, saved in plan.groups.items():
        own = target.optimizer.param_groups[index]
        for key, value in saved.items():
            real = materialize(value, reader=reader, path=f"param_groups/{index}/{key}")
            if isinstance(own.get(key), torch.Tensor) and isinstance(real, torch.Tensor | int | float):
                own[key].fill_(float(real))
            else:
                own[key] = real


def _has_state(plan: EnginePlan, index: int) -> bool:
    master = plan.target.flats[index].master
    return bool(plan.scalars.get(index)) or master in plan.target.optimizer.state


def _number_like(value: Any, own: Any, reader: TensorReader) -> Any:
    """`value` in the form that the optimizer keeps `own` in: written into that tensor, or as a plain number."""
    if isinstance(value, LazyTensor):
        real = read_tensor(value, reader=reader, name="optimizer number")
        if isinstance(own, torch.Tensor):
            return own.copy_(real)
        return real.item() if isinstance(own, int | float) else real
    return own.fill_(value) if isinstance(own, torch.Tensor) and value is not None else value


def set_engine(plan: EnginePlan, reader: TensorReader, note_change: NoteChange) -> list[str]:
    """Sets loss scaler, overflow, clipping, counters and lr scheduler, as DeepSpeed's own ``load_checkpoint`` does.

    Returns what was restored, for the receipt. `note_change` is called with a part's name before that part is changed.
    """
    engine, optimizer = plan.target.engine, plan.target.engine.optimizer
    restored = []
    saved = plan.counters
    if "loss_scaler" in saved and _set_scaler(optimizer, saved["loss_scaler"]):
        restored.append("loss scaler")
    config = getattr(optimizer, "loss_scale_config", None)
    for key in ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"):
        if key in saved and config is not None:
            setattr(config, key, saved[key])
    if "dynamic_loss_scale" in saved:
        if config is not None and plan.target.kind == "unfused":
            config.dynamic_loss_scale = saved["dynamic_loss_scale"]
        elif "dynamic_loss_scale" in vars(optimizer or object):
            optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    for key in ("overflow", "clip_grad"):
        if key in saved and plan.target.kind in ("zero", "zero3", "bf16") and hasattr(optimizer, key):
            setattr(optimizer, key, saved[key])
    for key in ("global_steps", "global_samples", "skipped_steps"):
        if key in saved:
            note_change(key)
            setattr(engine, key, saved[key])
            restored.append(f"{key} {saved[key]}")
    if "global_steps" in saved and "global_samples" not in saved:
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    owners: dict[str, Any] = {
        "random_ltd": getattr(engine, "random_ltd_scheduler", None),
        "data_sampler": getattr(getattr(engine, "training_dataloader", None), "data_sampler", None),
    }
    for key, owner in owners.items():
        if key in saved and hasattr(owner, "load_state_dict"):
            note_change(key)
            owner.load_state_dict(materialize(saved[key], reader=reader, path=f"state/engine/{key}"))
            restored.append(key)
    scheduler: Any = getattr(engine, "lr_scheduler", None)
    if plan.scheduler is not None and callable(getattr(scheduler, "load_state_dict", None)):
        note_change("lr scheduler")
        scheduler.load_state_dict(materialize(plan.scheduler, reader=reader, path="state/schedulers"))
        restored.append(f"lr scheduler {type(scheduler).__name__}")
        if _set_learning_rates(plan, scheduler):
            restored.append("learning rates (from the scheduler: the optimizer's files do not hold them)")
    if plan.zero is not None and "global_steps" in saved:
        engine.loaded_checkpoint_dp_world_size = plan.zero.checkpoint.world_size
        engine.loaded_checkpoint_mp_world_size = plan.target.layout.parts
    return restored


def _set_learning_rates(plan: EnginePlan, scheduler: Any) -> bool:
    """Sets the groups' learning rates from the restored scheduler; returns whether it did.

    Only where the files hold no hyperparameters (``elastic_checkpoint``): the next step would use the initial rate.
    """
    optim = plan.zero.any_optim if plan.zero is not None else None
    if optim is None or any("lr" in group for group in optim.groups or ()) or not optim.group_of:
        return False
    if type(scheduler).__module__.startswith("deepspeed."):
        rates = scheduler.get_lr()
    else:
        rates = getattr(scheduler, "_last_lr", None)
    groups = plan.target.optimizer.param_groups
    if not isinstance(rates, list) or len(rates) != len(groups):
        return False
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    return True


def _set_scaler(optimizer: Any, saved: Any) -> bool:
    """Sets the fields of the engine's own loss scaler where the saved one is of the same class; whether it did."""
    own = getattr(optimizer, "loss_scaler", None)
    if not isinstance(saved, InertObject) or own is None:
        return False
    if type(own).__name__ != saved.global_name.rpartition(".")[2] or not isinstance(saved.state, Mapping):
        return False
    for key, value in saved.state.items():
        if isinstance(key, str) and key in vars(own) and isinstance(value, bool | int | float | None):
            setattr(own, str(key), value)
    return True


def relink(plan: EnginePlan) -> None:
    """Links DeepSpeed's per-parameter views (``safe_get_full_*``) to the state tensors that `fill_tensors` made."""
    optimizer, target = plan.target.engine.optimizer, plan.target
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if target.kind in ("zero", "bf16") and link is not None and plan.fresh_keys:
        optimizer._hp_optimizer_states_linked = False
        if all(flat.master in target.optimizer.state for flat in target.flats):
            link()
