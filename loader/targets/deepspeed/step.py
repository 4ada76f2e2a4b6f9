"""Carries out a plan on a DeepSpeed engine: fills its tensors in place, then sets numbers, counters and schedulers.

`EngineStep.apply` does it in this order; `EngineStep.cast_masters` once more when weights that the node's ranks share
are there. No collective is used here, and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...materialize.tensors import torch_dtype
from ...plurals import counted
from ...saved.contents import Saved
from ...saved.copies import Copy
from ...saved.tensor import SavedTensor
from ...saved.values import InertObject
from ..base import NoteChange, Work
from ..buffers import check_read, values_place
from ..module import extra_states
from ..parts import with_empty
from .live import LiveEngine, flat_view
from .plan import ModelPart
from .states import OptimizerPart, new_state, state_memory_key


@dataclass(frozen=True)
class EnginePart:
    """What an engine gets besides its tensors and its optimizer."""

    counters: Mapping[str, Any] = field(default_factory=dict)
    """Counters, loss scaler and the like, by DeepSpeed's names."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Saved state of the engine's objects that load it themselves, by DeepSpeed's names."""
    scheduler: Any = None
    """Saved state of the lr scheduler; None where it stays as it is."""
    rates_from_scheduler: bool = False
    """Whether the groups' learning rates are those of the restored scheduler."""


@dataclass(frozen=True)
class EngineStep:
    """A restore into an engine, checked; nothing is changed yet. Names are the engine's parameters."""

    live: LiveEngine
    saved: Saved
    model: ModelPart
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    engine: EnginePart = field(default_factory=EnginePart)
    shared: frozenset[str] = frozenset()
    """Parameters whose weights this rank's node reads once for all its ranks: `apply` leaves these weights out."""

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Into weights, masters, buffers, and the optimizer's state."""
        found: list[Copy] = []
        for name, part in self.model.parameters.items():
            found += part.masters
            if name not in self.shared:
                found += part.low
        for copies in self.model.buffers.values():
            found += copies
        return (*found, *self.optimizer.copies)

    @cached_property
    def trees(self) -> dict[str, Any]:
        """Extra state, the optimizer's numbers and hyperparameters, and the state of objects that load it."""
        found: dict[str, Any] = {}
        for name, value in self.model.extra_state.items():
            found[f"state/model/{name}"] = value
        for name, (value, _) in self.model.unchecked.items():
            found[values_place(name)] = value
        for index, numbers in self.optimizer.numbers.items():
            found.update({_number_path(index, key): value for key, value in numbers.items()})
        for index, group in self.optimizer.groups.items():
            found.update({_group_path(index, key): value for key, value in group.items()})
        for key, value in self.engine.objects.items():
            found[f"state/engine/{key}"] = value
        if self.engine.scheduler is not None:
            found["state/schedulers"] = self.engine.scheduler
        return found

    def apply(self, work: Work) -> list[str]:
        """Carries it out on this rank; returns what was restored, for the receipt. No rank waits for another.

        Raises `MismatchError`, before it changes anything, where a buffer's values do not survive their cast, and
        `CorruptError` where bytes are missing or do not match their checksum; by then parts may have been changed.
        """
        self._check_buffers(work)
        if self.model.restores:
            work.note_change("model")
        if self.optimizer.restores:
            work.note_change("optimizer")
        _free_gathered(self.live)
        for index, keys in self.optimizer.made.items():
            _make_state(self.live, index, keys)
        work.fill(self.copies, self.memories())
        self._cast_shares()
        self.cast_masters(frozenset(self.model.parameters) - self.shared)
        _set_extra_state(self, work)
        _set_numbers(self, work)
        _set_groups(self, work)
        _relink(self)
        return [*self._restored(), *_set_engine(self, work)]

    def _check_buffers(self, work: Work) -> None:
        """Compares the buffers that could not be read when the restore was planned."""
        own = {name: buffer for name, (_, buffer) in self.model.unchecked.items()}
        real = work.real({values_place(name): self.trees[values_place(name)] for name in own})
        check_read(
            {name: (real[values_place(name)], buffer) for name, buffer in own.items()}, work.options.file
        )

    def memories(self) -> dict[str, torch.Tensor]:
        """The engine's tensors that copies go to, by `Memory.key`."""
        live = self.live
        found = {low.key: low.flat for each in live.low.values() for low in each}
        found.update({f"model/{name}": buffer.detach() for name, buffer in live.buffers.items()})
        for index, flat in enumerate(live.flats):
            found[f"fp32 of flat {index}"] = flat_view(flat.master)
        for index, key in self.optimizer.filled:
            own = live.optimizer.state[live.flats[index].master][key]
            found[state_memory_key(index, key)] = flat_view(own)
        return found

    @torch.no_grad()
    def _cast_shares(self) -> None:
        """Casts the module's shares at stage 3 from this rank's masters."""
        for name, part in self.model.parameters.items():
            for index, slot in part.low_from_master:
                elements = slice(slot.start, slot.start + slot.run.length)
                low = next(one for one in self.live.low[name] if one.slot == slot)
                low.flat[elements].copy_(self.live.flats[index].master.data[elements])

    @torch.no_grad()
    def cast_masters(self, names: frozenset[str]) -> None:
        """Casts those masters of `names` that no file holds from the module's weights."""
        for name, part in self.model.parameters.items():
            for index, slot in part.master_from_low if name in names else ():
                master = flat_view(self.live.flats[index].master)
                for low in self.live.low[name]:
                    if master.dim() != 1 or low.flat.dim() != 1:
                        master.copy_(low.flat)
                        continue
                    begin = low.slot.start + slot.run.start - low.slot.run.start
                    part_of_low = low.flat[begin : begin + slot.run.length]
                    master[slot.start : slot.start + slot.run.length].copy_(part_of_low)

    def _restored(self) -> list[str]:
        """Of tensors and hyperparameters, for the receipt."""
        parts = self.model.parameters.values()
        weights = sum(part.restored for part in parts)
        restored = []
        if weights:
            buffers = len(self.model.buffers)
            restored.append(
                f"model ({counted(weights, 'parameter')}, {counted(buffers, 'buffer')} on this rank)"
            )
        if any(part.masters or part.master_from_low for part in parts):
            restored.append("fp32 masters")
        if self.optimizer.filled:
            restored.append(
                f"optimizer state ({', '.join(sorted({key for _, key in self.optimizer.filled}))})"
            )
        if self.optimizer.groups:
            restored.append("hyperparameters")
        return restored


