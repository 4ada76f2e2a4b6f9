"""Restores a torch module: plans which saved tensor goes where, then reads each straight into its parameter.

`plan_module` matches names and checks shapes and dtypes; its `ModuleStep` fills the tensors. What is on the meta device
stays there until new memory for it is filled. A module whose loading does anything but copy (`loading_overrides`:
hooks, or a loader that is not torch's own) gets real tensors through its own ``load_state_dict`` instead, and names
that only its hooks know are checked there. What a saved entry is follows from its name: a parameter's, a buffer's, or
the extra state's of a submodule that takes it; never from what the target holds at the moment.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..errors import PartialRestoreError
from ..materialize.tensors import torch_dtype
from ..plurals import counted
from ..saved.contents import Saved
from ..saved.copies import Copy, Memory, copies_into
from ..saved.dtypes import keeps_values
from ..saved.mismatch import Mismatch, fits
from ..saved.names import (
    EXTRA_STATE,
    NameMatch,
    as_option,
    match_names,
    suggest_rename,
    without_checkpoint_wrappers,
)
from ..saved.regions import row_major_stride
from ..saved.strided import Layout
from ..saved.tensor import SavedTensor, of_one_element
from ..saved.values import InertTensor, kind_of
from ..state import unwrap
from .base import Change, Plan, RestoreOptions, Work
from .buffers import check_read, check_saved, values_place
from .dtensor import (
    TORCH_OWN,
    dtype_name,
    has_dtensors,
    is_dtensor,
    kept_part,
    local_part,
    shape_of,
    show_shards,
)
from .made_tensors import layout_problem, set_whole
from .meta_memory import MetaMemory

__all__ = [
    "NOT_INITIALISED",
    "ModulePlan",
    "ModuleStep",
    "dtype_name",
    "extra_states",
    "has_own_loader",
    "load_through_hooks",
    "loading_overrides",
    "module_tensors",
    "parameter_names",
    "plan_module",
]

NOT_INITIALISED = "is not initialised; run the module once before the load"
"""What is wrong with a target that has no shape yet."""


@dataclass
class ModulePlan:
    """Which saved tensor goes to which of a module's; checked, nothing changed yet."""

    module: nn.Module
    sources: dict[str, Any] = field(default_factory=dict)
    """The module's names to what the checkpoint has for them: saved tensors, or values of extra state."""
    mismatch: Mismatch = field(default_factory=Mismatch)
    renamed: dict[str, str] = field(default_factory=dict)
    cast: dict[str, str] = field(default_factory=dict)
    through_hooks: bool = False
    """A submodule overrides how it is loaded, so the module's own ``load_state_dict`` must run."""
    from_masters: list[str] = field(default_factory=list)
    """The module's names of weights that come from saved fp32 masters, not from the saved low-precision weights."""
    excused: frozenset[str] = frozenset()
    """The module's names that the checkpoint may lack: ignored, tied to a name that it has, or a newer batch count."""
    unchecked: dict[str, SavedTensor] = field(default_factory=dict)
    """Buffers whose values must survive a cast, and could not be read yet: compared before the first change."""
    metadata: Any = None
    """Versions of the saved submodules (``state_dict()._metadata``), which a submodule's own loading may read."""

    @cached_property
    def targets(self) -> dict[str, torch.Tensor | None]:
        """The module's tensors while it is planned; algorithms may have changed the module by the time it is filled."""
        return module_tensors(self.module)

    @property
    def spread(self) -> bool:
        """Whether tensors are saved in pieces or go to shards, so that only a `ModuleStep` can place them."""
        in_pieces = any(
            isinstance(value, SavedTensor) and value.whole is None for value in self.sources.values()
        )
        return in_pieces or has_dtensors(self.module)

    @property
    def complete(self) -> bool:
        """Whether the checkpoint has something for each of the module's names, and nothing else."""
        return self.sources.keys() == module_tensors(self.module).keys()

    def as_plan(self, *, filled: bool = True) -> Plan:
        """The plan, with the step that fills the module unless `filled` is False or something does not fit.

        Raises `LayoutError` where elements lie in files that were not read, or for a placement of a shard that is not
        of ``Shard`` and ``Replicate``.
        """
        steps = (_step(self),) if filled and self.sources and not self.mismatch.wrong else ()
        count = len(self.from_masters)
        notes = (f"from the saved fp32 masters, not from the module's file: {counted(count, 'weight')}",)
        return Plan(steps, self.mismatch, self.renamed, self.cast, notes=notes if count else ())


