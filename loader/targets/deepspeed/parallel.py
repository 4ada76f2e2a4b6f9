"""Reads from a DeepSpeed engine which part of the model this rank has, its pipeline's layer files, and its experts.

`engine_position`, `layer_files` and `expert_layers` answer these three. Nothing is changed, no collective is used, and
DeepSpeed is not imported; its classes are found in ``sys.modules``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed

from ...errors import LayoutError
from ...plurals import counted
from ...saved.model_parallel import UNSPLIT, ExpertLayer, LayerFile, ParallelLayout, Position

_STAGES = ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size")
_TENSOR = (
    "get_tensor_model_parallel_world_size", "get_slice_parallel_world_size", "get_model_parallel_world_size",
)  # fmt: skip
"""Methods of an ``mpu`` for the number of pipeline stages and of tensor-parallel ranks, in DeepSpeed's own order."""


def engine_position(engine: Any) -> Position:
    """This rank's place in `engine`: the part of the model, and the data-parallel group that partitions it."""
    parts = int(getattr(engine, "mp_world_size", 1))
    pipeline = is_pipeline(engine.module)
    mpu = getattr(engine, "mpu", None)
    if parts > 1 or pipeline:
        layout = ParallelLayout(parts, _asked(mpu, _STAGES), _asked(mpu, _TENSOR), pipeline)
    else:
        layout = UNSPLIT
    rank, world_size = data_parallel_place(engine)
    return Position(rank, world_size, int(getattr(engine, "checkpoint_mp_rank", 0)), layout)


def data_parallel_place(engine: Any) -> tuple[int, int]:
    """This rank within the data-parallel group that partitions the optimizer, and the group's size."""
    if not torch.distributed.is_initialized():
        return 0, 1
    group = getattr(engine.optimizer, "dp_process_group", None)
    if group is None:
        # Stage 0 in fp32 partitions nothing; its ranks are numbered as in any other stage.
        group = getattr(engine, "seq_data_parallel_group", None)
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def _asked(mpu: Any, names: tuple[str, ...]) -> int:
    """The result of the first method of `names` that `mpu` has; 1 without any."""
    for name in names:
        if hasattr(mpu, name):
            return int(getattr(mpu, name)())
    return 1


def is_pipeline(module: Any) -> bool:
    """Whether `module` is a DeepSpeed ``PipelineModule``."""
    kind = getattr(sys.modules.get("deepspeed.runtime.pipe.module"), "PipelineModule", None)
    return kind is not None and isinstance(module, kind)


def layer_files(module: Any) -> tuple[LayerFile, ...]:
    """The files of the layers of this pipeline stage, tied ones too, each once. `module` is a ``PipelineModule``."""
    start = module._local_start
    found: dict[str, LayerFile] = {}
    tied = {id(layer): key for key, layer in module.tied_modules.items()}
    for local, layer in enumerate(module.forward_funcs):
        # DeepSpeed's own rule: functions have no file.
        if not hasattr(layer, "state_dict"):
            continue
        key = tied.get(id(layer))
        prefix = f"{start + local}." if key is None else _tied_prefix(key)
        found.setdefault(prefix, LayerFile(_file_name(module, local), prefix))
    for key in tied.values():
        # A tied module that only a function uses here; another stage may have it as a layer.
        for index, spec in enumerate(module._layer_specs):
            if getattr(spec, "key", None) == key and getattr(spec, "forward_fn", "") is None:
                prefix = _tied_prefix(key)
                found.setdefault(prefix, LayerFile(_file_name(module, index - start), prefix))
    return tuple(found.values())


def _tied_prefix(key: str) -> str:
    return f"tied_modules.{key}."


def _file_name(module: Any, local: int) -> str:
    """A layer file's name by DeepSpeed's ``ckpt_layer_path``, which a subclass may override; `local` counts layers from
    the stage's first one."""
    return str(module.ckpt_layer_path("", local)).rsplit("/", 1)[-1]


def unsaved_prefixes(module: Any) -> tuple[str, ...]:
    """Name prefixes of a pipeline's submodules that are in no layer file, such as a loss function's; else ()."""
    if not is_pipeline(module):
        return ()
    return tuple(
        f"{name}." for name, _ in module.named_children() if not name.isdecimal() and name != "tied_modules"
    )


def expert_layers(engine: Any) -> tuple[ExpertLayer, ...]:
    """The engine's MoE layers in the order of its module, by which DeepSpeed numbers their files; () without any.

    Raises `LayoutError` for experts that are no ``deepspeed.moe.layer.MoE`` (AutoEP), and for experts together with
    pipeline or tensor parallelism.
    """
    if not getattr(engine, "has_moe_layers", False):
        return ()
    pipeline = getattr(sys.modules.get("deepspeed.runtime.pipe.engine"), "PipelineEngine", ())
    if isinstance(engine, pipeline) or getattr(engine, "mp_world_size", 1) > 1:
        raise LayoutError("restoring experts (MoE) into pipeline or tensor parallelism is not supported")
    kind = getattr(sys.modules.get("deepspeed.moe.layer"), "MoE", ())
    found: list[ExpertLayer] = []
    for name, module in engine.module.named_modules():
        if isinstance(module, kind):
            ep_rank = torch.distributed.get_rank(module.deepspeed_moe.ep_group)
            found.append(ExpertLayer(name, len(found), module.num_experts, module.ep_size, ep_rank))
    if len(found) != len(engine.num_experts):
        raise LayoutError(
            f"the engine has {counted(len(engine.num_experts), 'layer')} of experts, of which {len(found)} are "
            "DeepSpeed's MoE: restoring into others (AutoEP) is not supported"
        )
    return tuple(found)