def _number_path(index: int, key: str) -> str:
    return f"state/optimizers: {key} of flat {index}"


def _group_path(index: int, key: str) -> str:
    return f"param_groups/{index}/{key}"


def _free_gathered(live: LiveEngine) -> None:
    """Frees gathered copies of parameters, which would otherwise keep the old values of their shares."""
    optimizer = live.engine.optimizer
    if live.kind == "zero3":
        optimizer.checkpoint_event_prologue()
    elif hasattr(optimizer, "partition_all_parameters"):
        optimizer.partition_all_parameters()


def _make_state(live: LiveEngine, index: int, keys: Mapping[str, str]) -> None:
    """Gives the optimizer the state tensors that it would make at its first step."""
    master = live.flats[index].master
    state = live.optimizer.state[master]
    for key, dtype in keys.items():
        if not isinstance(state.get(key), torch.Tensor):
            state[key] = new_state(master, dtype)


def _set_extra_state(step: EngineStep, work: Work) -> None:
    paths = {f"state/model/{name}": name for name in step.model.extra_state}
    takers = extra_states(step.live.engine.module)
    for path, value in work.real({path: step.trees[path] for path in paths}).items():
        takers[paths[path]].set_extra_state(value)


def _set_numbers(step: EngineStep, work: Work) -> None:
    """Sets the optimizer's ``step`` and the like."""
    part, optimizer = step.optimizer, step.live.optimizer
    for index in dict.fromkeys((*part.numbers, *part.ignored_numbers)):
        numbers = part.numbers.get(index, {})
        master = step.live.flats[index].master
        if not numbers and master not in optimizer.state:
            continue
        state = optimizer.state[master]
        real = work.real({_number_path(index, key): value for key, value in numbers.items()})
        for key in numbers:
            state[key] = _like(real[_number_path(index, key)], state.get(key))
        for key, value in part.ignored_numbers.get(index, {}).items():
            if key not in state:
                # It was ignored, but the optimizer needs it with the others.
                state[key] = _zero_like(value)


def _like(value: Any, own: Any) -> Any:
    """`value` in the form that the optimizer keeps `own` in: written into that tensor, or as a plain number."""
    if isinstance(value, torch.Tensor):
        if isinstance(own, torch.Tensor):
            return own.copy_(value)
        return value.item() if isinstance(own, int | float) else value
    return own.fill_(value) if isinstance(own, torch.Tensor) and value is not None else value