@dataclass(frozen=True)
class ModuleStep:
    """Fills a module's tensors, or hands real ones to its own ``load_state_dict``."""

    plan: ModulePlan
    copies: tuple[Copy, ...]
    trees: Mapping[str, Any]
    """Extra state, and tensors that are made as a whole; with hooks also those that repeat elements, which need no
    memory for each."""

    def prepare(self, work: Work) -> Change:
        """Reads extra state, compares the buffers that the check could not read, and makes the memory that meta tensors
        get when it is filled; they stay the same objects.

        With ``strict``, names that the module's own ``load_state_dict`` left out are an error. Raises `CorruptError`
        where bytes are missing or do not match their checksum, `MismatchError` where a buffer's values do not survive
        its cast, `PartialRestoreError` where the module's own ``load_state_dict`` fails.
        """
        plan = self.plan
        made = work.real(self.trees)
        targets = module_tensors(plan.module)
        check_read(
            {name: (made[values_place(name)], targets[name]) for name in plan.unchecked}, work.options.file
        )
        real = {name: made[_place(name)] for name in plan.sources if _place(name) in made}
        made_for = MetaMemory(plan.module)
        return lambda: self._change(real, targets, made_for, work)

    def _change(
        self,
        real: Mapping[str, Any],
        targets: Mapping[str, torch.Tensor | None],
        made_for: MetaMemory,
        work: Work,
    ) -> list[str]:
        plan = self.plan
        if plan.through_hooks:
            self._load_through_hooks(real, targets, made_for, work)
        else:
            filled = {copy.memory.key for copy in self.copies}
            memories, changes = {}, {}
            for name, target in targets.items():
                if target is not None and _key(name) in filled:
                    memories[_key(name)] = local_part(made_for.of(target), _key(name))[1]
                    if not target.is_meta:
                        changes[_key(name)] = "model"
            work.fill(self.copies, memories, changes)
            if made_for or real:
                work.note_change("model")
            made_for.give()
            takers = extra_states(plan.module)
            for name, value in real.items():
                target = targets[name]
                if target is None:
                    takers[name].set_extra_state(value)
                else:
                    set_whole(target, value)
        nbytes = sum(value.nbytes for value in plan.sources.values() if isinstance(value, SavedTensor))
        count = len(plan.sources)
        return [f"model ({counted(count, 'entry', 'entries')}, {counted(nbytes, 'byte')})"]

    def _load_through_hooks(
        self,
        real: Mapping[str, Any],
        targets: Mapping[str, torch.Tensor | None],
        made_for: MetaMemory,
        work: Work,
    ) -> None:
        plan = self.plan
        given = dict(real)
        memories: dict[str, torch.Tensor] = {}
        for name, value in plan.sources.items():
            if name in real:
                continue
            target, dtype = targets.get(name), torch_dtype(value.dtype)
            if target is not None and _gets_shards(value, target):
                given[name] = torch.empty_like(made_for.of(target).detach(), dtype=dtype)
            else:
                given[name] = torch.empty(value.shape, dtype=dtype, device="cpu")
            memories[_key(name)] = local_part(given[name], _key(name))[1]
        work.fill(self.copies, memories)
        for name, value in plan.sources.items():
            if isinstance(value, SavedTensor) and not is_dtensor(given[name]):
                given[name].requires_grad_(value.requires_grad)
        in_order = {name: given[name] for name in plan.sources}
        work.note_change("model")
        made_for.give()
        load_through_hooks(plan.module, in_order, plan.metadata, plan.excused, strict=work.options.strict)


