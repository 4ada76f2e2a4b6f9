"""Reads a DeepSpeed ``model_states`` file: checks its entries, and gives them as `ModelStates`. Pure.

DeepSpeed writes the file in ``_save_checkpoint`` (``runtime/engine.py``). The experts of a mixture of experts are in
files of their own (`experts`), and so are the layers of a pipeline (`layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import FormatError, LayoutError
from ...formats.pickle.inert import TorchSize
from ...saved.demand import Shape
from ...saved.model_parallel import EXPERTS, UNSPLIT, ExpertLayer, ParallelLayout
from ...saved.tensor import SavedTensor
from .fields import Field, a_count, a_mapping, a_name, a_sequence, a_shape, a_tensor, named
from .model_parallel import saved_layout

OWN_KEYS = frozenset(
    {
        "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
        "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
        "csr_tensor_module_names", "skipped_steps", "global_steps", "global_samples", "dp_world_size",
        "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info",
        "num_experts", "ds_autoep_layers", "autoep_layers",
    }
)  # fmt: skip
"""Keys that are DeepSpeed's; the rest of the top level is the caller's client_state."""

_SHAPES_KNOWN = 64
"""How many shapes are compared with those that follow; a bound, since a file chooses their hashes."""


@dataclass(frozen=True)
class ModelStates:
    """The entries of one ``model_states`` file; none of its tensors was read."""

    file: str
    world_size: int
    """Data-parallel ranks that saved."""
    module: dict[str, Any]
    """Names to tensors, or to modules' extra state. Where `partitioned`, parameters are empty tensors. Of a
    pipeline's stage nothing, until `layers.with_layers` has filled it."""
    buffer_names: frozenset[str]
    param_shapes: tuple[dict[str, Shape], ...] | None
    """Per (sub)group, in the order of the flat tensors; None at stage 0."""
    shared: dict[str, str]
    """Alias to owner, for tied parameters; in rank 0's file only."""
    frozen_shapes: dict[str, Shape]
    frozen_fragments: dict[str, SavedTensor]
    """The frozen parameters themselves; where `partitioned`, the padded share of the rank that saved the file."""
    optimizer: Any
    """Stage 0: the whole optimizer's state, not checked yet. None otherwise."""
    lr_scheduler: Any
    data_sampler: Any
    random_ltd: Any
    global_steps: int
    global_samples: int | None
    skipped_steps: int
    batch_size: int | None
    """Samples of one step over all ranks, by the saved configuration; None where it does not say."""
    bf16: bool | None
    """Whether the saved configuration has bf16 on; None where it does not say."""
    configured_stage: int | None
    """The ZeRO stage in the saved configuration; None where it does not say."""
    partitioned: bool
    """Stage 3: parameters are in the optimizer files alone."""
    client_state: dict[str, Any]
    num_experts: tuple[int, ...] = ()
    """Experts of each MoE layer, over all ranks, in the module's order; () without experts."""
    data_before_experts: bool = False
    """Whether the ranks that have the same experts are neighbours, rather than ``ep_size`` apart."""
    experts: Mapping[str, ExpertLayer] = field(default_factory=dict)
    """MoE layers by name, once `experts.with_experts` has added this rank's experts to `module`."""
    optimizer_file: str = ""
    """What messages call the file that `optimizer` came from; empty where it is this one."""
    versions: Any = None
    """Of the module's submodules (``state_dict()._metadata``); None where the file does not say."""
    layout: ParallelLayout = UNSPLIT
    """How the model was split; this file is of one part."""


def read_model_states(tree: Any, *, file: str) -> ModelStates:
    """The entries of a model file, given the `tree` of its pickle; `file` is what messages call it.

    Raises `FormatError` where it is no DeepSpeed model file, `LayoutError` for experts of kinds that are not supported,
    and `CorruptError` where entries have impossible types or values, or contradict each other.
    """
    if not isinstance(tree, Mapping) or "module" not in tree or "dp_world_size" not in tree:
        raise FormatError(
            f"{file}: expected a DeepSpeed model_states file with 'module' and 'dp_world_size'", path=file
        )
    top = Field(file)
    layout = saved_layout(tree, top)
    own = {} if layout.pipeline else a_mapping(tree["module"], top.at("module"))
    module = named(own, top.at("module"))
    buffers = frozenset(
        a_name(name, top.at("buffer_names"))
        for name in a_sequence(tree.get("buffer_names") or [], top.at("buffer_names"))
    )
    shapes = _param_shapes(tree.get("param_shapes"), top.at("param_shapes"))
    config = tree.get("ds_config")
    config = config if isinstance(config, Mapping) else {}
    samples = tree.get("global_samples")
    return ModelStates(
        file=file,
        world_size=a_count(tree["dp_world_size"], top.at("dp_world_size"), least=1),
        module=module,
        buffer_names=buffers,
        param_shapes=shapes,
        shared=_names(tree.get("shared_params"), top.at("shared_params")),
        frozen_shapes=_shapes(tree.get("frozen_param_shapes"), top.at("frozen_param_shapes")),
        frozen_fragments=_tensors(tree.get("frozen_param_fragments"), top.at("frozen_param_fragments")),
        optimizer=tree.get("optimizer"),
        lr_scheduler=tree.get("lr_scheduler"),
        data_sampler=tree.get("data_sampler"),
        random_ltd=tree.get("random_ltd"),
        global_steps=a_count(tree.get("global_steps"), top.at("global_steps")),
        global_samples=None if samples is None else a_count(samples, top.at("global_samples")),
        skipped_steps=a_count(tree.get("skipped_steps"), top.at("skipped_steps")),
        batch_size=_batch_size(config, tree.get("dp_world_size")),
        bf16=_bf16(config),
        configured_stage=_stage(config),
        partitioned=not layout.pipeline and _is_partitioned(module, shapes, top),
        client_state={a_name(key, top): value for key, value in tree.items() if key not in OWN_KEYS},
        num_experts=_num_experts(tree, top),
        data_before_experts=config.get("use_data_before_expert_parallelism") is True,
        versions=getattr(own, "_metadata", None),
        layout=layout,
    )


