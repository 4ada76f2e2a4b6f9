"""Accelerate's ``load_state`` at any number of processes, and from any URI, with DeepSpeed or DDP.

    from rankload.integrations import accelerate

    accelerate.attach(accelerator)          # once, after prepare()
    accelerator.load_state("s3://bucket/run/checkpoint_3")

`attach` changes this one accelerator: its engines are loaded by `rankload.load`, its schedulers go on with the right
learning rates (`schedules`), and ranks that have saved no random states get derived ones. What it saves from then on
tells the samples of one step, which Accelerate's own files do not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ..distributed.session import open_session
from ..loader import LoadOptions, NotFoundError, OptionError, read
from ..loader.alone import open_alone
from ..loader.redaction import redact_path
from ..loader.stores.base import Heard
from ..loader.stores.names import child_of
from . import deepspeed
from .batches import warn_of_batch, warn_of_unknown_batch
from .choosing import newest
from .native import native_load
from .random_states import restore_missing
from .schedules import STEPS, Resumed, resumed
from .side_folders import count_numbered, is_elsewhere, read_beside, side_folder
from .versions import warn_of_version

__all__ = ["attach", "load_state", "newest"]

TRIED = ("1.15",)

_OF_RANK = "random_states_{}.pkl"
_NOTE = "rankload.json"
"""What an attached accelerator saves: the samples of one step over all ranks, for each prepared loader."""
_LARGEST_NOTE = 1 << 16


def attach(
    accelerator: Any,
    *,
    saved_batch_size: int | None = None,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> Any:
    """Makes ``accelerator.load_state`` of this one accelerator `load_state`, and returns it; no class is touched.

    Attach in the first run too: what ``save_state`` writes then has the samples of one step in ``rankload.json``, by
    Accelerate's own hook for that. For one engine without its accelerator there is `deepspeed.attach`; then schedulers
    and random states are the job's.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        saved_batch_size, object_store, options: as `load_state` takes them.
    """
    if not hasattr(accelerator, "load_state"):
        raise OptionError(
            f"attach was given a {type(accelerator).__name__}, expected the Accelerator: its schedulers and random "
            "states are restored too. For an engine alone: rankload.integrations.deepspeed.attach(engine)"
        )
    bound = functools.partial(
        load_state, saved_batch_size=saved_batch_size, object_store=object_store, options=options
    )
    if not isinstance(accelerator.__dict__.get("load_state"), types.MethodType):
        accelerator.register_save_state_pre_hook(functools.partial(_save_note, accelerator))
    accelerator.load_state = types.MethodType(bound, accelerator)
    return accelerator


def _save_note(accelerator: Any, models: Any, weights: Any, output_dir: str) -> None:
    """Writes the samples of one step beside what Accelerate saves; on one rank of those that see the folder."""
    own = accelerator.project_configuration.save_on_each_node
    if not (accelerator.is_local_main_process if own else accelerator.is_main_process):
        return
    batches = _batches(accelerator, by_engine=_kind(accelerator) == "DEEPSPEED")
    if not batches:
        return
    path = os.path.join(output_dir, _NOTE)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({"samples_of_a_step": batches}, file)
    os.replace(f"{path}.tmp", path)


def load_state(
    accelerator: Any,
    input_dir: str | os.PathLike[str] | None = None,
    load_kwargs: dict[str, Any] | None = None,
    *,
    saved_batch_size: int | None = None,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
    **load_model_func_kwargs: Any,
) -> None:
    """Does ``accelerator.load_state``, at any number of processes and from any path or URI.

    Every rank must call it, with the same arguments. What was handed to ``prepare`` must be so before.

    Args:
        accelerator: an ``accelerate.Accelerator``.
        input_dir: the folder that ``save_state`` wrote: a local path or a URI. None: with automatic checkpoint naming
            the `newest` that is proven whole.
        load_kwargs, load_model_func_kwargs: as Accelerate takes them.
        saved_batch_size: samples of one optimizer step over all ranks when the checkpoint was saved. None: as
            the checkpoint tells, by DeepSpeed's files or because its job was attached. Schedules of samples need it.
        object_store, options: as `rankload.load` takes them.

    Raises:
        OptionError: a scheduler cannot go on with the right rates (`schedules`), before anything was changed.
        RankloadError: as `rankload.load` and `rankload.find_checkpoints`.
    """
    warn_of_version("accelerate", TRIED)
    path = _path(accelerator, input_dir, options)
    if input_dir is None:
        object_store = None  # what Accelerate named is in its own local folder
    by_engine = _kind(accelerator) == "DEEPSPEED"
    load_native, now = type(accelerator).load_state, accelerator.num_processes
    with contextlib.ExitStack() as leaving:
        folder = path
        given: dict[str, Any] = {"object_store": None, "options": options}
        if is_elsewhere(path, object_store):
            given["object_store"] = object_store
            folder = leaving.enter_context(_side_folder(accelerator, path, given))
        before, told = _saved(path, by_engine=by_engine, given=given)
        batches = _batches(accelerator, by_engine=by_engine)
        batch = _one(batches)
        if saved_batch_size is not None:
            told, batches = [saved_batch_size], batches if batch is None else [batch]
        saved_batch = _one(told)
        schedulers = _counting(accelerator)
        plans = [
            resumed(
                one.scheduler,
                read(child_of(path, name), progress_bar=False, **given),
                before=before,
                now=now,
                saved_batch=saved_batch,
                batch=batch,
            )
            for name, one in schedulers.items()
        ]
        own_states = os.path.join(folder, _OF_RANK.format(accelerator.process_index))
        has_own = os.path.isfile(own_states)
        if by_engine:
            leaving.enter_context(deepspeed.replaced_by_origins(**given))
        with native_load("Accelerate", options):
            load_native(accelerator, folder, load_kwargs, **load_model_func_kwargs)
        for one, plan in zip(schedulers.values(), plans, strict=True):
            _go_on(one, plan, now)
        held = restore_missing(
            path, _OF_RANK.format(0), rank=accelerator.process_index, has_own=has_own, **given
        )
        if held is not None and not has_own and isinstance(held.get("step"), int):
            accelerator.step = held["step"]  # of the batches that make one optimizer step
    if by_engine:
        return
    remedy = (
        "Keep it by the data loader's batch_size or by gradient_accumulation_steps, or skip as many samples"
    )
    if not told:
        warn_of_unknown_batch(
            before,
            now,
            counted_by="Accelerate",
            remedy=f"{remedy}; attach() in the saving job tells it from then on",
        )
    elif len(told) == len(batches):
        differ = [pair for pair in zip(told, batches, strict=True) if pair[0] != pair[1]]
        for saved, here in differ[:1]:
            warn_of_batch(saved, here, counted_by="Accelerate", remedy=remedy)


def _path(accelerator: Any, input_dir: Any, options: Any) -> str:
    if input_dir is not None:
        path: str = os.fspath(input_dir)
        return path if os.path.exists(path) else os.path.expanduser(path)
    settings = accelerator.project_configuration
    if not settings.automatic_checkpoint_naming:
        raise OptionError(
            "load_state was given no folder, and automatic checkpoint naming is off: pass the folder that save_state "
            "wrote, or its URI"
        )
    run = os.path.join(accelerator.project_dir, "checkpoints")
    found = newest(run, options=options)
    if found is None:
        raise NotFoundError(f"{run} has no checkpoint that is whole; rankload find {run} says why", path=run)
    return found


def _kind(accelerator: Any) -> str:
    return str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))


def _side_folder(
    accelerator: Any, path: str, given: Mapping[str, Any]
) -> contextlib.AbstractContextManager[str]:
    """A local folder with what Accelerate reads itself of the checkpoint at `path`; without DeepSpeed that is all."""
    kind = _kind(accelerator)
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
        raise OptionError(
            f"Accelerate reads the files of {kind} itself, from a local folder: fetch the checkpoint to one, or "
            "restore model and optimizer with rankload.load"
        )
    loaders, models = accelerator._dataloaders, accelerator._models
    small = [
        "scaler.pt",
        *_names("scheduler", ".bin", accelerator._schedulers),
        *_names("sampler", ".bin", loaders),
        *_names("dl_state_dict", ".bin", loaders),
        # One more than there are here: Accelerate refuses a checkpoint that has more.
        *(f"custom_checkpoint_{number}.pkl" for number in range(len(accelerator._custom_objects) + 1)),
    ]
    whole = [
        *_names("model", ".safetensors", models),
        *_names("pytorch_model", ".bin", models),
        *_names("optimizer", ".bin", accelerator._optimizers),
    ]
    return side_folder(
        path,
        small,
        _OF_RANK.format,
        marker=_OF_RANK.format(0),
        whole=() if kind == "DEEPSPEED" else whole,
        **given,
    )


def _names(name: str, end: str, of: Sequence[Any]) -> list[str]:
    """The files that Accelerate writes of those of one kind: all but the first one's have their number."""
    return [f"{name}_{number}{end}" if number else f"{name}{end}" for number in range(len(of))]