def _key(name: str) -> str:
    """The key of a tensor's memory, which is also its name in messages."""
    return f"model/{name}"


def _place(name: str) -> str:
    """Where a value of extra state is in the checkpoint."""
    return f"state/model/{name}"


def plan_module(model: Any, saved: Saved, options: RestoreOptions) -> ModulePlan:
    """Matches the saved weights with the module inside `model`; changes no value, and no rank waits.

    Parameters may be DTensors, of which each rank gets its own shard. Names that ``ignore_keys`` left out do not count
    as missing, and a part that it left out as a whole gives an empty plan. What does not fit is in the plan's
    ``mismatch``, for the caller to raise. Raises `LayoutError` for modules that FSDP flattened.
    """
    module = unwrap(model)
    plan = ModulePlan(module)
    whole, left = saved.whole.state.get("model"), saved.state.get("model")
    if whole is None:
        plan.mismatch.missing.append("model: the checkpoint has no weights")
    elif "model" in saved.state:
        if not (isinstance(left, Mapping) and isinstance(whole, Mapping)):
            plan.mismatch.wrong.append(f"model: expected a dict of tensors, got a {kind_of(left)}")
            return plan
        show_shards(module)
        # By value, not by name: ``ignore_keys`` may have given a name the weights of another.
        masters = {id(whole[name]): master for name, master in saved.masters.items() if name in whole}
        match = match_names(whole, plan.targets, options.rename)
        plan.metadata = _as_named_here(getattr(whole, "_metadata", None), match)
        _match(plan, left, match, masters, options)
        _explain(plan, whole, match, options)
    return plan


def _as_named_here(metadata: Any, match: NameMatch) -> Any:
    """The saved versions of submodules by this module's names, where a wrapper or ``rename`` changes them."""
    if not isinstance(metadata, Mapping) or not match.renamed:
        return metadata
    named = match.modules
    return OrderedDict((named.get(path, path), versions) for path, versions in metadata.items())


def _explain(plan: ModulePlan, whole: Mapping[str, Any], match: NameMatch, options: RestoreOptions) -> None:
    """Notes which missing names are frozen parameters, and the ``rename`` that makes names match, if there is one."""
    targets = plan.targets
    frozen = [
        name
        for name in match.missing
        if isinstance(target := targets[name], nn.Parameter) and not target.requires_grad
    ]
    missing = set(plan.mismatch.missing)
    plan.mismatch.frozen.extend(_key(name) for name in frozen if _key(name) in missing)
    if options.allow_missing_frozen:
        plan.excused |= frozenset(frozen)
    if plan.mismatch.missing and plan.mismatch.unexpected:
        shapes = {name: None if one is None else shape_of(one) for name, one in targets.items()}
        plan.mismatch.advice.extend(rename_advice(whole, shapes, options.rename))


def rename_advice(
    saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...] | None], rename: Mapping[str, str]
) -> list[str]:
    """The sentence on the ``rename`` that makes the names in `saved` match those in `shapes`; empty where none does.

    `shapes` is by this job's names, None where a name has no shape: tensors of other shapes do not match.
    """

    def agree(source: str, target: str) -> bool:
        shape, value = shapes[target], saved[source]
        return shape is None or not isinstance(value, SavedTensor) or value.shape == shape

    found = suggest_rename(saved, shapes, rename, agree=agree)
    if found is None:
        return []
    entries, gained = found
    return [f"Pass LoadOptions({as_option(entries)}): with it {gained} more of the model's names are found."]