def _zero_like(saved: Any) -> Any:
    if isinstance(saved, SavedTensor):
        return torch.zeros(saved.shape, dtype=torch_dtype(saved.dtype), device="cpu")
    return saved and type(saved)(0)


def _set_groups(step: EngineStep, work: Work) -> None:
    """Sets the optimizer's hyperparameters."""
    for index, saved in step.optimizer.groups.items():
        own = step.live.optimizer.param_groups[index]
        real = work.real({_group_path(index, key): value for key, value in saved.items()})
        for key in saved:
            value = real[_group_path(index, key)]
            if isinstance(own.get(key), torch.Tensor) and isinstance(value, torch.Tensor | int | float):
                own[key].fill_(float(value))
            else:
                own[key] = value


def _relink(step: EngineStep) -> None:
    """Links DeepSpeed's per-parameter views (``safe_get_full_*``) to the state tensors that `_make_state` made."""
    live, optimizer = step.live, step.live.engine.optimizer
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if live.kind in ("zero", "bf16") and link is not None and step.optimizer.made:
        optimizer._hp_optimizer_states_linked = False
        if all(flat.master in live.optimizer.state for flat in live.flats):
            link()


def objects_of(engine: Any) -> dict[str, Any]:
    """The engine's objects, besides its lr scheduler, that load their saved state themselves, by DeepSpeed's names."""
    owners: dict[str, Any] = {
        "random_ltd": getattr(engine, "random_ltd_scheduler", None),
        "data_sampler": getattr(getattr(engine, "training_dataloader", None), "data_sampler", None),
    }
    return {key: owner for key, owner in owners.items() if hasattr(owner, "load_state_dict")}


def _set_engine(step: EngineStep, work: Work) -> list[str]:
    """Sets loss scaler, overflow, clipping, counters and lr scheduler, as DeepSpeed's own ``load_checkpoint`` does.

    Returns what was restored, for the receipt.
    """
    engine, part = step.live.engine, step.engine
    restored = _set_counters(step.live, part.counters, work.note_change)
    owners = objects_of(engine)
    for key in part.objects:
        real = work.real({f"state/engine/{key}": step.trees[f"state/engine/{key}"]})
        work.note_change(key)
        owners[key].load_state_dict(real[f"state/engine/{key}"])
        restored.append(key)
    if part.scheduler is not None:
        scheduler = engine.lr_scheduler
        work.note_change("lr scheduler")
        saved = work.real({"state/schedulers": part.scheduler})["state/schedulers"]
        scheduler.load_state_dict(with_empty(scheduler, saved))
        restored.append(f"lr scheduler {type(scheduler).__name__}")
        if part.rates_from_scheduler and _set_learning_rates(step.live, scheduler):
            restored.append("learning rates (from the scheduler: the optimizer's files do not hold them)")
    if "global_steps" in part.counters:
        engine.loaded_checkpoint_dp_world_size = step.saved.data_parallel_size
        engine.loaded_checkpoint_mp_world_size = step.live.position.layout.parts
    return restored


def _set_counters(live: LiveEngine, saved: Mapping[str, Any], note_change: NoteChange) -> list[str]:
    engine, optimizer = live.engine, live.engine.optimizer
    restored = []
    if "loss_scaler" in saved and _set_scaler(optimizer, saved["loss_scaler"]):
        restored.append("loss scaler")
    config = getattr(optimizer, "loss_scale_config", None)
    for key in ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window"):
        if key in saved and config is not None:
            setattr(config, key, saved[key])
    if "dynamic_loss_scale" in saved:
        if config is not None and live.kind == "unfused":
            config.dynamic_loss_scale = saved["dynamic_loss_scale"]
        elif "dynamic_loss_scale" in vars(optimizer or object):
            optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    for key in ("overflow", "clip_grad"):
        if key in saved and live.kind in ("zero", "zero3", "bf16") and hasattr(optimizer, key):
            setattr(optimizer, key, saved[key])
    for key in ("global_steps", "global_samples", "skipped_steps"):
        if key in saved:
            note_change(key)
            setattr(engine, key, saved[key])
            restored.append(f"{key} {saved[key]}")
    if "global_steps" in saved and "global_samples" not in saved:
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    return restored


def _set_learning_rates(live: LiveEngine, scheduler: Any) -> bool:
    """Sets the groups' learning rates from the restored scheduler; returns whether it did.

    The next step would use the initial rate otherwise.
    """
    if type(scheduler).__module__.startswith("deepspeed."):
        rates = scheduler.get_lr()
    else:
        rates = getattr(scheduler, "_last_lr", None)
    groups = live.optimizer.param_groups
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
