"""Carries out a plan on a DeepSpeed engine: fills its tensors in place, then sets numbers, counters and schedulers.

`EngineStep` does it in this order; `EngineStep.cast_masters` once more when weights that the node's ranks share
are there. What is made or read beside the engine's tensors comes first: it is no change. No collective is used here,
and no rank waits for another.
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
from ...saved.mismatch import Mismatch
from ...saved.strided import Layout
from ...saved.tensor import SavedTensor
from ...saved.values import InertObject
from ..base import Change, NoteChange, Work
from ..buffers import check_read, values_place
from ..module import extra_states
from ..optimizer_kinds import value_problems
from ..parts import with_empty
from .links import link_state
from .live import LiveEngine, flat_view
from .plan import ModelPart
from .states import OptimizerPart, new_state, number_problem, state_memory_key


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
    """Parameters whose weights this rank's node reads once for all its ranks: this step leaves these weights out."""

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Into weights, masters, buffers, and the optimizer's state."""
        model = self.model
        low = model.low_of(self.live, model.parameters.keys() - self.shared) if self.shared else model.low
        found = [*model.masters, *low]
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
        for place, compared in self.optimizer.unchecked.items():
            found[_compared_path(place)] = compared
        for index, numbers in self.optimizer.numbers.items():
            found.update({_number_path(index, key): value for key, value in numbers.items()})
        for index, group in self.optimizer.groups.items():
            found.update({_group_path(index, key): value for key, value in group.items()})
        for key, value in self.engine.objects.items():
            found[f"state/engine/{key}"] = value
        if self.engine.scheduler is not None:
            found["state/schedulers"] = self.engine.scheduler
        return found

    def prepare(self, work: Work) -> Change:
        """Reads what does not go into the engine's own tensors, and makes the state that its optimizer lacks.

        No rank waits for another. Raises `MismatchError`, before it changes anything, where a buffer's values do not
        survive their cast or numbers differ that must agree, and `CorruptError` where bytes are missing or do not match
        their checksum; by then parts may have been changed.
        """
        real = work.real(self.trees)
        self._check_buffers(real, work.options.file)
        self._check_groups(real, work.options.file)
        self._check_numbers(real, work.options.file)
        made = self._made()
        return lambda: self._change(real, made, work)

    def _change(
        self, real: Mapping[str, Any], made: Mapping[tuple[int, str], torch.Tensor], work: Work
    ) -> list[str]:
        work.fill(self.copies, self.memories(made), self.changes(made))
        _free_gathered(self.live)
        self._hand_over(made, work.note_change)
        self._cast_shares(work.note_change)
        self.cast_masters(frozenset(self.model.parameters) - self.shared, work.note_change)
        _set_extra_state(self, real, work.note_change)
        _set_numbers(self, real, work.note_change)
        _set_groups(self, real, work.note_change)
        if self.optimizer.made:
            link_state(self.live)
        return [*self._restored(), *_set_engine(self, real, work.note_change)]

    def _check_buffers(self, real: Mapping[str, Any], file: str) -> None:
        """Compares the buffers that could not be read when the restore was planned."""
        own = {name: buffer for name, (_, buffer) in self.model.unchecked.items()}
        check_read({name: (real[values_place(name)], buffer) for name, buffer in own.items()}, file)

    def _check_groups(self, real: Mapping[str, Any], file: str) -> None:
        """Compares hyperparameters that are saved as tensors with the groups' own."""
        groups = self.optimizer.groups
        own = [self.live.optimizer.param_groups[index] for index in groups]
        gets = [{key: real[_group_path(index, key)] for key in group} for index, group in groups.items()]
        wrong = [*value_problems("optimizer/param_groups", own, gets)]
        Mismatch(wrong=wrong).raise_if_any(file, strict=False, before=False)

    def _check_numbers(self, real: Mapping[str, Any], file: str) -> None:
        """Compares the optimizer's numbers that could not be read when the restore was planned."""
        mismatch = Mismatch()
        for place in self.optimizer.unchecked:
            before, value = (
                one.item() if isinstance(one, torch.Tensor) else one for one in real[_compared_path(place)]
            )
            mismatch.wrong += number_problem(place, before, value)
        mismatch.raise_if_any(file, strict=False, before=False)

    def _made(self) -> dict[tuple[int, str], torch.Tensor]:
        """The state tensors, by flat and key, that the optimizer would make at its first step; it gets them later."""
        found = {}
        filled: dict[str, list[Layout]] = {}
        for copy in self.optimizer.copies:
            filled.setdefault(copy.memory.key, []).append(copy.target)
        for index, keys in self.optimizer.made.items():
            master = self.live.flats[index].master
            own = self.live.optimizer.state.get(master, {})
            for key, dtype in keys.items():
                if not isinstance(own.get(key), torch.Tensor):
                    found[index, key] = new_state(master, dtype, filled.get(state_memory_key(index, key), ()))
        return found

    def _hand_over(self, made: Mapping[tuple[int, str], torch.Tensor], note_change: NoteChange) -> None:
        for (index, key), tensor in made.items():
            note_change("optimizer")
            self.live.optimizer.state[self.live.flats[index].master][key] = tensor

    def memories(self, made: Mapping[tuple[int, str], torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """The tensors that copies go to, by `Memory.key`: the engine's, and those of the optimizer's that are `made`;
        the optimizer's are left out where that is None."""
        live = self.live
        found = {low.key: low.flat for each in live.low.values() for low in each}
        found.update({f"model/{name}": buffer.detach() for name, buffer in live.buffers.items()})
        for index, flat in enumerate(live.flats):
            found[f"fp32 of flat {index}"] = flat_view(flat.master)
        for index, key in self.optimizer.filled if made is not None else ():
            own = (made or {}).get((index, key))
            if own is None:
                own = live.optimizer.state[live.flats[index].master][key]
            found[state_memory_key(index, key)] = flat_view(own)
        return found

    def changes(self, made: Mapping[tuple[int, str], torch.Tensor] | None = None) -> dict[str, str]:
        """What is changed, in messages, where the memory of a key is filled. That of what is `made` is nobody's yet."""
        live = self.live
        found = {low.key: "model" for each in live.low.values() for low in each}
        found.update({f"model/{name}": "model" for name in live.buffers})
        found.update({f"fp32 of flat {index}": "fp32 masters" for index in range(len(live.flats))})
        for index, key in self.optimizer.filled:
            if (index, key) not in (made or {}):
                found[state_memory_key(index, key)] = "optimizer"
        return found

    @torch.no_grad()
    def _cast_shares(self, note_change: NoteChange) -> None:
        """Casts the module's shares at stage 3 from this rank's masters."""
        for name, part in self.model.parameters.items():
            for index, slot in part.low_from_master:
                note_change("model")
                elements = slice(slot.start, slot.start + slot.run.length)
                low = next(one for one in self.live.low[name] if one.slot == slot)
                low.flat[elements].copy_(self.live.flats[index].master.data[elements])

    @torch.no_grad()
    def cast_masters(self, names: frozenset[str], note_change: NoteChange) -> None:
        """Casts those masters of `names` that no file holds from the module's weights."""
        for name, part in self.model.parameters.items():
            for index, slot in part.master_from_low if name in names else ():
                note_change("fp32 masters")
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
        if self.model.masters or any(part.master_from_low for part in parts):
            restored.append("fp32 masters")
        if self.optimizer.filled:
            restored.append(
                f"optimizer state ({', '.join(sorted({key for _, key in self.optimizer.filled}))})"
            )
        if self.optimizer.groups:
            restored.append("hyperparameters")
        return restored


def _compared_path(place: str) -> str:
    return f"numbers that {place} must agree with"


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


def _set_extra_state(step: EngineStep, real: Mapping[str, Any], note_change: NoteChange) -> None:
    takers = extra_states(step.live.engine.module)
    for name in step.model.extra_state:
        note_change("model")
        takers[name].set_extra_state(real[f"state/model/{name}"])


def _set_numbers(step: EngineStep, real: Mapping[str, Any], note_change: NoteChange) -> None:
    """Sets the optimizer's ``step`` and the like."""
    part, optimizer = step.optimizer, step.live.optimizer
    for index in dict.fromkeys((*part.numbers, *part.ignored_numbers)):
        numbers = part.numbers.get(index, {})
        master = step.live.flats[index].master
        if not numbers and master not in optimizer.state:
            continue
        note_change("optimizer")
        state = optimizer.state[master]
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


def _set_groups(step: EngineStep, real: Mapping[str, Any], note_change: NoteChange) -> None:
    """Sets the optimizer's hyperparameters."""
    for index, saved in step.optimizer.groups.items():
        own = step.live.optimizer.param_groups[index]
        for key in saved:
            note_change("optimizer")
            value = real[_group_path(index, key)]
            if isinstance(own.get(key), torch.Tensor) and isinstance(value, torch.Tensor | int | float):
                own[key].fill_(float(value))
            else:
                own[key] = value


def objects_of(engine: Any) -> dict[str, Any]:
    """The engine's objects, besides its lr scheduler, that load their saved state themselves, by DeepSpeed's names."""
    owners: dict[str, Any] = {
        "random_ltd": getattr(engine, "random_ltd_scheduler", None),
        "data_sampler": getattr(getattr(engine, "training_dataloader", None), "data_sampler", None),
    }
    return {key: owner for key, owner in owners.items() if hasattr(owner, "load_state_dict")}


def _set_engine(step: EngineStep, real: Mapping[str, Any], note_change: NoteChange) -> list[str]:
    """Sets loss scaler, overflow, clipping, counters and lr scheduler, as DeepSpeed's own ``load_checkpoint`` does.

    Returns what was restored, for the receipt.
    """
    engine, part = step.live.engine, step.engine
    restored = _set_counters(step.live, part.counters, note_change)
    owners = objects_of(engine)
    for key in part.objects:
        note_change(key)
        owners[key].load_state_dict(real[f"state/engine/{key}"])
        restored.append(key)
    if part.scheduler is not None:
        scheduler = engine.lr_scheduler
        note_change("lr scheduler")
        scheduler.load_state_dict(with_empty(scheduler, real["state/schedulers"]))
        restored.append(f"lr scheduler {type(scheduler).__name__}")
        if part.rates_from_scheduler and _set_learning_rates(step.live, scheduler, note_change):
            restored.append("learning rates (from the scheduler: the optimizer's files do not hold them)")
    if "global_steps" in part.counters:
        engine.loaded_checkpoint_dp_world_size = step.saved.data_parallel_size
        engine.loaded_checkpoint_mp_world_size = step.live.position.layout.parts
    return restored


def _set_counters(live: LiveEngine, saved: Mapping[str, Any], note_change: NoteChange) -> list[str]:
    engine, optimizer = live.engine, live.engine.optimizer
    restored = []
    if saved:
        note_change("engine's counters")
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
            setattr(engine, key, saved[key])
            restored.append(f"{key} {saved[key]}")
    if "global_steps" in saved and "global_samples" not in saved:
        engine.global_samples = engine.global_steps * engine.train_batch_size()
    return restored


def _set_learning_rates(live: LiveEngine, scheduler: Any, note_change: NoteChange) -> bool:
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
    note_change("optimizer")
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