def _match(
    plan: ModulePlan,
    saved: Mapping[str, Any],
    match: NameMatch,
    masters: Mapping[int, SavedTensor],
    options: RestoreOptions,
) -> None:
    """Fills `plan` with what of `saved` goes where, by `match`; `masters` are by ``id`` of the weights in `saved`."""
    module = plan.module
    targets = plan.targets
    takers = extra_states(module)
    hooks = tuple(loading_overrides(module))
    plan.through_hooks = bool(hooks)
    for source_name, target_name in match.target_of.items():
        if source_name not in saved:
            continue
        target = targets[target_name]
        value = saved[source_name]
        master = masters.get(id(value))
        if master is not None and _is_better(master, value, target):
            value = master
            plan.from_masters.append(target_name)
        plan.sources[target_name] = value
        if source_name != target_name:
            plan.renamed[source_name] = target_name
        if not (hooks and target_name.startswith(hooks)):
            _check_tensor(plan, target_name, value, target, options)
    _share_masters(plan, targets)
    # A tied parameter is one tensor, and the extra state of a shared submodule is one submodule's.
    shared = {name: takers.get(name, target) for name, target in targets.items()}
    satisfied = {id(shared[name]) for name in match.target_of.values() if shared[name] is not None}
    plan.excused = frozenset(
        name
        for name, owner in shared.items()
        if name not in plan.sources
        and (name not in match.missing or id(owner) in satisfied or _counts_batches(plan, name))
    )
    plan.mismatch.missing.extend(f"model/{name}" for name in match.missing if name not in plan.excused)
    plan.mismatch.unexpected.extend(f"model/{name}" for name in match.unexpected if name in saved)
    if hooks and (plan.mismatch.missing or plan.mismatch.unexpected):
        # Hooks may rename what they are given, so only the submodule's own loading can find names missing.
        hooked = tuple(f"model/{prefix}" for prefix in hooks)
        plan.sources.update(
            {name: saved[name] for name in match.unexpected if name in saved and name.startswith(hooks)}
        )
        plan.mismatch.missing = [name for name in plan.mismatch.missing if not name.startswith(hooked)]
        plan.mismatch.unexpected = [name for name in plan.mismatch.unexpected if not name.startswith(hooked)]
    if not hooks:
        _refuse_unfillable(plan, module)


def _step(plan: ModulePlan) -> ModuleStep:
    targets = plan.targets
    trees = {
        _place(name): value
        for name, value in plan.sources.items()
        if not isinstance(value, SavedTensor)
        or (_made_whole(value, targets.get(name)) if plan.through_hooks else targets[name] is None)
    }
    trees.update({values_place(name): value for name, value in plan.unchecked.items()})
    copies: dict[Any, list[Copy]] = {}
    for name, value in plan.sources.items():
        if _place(name) in trees:
            continue
        target = targets.get(name)
        # Tied names are one tensor: the last one counts, as in torch's own loading. Hooks are given each.
        one = name if plan.through_hooks else id(target)
        copies[one] = list(_copies(plan, name, value, target))
    return ModuleStep(plan, tuple(copy for each in copies.values() for copy in each), trees)


def _copies(plan: ModulePlan, name: str, value: SavedTensor, target: torch.Tensor | None) -> Iterator[Copy]:
    """What fills this rank's part of the tensor `name`; with hooks, of the new tensor that they are given."""
    key = _key(name)
    if target is None or (plan.through_hooks and not _gets_shards(value, target)):
        memory = Memory(key, value.dtype, value.shape, row_major_stride(value.shape), plain=True)
        yield from copies_into(value, memory.whole, memory, name=key)
        return
    new = torch_dtype(value.dtype) if plan.through_hooks else None
    region, memory = kept_part(target, key, new=new)
    yield from copies_into(value, region, memory, name=key)


def _gets_shards(value: SavedTensor, target: torch.Tensor) -> bool:
    """Whether hooks are given a DTensor like `target`; they get any other tensor whole, in the CPU's memory."""
    return is_dtensor(target) and tuple(target.shape) == value.shape


def _made_whole(value: SavedTensor, target: torch.Tensor | None) -> bool:
    """Whether hooks are given `value` as it was saved: it has elements of its storage several times (``expand``).

    A full copy would take as much memory as the file claims, whatever its size.
    """
    piece = value.whole
    if target is not None and _gets_shards(value, target):
        return False
    return piece is not None and Layout(value.shape, piece.stride, 0).span < value.numel


