"""Restores a torch module: plans which saved tensor goes where, then reads each straight into its parameter.

`plan_module` matches names and checks shapes and dtypes; `apply_module` gives meta tensors memory and fills them. A
module whose loading runs the user's own code (`loading_overrides`: hooks, or an overridden ``load_state_dict``) gets
real tensors through its own ``load_state_dict`` instead, and names that only its hooks know are checked there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import PartialRestoreError
from ..materialize.objects import materialize
from ..materialize.tensors import CopyRequest, TensorReader
from ..saved.assembled import AssembledTensor, SavedTensor
from ..saved.mismatch import Mismatch, dtype_problem
from ..saved.names import match_names
from ..saved.values import kind_of
from ..state import unwrap
from .dtensor import (
    TORCH_OWN,
    fill_requests,
    give_shards_memory,
    has_dtensors,
    is_dtensor,
    local_part,
    read_like,
    show_shards,
)

NoteChange = Callable[[str], None]
"""Called with a part's name before that part is first changed."""


@dataclass
class ModulePlan:
    """Which saved tensor goes to which of a module's; checked, nothing changed yet."""

    module: nn.Module
    sources: dict[str, Any]
    """The module's names to what the checkpoint has for them: saved tensors, or values of extra state."""
    mismatch: Mismatch
    renamed: dict[str, str] = field(default_factory=dict)
    cast: dict[str, str] = field(default_factory=dict)
    through_hooks: bool = False
    """A submodule overrides how it is loaded, so the module's own ``load_state_dict`` must run."""
    from_masters: list[str] = field(default_factory=list)
    """The module's names of weights that come from saved fp32 masters, not from the saved low-precision weights."""

    excused: frozenset[str] = frozenset()
    """The module's names that the checkpoint may lack: ignored, tied to a name that it has, or a newer batch count."""
    metadata: Any = None
    """Versions of the saved submodules (``state_dict()._metadata``), which a submodule's own loading may read."""

    @property
    def tensors(self) -> dict[str, SavedTensor]:
        return {name: value for name, value in self.sources.items() if isinstance(value, SavedTensor)}

    @property
    def spread(self) -> bool:
        """Whether tensors are saved in runs or go to shards, so that only `apply_module` can place them."""
        in_runs = any(isinstance(value, AssembledTensor) for value in self.sources.values())
        return in_runs or has_dtensors(self.module)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan_module(
    model: Any,
    saved: Mapping[str, Any],
    *,
    all_names: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
    masters: Mapping[int, SavedTensor] | None = None,
) -> ModulePlan:
    """Matches `saved` with the module inside `model`; changes no value, and no rank waits.

    Parameters may be DTensors, of which each rank gets its own shard. What does not fit is in the plan's ``mismatch``,
    for the caller to raise.

    Args:
        model: the module, or a wrapper that `unwrap` takes off.
        saved: name to saved tensor, or to a value of extra state, as ``ignore_keys`` left it.
        all_names: `saved` before ``ignore_keys``: names that were ignored do not count as missing.
        rename: saved name to this job's, before names are matched.
        masters: ``id`` of a value in `saved` to the fp32 weights that it was cast from; those go into a module whose
            dtype is another than the saved one.

    Raises `LayoutError` for modules that FSDP flattened, and for placements that are not of ``Shard`` and
    ``Replicate``.
    """
    module = unwrap(model)
    show_shards(module)
    targets = module_tensors(module)
    match = match_names(all_names if all_names is not None else saved, targets, rename)
    hooks = tuple(loading_overrides(module))
    plan = ModulePlan(module, {}, Mismatch(), renamed={}, through_hooks=bool(hooks))
    plan.metadata = getattr(all_names if all_names is not None else saved, "_metadata", None)
    for source_name, target_name in match.target_of.items():
        if source_name not in saved:
            continue
        value = _best_source(plan, target_name, saved[source_name], targets[target_name], masters or {})
        plan.sources[target_name] = value
        if source_name != target_name:
            plan.renamed[source_name] = target_name
        if not (hooks and target_name.startswith(hooks)):
            _check_tensor(plan, target_name, value, targets[target_name])
    _share_masters(plan, targets)
    satisfied = {id(targets[name]) for name in match.target_of.values() if targets[name] is not None}
    plan.excused = frozenset(
        name
        for name, target in targets.items()
        if name not in plan.sources
        and (name not in match.missing or id(target) in satisfied or _counts_batches(plan, name))
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
    return plan


def _best_source(
    plan: ModulePlan,
    name: str,
    value: Any,
    target: torch.Tensor | None,
    masters: Mapping[int, SavedTensor],
) -> Any:
    """The fp32 master of `value` where the module has another dtype than `value`: it is at least as precise."""
    master = masters.get(id(value))
    if master is None or target is None or dtype_name(target.dtype) == value.dtype:
        return value
    plan.from_masters.append(name)
    return master


def _share_masters(plan: ModulePlan, targets: Mapping[str, torch.Tensor | None]) -> None:
    """Gives a tied weight's other names its master too, where the checkpoint has it under one name only."""
    master_of = {id(targets[name]): plan.sources[name] for name in plan.from_masters}
    for name in plan.sources.keys() - set(plan.from_masters):
        if targets.get(name) is not None and id(targets[name]) in master_of:
            plan.sources[name] = master_of[id(targets[name])]
            plan.cast.pop(f"model/{name}", None)
            plan.from_masters.append(name)


def _check_tensor(plan: ModulePlan, name: str, value: Any, target: torch.Tensor | None) -> None:
    if target is None:
        return  # extra state, which only the submodule itself can check
    if not isinstance(value, SavedTensor):
        plan.mismatch.wrong.append(f"model/{name}: expected a tensor, got a {kind_of(value)}")
        return
    if isinstance(target, nn.UninitializedParameter | nn.UninitializedBuffer):
        if isinstance(value, AssembledTensor):
            plan.mismatch.wrong.append(
                f"model/{name}: is not initialised; run the module once before the load"
            )
        return
    if tuple(target.shape) != value.shape:
        plan.mismatch.wrong.append(f"model/{name}: expected shape {tuple(target.shape)}, got {value.shape}")
        return
    dtype = dtype_name(target.dtype)
    problem = dtype_problem(value.dtype, dtype)
    if problem:
        plan.mismatch.wrong.append(f"model/{name}: {problem}")
    elif value.dtype != dtype:
        plan.cast[f"model/{name}"] = f"{value.dtype} -> {dtype}"
    if is_dtensor(target):
        local_part(target, f"model/{name}")


def _counts_batches(plan: ModulePlan, name: str) -> bool:
    """Whether `name` is a batch count that the checkpoint is too old to have: torch's normalisation layers keep
    ``num_batches_tracked`` since their version 2, and leave it as it is when they load an older one."""
    prefix, _, key = name.rpartition(".")
    if key != "num_batches_tracked" or not isinstance(
        plan.module.get_submodule(prefix), nn.modules.batchnorm._NormBase
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
    """Name prefixes of the submodules whose loading runs the user's own code: hooks, or an overridden loader.

    Submodules that save nothing do not count, since they are not loaded (metrics, for one). [""], the whole module,
    where its ``state_dict`` has tensors that are neither parameters nor buffers.
    """
    own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    saved = module.state_dict(keep_vars=True)
    if any(isinstance(value, torch.Tensor) and name not in own for name, value in saved.items()):
        return [""]
    found = []
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if any(key.startswith(prefix) for key in saved) and _overrides_loading(part):
            found.append(prefix)
    return found


def _overrides_loading(part: nn.Module) -> bool:
    hooks = (*part._load_state_dict_pre_hooks.values(), *part._load_state_dict_post_hooks.values())
    if not all(str(getattr(_plain(hook), "__module__", "")).startswith(TORCH_OWN) for hook in hooks):
        return True
    return any(
        not getattr(getattr(type(part), method), "__module__", "").startswith("torch.")
        for method in ("_load_from_state_dict", "load_state_dict")
    )


def _plain(hook: Any) -> Any:
    """The function that torch wrapped to register it."""
    return getattr(hook, "hook", hook)


def apply_module(
    plan: ModulePlan,
    reader: TensorReader,
    note_change: NoteChange,
    *,
    strict: bool,
    materialize_options: Mapping[str, Any],
) -> None:
    """Carries out `plan` on this rank; no rank waits for another.

    Meta tensors are given memory first, as the same objects. Extra state is read before `note_change` is called,
    everything else after it. With `strict`, names that the module's own ``load_state_dict`` left out are an error.
    `materialize_options` are `materialize`'s ``safe_types`` and ``file``.

    Raises `CorruptError` where bytes are missing or do not match their checksum, `PartialRestoreError` where the
    module's own ``load_state_dict`` fails.
    """
    if not plan.sources:
        return
    extra = {name: value for name, value in plan.sources.items() if not isinstance(value, SavedTensor)}
    extra = materialize(extra, reader=reader, path="state/model", **materialize_options)
    note_change("model")
    allocate_meta(plan.module)
    targets = module_tensors(plan.module)
    if plan.through_hooks:
        real = {
            name: extra[name]
            if name in extra
            else read_like(value, targets.get(name), reader=reader, name=f"model/{name}")
            for name, value in plan.sources.items()
        }
        load_through_hooks(plan.module, real, plan.metadata, plan.excused, strict=strict)
        return
    requests: dict[int, list[CopyRequest]] = {}
    for name, value in plan.sources.items():
        target = targets[name]
        if target is not None:
            # Tied names are one tensor: the last one counts, as in torch's own loading.
            requests[id(target)] = list(fill_requests(value, target, f"model/{name}"))
    reader.copy([request for each in requests.values() for request in each])
    for name, value in extra.items():
        owner = plan.module.get_submodule(name.rpartition("_extra_state")[0].rstrip("."))
        owner.set_extra_state(value)


def allocate_meta(module: nn.Module) -> None:
    """Gives every meta parameter and buffer memory on the default device (shards: on their mesh's). They stay the same
    objects, so that an optimizer made before keeps its parameters."""
    give_shards_memory(module)
    device = torch.get_default_device()
    for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
        if not tensor.is_meta or is_dtensor(tensor):
            continue
        real = torch.empty_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            real = nn.Parameter(real, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, real)  # type: ignore[no-untyped-call]


def load_through_hooks(
    module: nn.Module, real: Mapping[str, Any], metadata: Any, excused: Collection[str], *, strict: bool
) -> None:
    """Hands the tensors `real` to the module's own ``load_state_dict``, with the saved versions (`metadata`).

    Names in `excused` may be missing. Raises `PartialRestoreError` where the module raises RuntimeError and, with
    `strict`, for other names that it reports as missing or unexpected.
    """
    given = OrderedDict(real)
    if metadata is not None:
        given._metadata = metadata  # type: ignore[attr-defined]
    try:
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
    """Parameters and persistent buffers by name, tied ones under each; None for a module's extra state."""
    persistent = module.state_dict(keep_vars=True)
    own: dict[str, torch.Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {
        name: own.get(name, value) if isinstance(value, torch.Tensor) else None
        for name, value in persistent.items()
    }


def parameter_names(model: Any) -> dict[int, str]:
    """Each parameter's name by its ``id``; the first name of tied ones."""
    return {id(parameter): name for name, parameter in unwrap(model).named_parameters()}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
