"""Accelerate's ``load_state`` at any number of processes, and from any URI, with DeepSpeed or DDP.

    from rankload.integrations import accelerate

    accelerate.attach(accelerator)          # once, after prepare()
    accelerator.load_state("s3://bucket/run/checkpoint_3")

`attach` changes this one accelerator: its engines are loaded by `rankload.load`, its schedulers go on with the right
learning rates (`schedules`), and ranks that have saved no random states get derived ones.
"""

from __future__ import annotations

import contextlib
import functools
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
from .batches import warn_of_batch
from .choosing import newest
from .native import native_load
from .random_states import restore_missing
from .schedules import STEPS, Resumed, resumed
from .side_folders import count_numbered, is_elsewhere, side_folder
from .versions import warn_of_version

__all__ = ["attach", "load_state", "newest"]

TRIED = ("1.15",)

_OF_RANK = "random_states_{}.pkl"


def attach(
    accelerator: Any,
    *,
    saved_batch_size: int | None = None,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> Any:
    """Makes ``accelerator.load_state`` of this one accelerator `load_state`, and returns it; no class is touched.

    For one engine without its accelerator there is `deepspeed.attach`; then schedulers and random states are the job's.

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
    accelerator.load_state = types.MethodType(bound, accelerator)
    return accelerator


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
            DeepSpeed's files tell; without DeepSpeed nothing does, and schedules of samples need it.
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
        batch = _batch(accelerator, by_engine=by_engine)
        saved_batch = saved_batch_size if saved_batch_size is not None else told
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
    if not by_engine:
        warn_of_batch(
            saved_batch,
            batch,
            counted_by="Accelerate",
            remedy="Keep it by the data loader's batch_size or by gradient_accumulation_steps, or skip as many samples",
        )


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


def _saved(path: str, *, by_engine: bool, given: Mapping[str, Any]) -> tuple[int, int | None]:
    """The processes that saved the checkpoint, and the samples of one step over all of them, where it tells.

    Every rank must call.
    """

    def look(heard: Heard) -> tuple[int, int | None]:
        ranks = count_numbered(path, _OF_RANK, heard=heard, **given)
        if ranks == 0:
            raise NotFoundError(
                f"{redact_path(path)} has no {_OF_RANK.format(0)}: expected a folder that save_state wrote, and that "
                "was finished",
                path=redact_path(path),
            )
        if not by_engine:
            return ranks, None
        with open_alone(path, **given) as opened:
            return ranks, opened.saved.batch_size

    with open_session() as session:
        channel = session.channel
        ranks, batch = channel.decide("saved processes", None, lambda _: look(channel.heard))
        return ranks, batch


def _batch(accelerator: Any, *, by_engine: bool) -> int | None:
    """Samples of one optimizer step over all ranks in this job; None where it is not known."""
    if by_engine:
        return next((int(one.train_batch_size()) for one in accelerator._models), None)
    sizes = {getattr(one, "total_batch_size", None) for one in accelerator._dataloaders}
    size = sizes.pop() if len(sizes) == 1 else None
    return None if size is None else int(size) * int(accelerator.gradient_accumulation_steps)


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

    def step(*args: Any, **kwargs: Any) -> None:
        before = scheduler.last_epoch
        once(*args, **kwargs)
        if scheduler.last_epoch != before:
            for _ in range(plan.counts_a_step - 1):
                scheduler.step(*args, **kwargs)

    wrapper.step = step