def _is_better(master: SavedTensor, value: Any, target: torch.Tensor | None) -> bool:
    """Whether `master` goes into `target` in place of `value`, a cast of it: the module has another dtype than that."""
    return (
        target is not None
        and isinstance(value, SavedTensor)
        and value.dtype not in ("float32", dtype_name(target.dtype))
        and value.shape == master.shape
    )


def _share_masters(plan: ModulePlan, targets: Mapping[str, torch.Tensor | None]) -> None:
    """Gives a tied weight's other names its master too, where the checkpoint has it under one name only."""
    master_of = {id(targets[name]): plan.sources[name] for name in plan.from_masters}
    for name in plan.sources.keys() - set(plan.from_masters):
        if targets.get(name) is not None and id(targets[name]) in master_of:
            plan.sources[name] = master_of[id(targets[name])]
            plan.cast.pop(f"model/{name}", None)
            plan.from_masters.append(name)


def _check_tensor(
    plan: ModulePlan, name: str, value: Any, target: torch.Tensor | None, options: RestoreOptions
) -> None:
    if target is None:
        return  # extra state, which only the submodule itself can check
    shape, buffer = shape_of(target), not isinstance(target, nn.Parameter)
    if shape is None:
        plan.mismatch.wrong.append(f"model/{name}: {NOT_INITIALISED}")
        return
    problem = layout_problem(value, target)
    if problem:
        plan.mismatch.wrong.append(f"model/{name}: {problem}")
        return
    if isinstance(value, InertTensor):
        fits(value, _key(name), shape, dtype_name(target.dtype), plan.mismatch, plan.cast, made=True)
        return
    if fits(value, _key(name), shape, dtype_name(target.dtype), plan.mismatch, plan.cast, buffer=buffer):
        plan.sources[name] = of_one_element(value, shape)
        if not keeps_values(value.dtype, dtype_name(target.dtype)):
            if options.readable(value):
                check_saved(value, target, _key(name), plan.mismatch)
            else:
                plan.unchecked[name] = plan.sources[name]


def _counts_batches(plan: ModulePlan, name: str) -> bool:
    """Whether `name` is a batch count that the checkpoint is too old to have: torch's normalisation layers keep
    ``num_batches_tracked`` since their version 2, and leave it as it is when they load an older one."""
    prefix, _, key = name.rpartition(".")
    if key != "num_batches_tracked" or not isinstance(
        submodule(plan.module, prefix), nn.modules.batchnorm._NormBase
    ):
        return False
    version = plan.metadata.get(prefix, {}).get("version") if isinstance(plan.metadata, Mapping) else None
    return version is None or version < 2


def _refuse_unfillable(plan: ModulePlan, module: nn.Module) -> None:
    """Notes meta tensors that the checkpoint has nothing for: given memory, they would hold garbage."""
    saved = module_tensors(module)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in saved:
            plan.mismatch.wrong.append(
                f"model/{name}: a non-persistent buffer on the meta device, which no checkpoint holds; "
                "create it on a real device"
            )
    for name, target in saved.items():
        if target is not None and target.is_meta and name not in plan.sources:
            alias = any(saved[other] is target for other in plan.sources)
            if not alias:
                plan.mismatch.wrong.append(
                    f"model/{name}: on the meta device, and the checkpoint has nothing to fill it with"
                )


def loading_overrides(module: nn.Module) -> list[str]:
    """Name prefixes of the submodules whose loading may do anything but copy: hooks, or a loader that is not known.

    Submodules that save nothing do not count, since they are not loaded (metrics, for one).
    """
    return _overrides(module, module.state_dict(keep_vars=True))