def _saved(path: str, *, by_engine: bool, given: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The processes that saved the checkpoint, and the samples of one step over all of them for each of its loaders,
    as far as it tells; with an engine for that.

    Every rank must call.
    """

    def look(heard: Heard) -> tuple[int, list[int]]:
        ranks = count_numbered(path, _OF_RANK, heard=heard, **given)
        if ranks == 0:
            raise NotFoundError(
                f"{redact_path(path)} has no {_OF_RANK.format(0)}: expected a folder that save_state wrote, and that "
                "was finished",
                path=redact_path(path),
            )
        if not by_engine:
            return ranks, _noted(path, heard=heard, **given)
        with open_alone(path, **given) as opened:
            batch = opened.saved.batch_size
        return ranks, [] if batch is None else [batch]

    with open_session() as session:
        channel = session.channel
        ranks, batches = channel.decide("saved processes", None, lambda _: look(channel.heard))
        return ranks, batches


def _noted(path: str, *, heard: Heard, object_store: Any, options: Any) -> list[int]:
    """What `_save_note` wrote there; nothing where it did not, or where that is none."""
    text = read_beside(path, _NOTE, _LARGEST_NOTE, object_store=object_store, options=options, heard=heard)
    try:
        batches = json.loads(text or "{}").get("samples_of_a_step", [])
    except (ValueError, AttributeError):
        return []
    whole = isinstance(batches, list) and all(type(one) is int and one > 0 for one in batches)
    return batches if whole else []


def _batches(accelerator: Any, *, by_engine: bool) -> list[int]:
    """Samples of one optimizer step over all ranks in this job, for each prepared loader; with an engine for that.

    Empty where one of them is not known.
    """
    if by_engine:
        return [int(one.train_batch_size()) for one in accelerator._models[:1]]
    sizes = [getattr(one, "total_batch_size", None) for one in accelerator._dataloaders]
    if any(size is None for size in sizes):
        return []
    return [int(size) * int(accelerator.gradient_accumulation_steps) for size in sizes if size is not None]


def _one(batches: Sequence[int]) -> int | None:
    """What all of them are; None where they differ, or where there is none."""
    return batches[0] if batches and len(set(batches)) == 1 else None


def _counting(accelerator: Any) -> dict[str, Any]:
    """The schedulers that count once for each process at a step, by the names of their files."""
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils import DeepSpeedSchedulerWrapper

    # As load_state counts them: those that an engine steps are in its own files.
    listed = [one for one in accelerator._schedulers if not isinstance(one, DeepSpeedSchedulerWrapper)]
    return {
        name: one
        for name, one in zip(_names("scheduler", ".bin", listed), listed, strict=True)
        if isinstance(one, AcceleratedScheduler) and one.step_with_optimizer and not one.split_batches
    }


def _go_on(wrapper: Any, plan: Resumed, processes: int) -> None:
    """Makes the scheduler in `wrapper` go on as `plan` says, once Accelerate has loaded its saved state."""
    scheduler = wrapper.scheduler
    scheduler.__dict__.pop(STEPS, None)
    if plan.state is not None:
        scheduler.load_state_dict(dict(plan.state))
        for group, rate in zip(scheduler.optimizer.param_groups, plan.state["_last_lr"], strict=True):
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
    if plan.counts_a_step == processes:
        return
    setattr(scheduler, STEPS, plan.counts_a_step)  # saved with its state, for the next resume
    # So it steps once where the optimizer has stepped, as Accelerate knows; the others follow here.
    wrapper.split_batches = True
    once = wrapper.step

    def has_more() -> bool:
        # As Accelerate has it: a OneCycleLR is not stepped beyond its end.
        return not hasattr(scheduler, "total_steps") or scheduler._step_count <= scheduler.total_steps

    def step(*args: Any, **kwargs: Any) -> None:
        if not has_more():
            return
        before = scheduler.last_epoch
        once(*args, **kwargs)
        if scheduler.last_epoch != before:
            for _ in range(plan.counts_a_step - 1):
                if has_more():
                    scheduler.step(*args, **kwargs)

    wrapper.step = step