def _batch_size(config: Mapping[Any, Any], ranks: Any) -> int | None:
    """Samples of one step, as DeepSpeed makes it of what is configured (``runtime/config.py``)."""
    whole = _positive(config.get("train_batch_size"))
    own = _positive(config.get("train_micro_batch_size_per_gpu"))
    accumulated = _positive(config.get("gradient_accumulation_steps", 1))
    if whole is not None or own is None or accumulated is None or type(ranks) is not int:
        return whole
    return own * accumulated * ranks


def _positive(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _num_experts(tree: Mapping[Any, Any], top: Field) -> tuple[int, ...]:
    value = tree.get("num_experts")
    if value is None:
        return ()
    unknown = ""
    if tree.get("ds_autoep_layers") or tree.get("autoep_layers"):
        unknown = "by AutoEP"
    elif not isinstance(value, list | tuple):
        unknown = "in the files of an older DeepSpeed, which do not tell the layers apart"
    elif tree["module"] is None or tree.get("mp_world_size", 1) != 1:
        unknown = "together with pipeline or tensor parallelism"
    if unknown:
        raise LayoutError(
            f"{top.file} was saved by a mixture of experts (num_experts {value}) {unknown}, which is not supported",
            path=top.file,
        )
    return tuple(a_count(count, top.at("num_experts"), least=1) for count in value)


def _param_shapes(value: Any, place: Field) -> tuple[dict[str, Shape], ...] | None:
    if value is None:
        return None
    groups = tuple(_shapes(group, place.at(i)) for i, group in enumerate(a_sequence(value, place)))
    seen: set[str] = set()
    for index, group in enumerate(groups):
        twice = seen & group.keys()
        if twice:
            raise place.at(index).wrong("each parameter in one group", sorted(twice)[0])
        seen |= group.keys()
    return groups


def _shapes(value: Any, place: Field) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    known: dict[TorchSize, Shape] = {}
    for name, shape in named(a_mapping({} if value is None else value, place), place).items():
        # A checkpoint has many parameters of few shapes.
        checked = known.get(shape) if type(shape) is TorchSize else None
        if checked is None:
            checked = a_shape(shape, place.at(name))
            if type(shape) is TorchSize and len(known) < _SHAPES_KNOWN:
                known[shape] = checked
        found[name] = checked
    return found


def _names(value: Any, place: Field) -> dict[str, str]:
    found = a_mapping({} if value is None else value, place)
    return {a_name(alias, place): a_name(owner, place.at(alias)) for alias, owner in found.items()}


def _tensors(value: Any, place: Field) -> dict[str, SavedTensor]:
    found = a_mapping({} if value is None else value, place)
    return {a_name(name, place): a_tensor(tensor, place.at(name)) for name, tensor in found.items()}


def _is_partitioned(
    module: Mapping[str, Any], shapes: tuple[dict[str, Shape], ...] | None, top: Field
) -> bool:
    """Whether the module's parameters are empty tensors.

    Raises `CorruptError` where some are and some are not, or one is neither empty nor of its shape in `shapes`.
    """
    empty = whole = 0
    for group in shapes or ():
        for name, shape in group.items():
            if EXPERTS in name and name not in module:
                continue
            tensor = module.get(name)
            if not isinstance(tensor, SavedTensor):
                raise top.at("module").at(name).wrong("a tensor", tensor)
            if tensor.shape == shape:
                whole += 0 not in shape
            elif tensor.numel == 0:
                empty += 1
            else:
                place = top.at("module").at(name)
                raise place.wrong(f"a tensor of shape {shape}, as param_shapes tells", tensor)
    if empty and whole:
        raise top.at("module").wrong("either all parameters or none", f"{whole} of {empty + whole}")
    return empty > 0


def _bf16(config: Mapping[Any, Any]) -> bool | None:
    section = config.get("bf16", config.get("bfloat16"))
    if section is None:
        return False if config else None
    enabled = section.get("enabled") if isinstance(section, Mapping) else None
    return enabled if isinstance(enabled, bool) else None


def _stage(config: Mapping[Any, Any]) -> int | None:
    section = config.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, Mapping) else None
    return stage if isinstance(stage, int) and 0 <= stage <= 3 else None