def _overrides(module: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    found = []
    for path, part in module.named_modules():
        name = without_checkpoint_wrappers(path)
        prefix = f"{name}." if name else ""
        if _overrides_loading(part) and any(key.startswith(prefix) for key in saved):
            found.append(prefix)
    return found


def _overrides_loading(part: nn.Module) -> bool:
    hooks = (*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values())
    return has_own_loader(part) or not all(
        str(getattr(_plain(hook), "__module__", "")).startswith(TORCH_OWN) for hook in hooks
    )


def has_own_loader(part: nn.Module) -> bool:
    """Whether `part` has a loader of its own: torch's layers (``torch.nn.modules``) only copy, its observers and other
    modules for quantization resize what they hold."""
    return any(
        not str(getattr(getattr(part, method), "__module__", "")).startswith("torch.nn.modules.")
        for method in ("_load_from_state_dict", "load_state_dict")
    )


def _plain(hook: Any) -> Any:
    """The function that torch wrapped to register it."""
    return getattr(hook, "hook", hook)


def load_through_hooks(
    module: nn.Module, real: Mapping[str, Any], metadata: Any, excused: Collection[str], *, strict: bool
) -> None:
    """Hands the tensors `real` to the module's own ``load_state_dict``, with the saved versions (`metadata`).

    Names in `excused` may be missing. A module with tensors that were made under ``inference_mode`` is loaded there, as
    they can only be changed there. Raises `PartialRestoreError` where the module raises RuntimeError and, with
    `strict`, for other names that it reports as missing or unexpected.
    """
    given = OrderedDict(real)
    if metadata is not None:
        given._metadata = metadata  # type: ignore[attr-defined]
    try:
        inference = any(tensor.is_inference() for tensor in [*module.parameters(), *module.buffers()])
        with torch.inference_mode() if inference else contextlib.nullcontext():
            # Not strictly: torch would report names that were ignored, or are tied to one that is there.
            incompatible = module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise PartialRestoreError(
            f"{type(module).__name__}.load_state_dict failed: {error}", changed=("model",)
        ) from error
    missing = [name for name in getattr(incompatible, "missing_keys", ()) if name not in excused]
    unexpected = list(getattr(incompatible, "unexpected_keys", ()))
    if strict and (missing or unexpected):
        raise PartialRestoreError(
            f"{type(module).__name__}.load_state_dict, which is not torch's own, left names out; missing: "
            f"{', '.join(missing[:20]) or 'none'}; unexpected: {', '.join(unexpected[:20]) or 'none'}",
            changed=("model",),
        )


def module_tensors(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Parameters and persistent buffers by name, tied ones under each; None for the extra state of submodules that take
    it.

    What else the module's ``state_dict`` has is there only below a loader that may take it (`loading_overrides`).
    """
    persistent = module.state_dict(keep_vars=True)
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own: dict[str, torch.Tensor] = {without_checkpoint_wrappers(name): tensor for name, tensor in named}
    takers = extra_states(module)
    others = persistent.keys() - own.keys() - takers.keys()
    loaders = tuple(_overrides(module, persistent)) if others else ()
    found: dict[str, torch.Tensor | None] = {}
    for name, value in persistent.items():
        if name in takers:
            found[name] = None
        elif name in own or (loaders and name.startswith(loaders)):
            found[name] = own.get(name, value if isinstance(value, torch.Tensor) else None)
    return found


def extra_states(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that take extra state, by its name: those with a ``set_extra_state`` of their own."""
    return {
        f"{name}.{EXTRA_STATE}" if name else EXTRA_STATE: part
        for name, part in (
            (without_checkpoint_wrappers(path), part)
            for path, part in module.named_modules(remove_duplicate=False)
        )
        if type(part).set_extra_state is not nn.Module.set_extra_state
    }


def submodule(module: nn.Module, name: str) -> nn.Module:
    """The submodule that a state dict calls `name`: of one inside a checkpoint wrapper, the inner one."""
    parts: dict[str, nn.Module] = {
        without_checkpoint_wrappers(path): part for path, part in module.named_modules()
    }
    return parts[name]


def parameter_names(model: Any) -> dict[int, str]:
    """Each parameter's name by its ``id``; the first name of tied ones. Without a model there are none."""
    if model is None:
        return {}
    return {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
