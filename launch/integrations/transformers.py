"""transformers' Trainer goes on at any number of ranks, and from any URI, with DeepSpeed or DDP.

    from rankload.integrations.transformers import newest, replaced

    with replaced():
        trainer.train(resume_from_checkpoint=newest("s3://bucket/run"))

In the block, `replaced` does what Trainer leaves out: DeepSpeed's engines are loaded by `rankload.load`, random states
are restored at any number of ranks, a URI gets a local folder for its small files, and it is a warning where a step
has another number of samples. The pieces are there by themselves too: `side_folder`, `random_states_callback`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ..loader import LoadOptions, NotFoundError, OptionError, RankloadError
from ..loader.formats.torch_file import read_index
from . import deepspeed
from .batches import warn_of_batch
from .choosing import newest
from .native import native_load
from .random_states import restore_missing
from .side_folders import count_numbered, is_elsewhere, origin_of
from .side_folders import side_folder as _side_folder
from .versions import warn_of_version

__all__ = ["newest", "random_states_callback", "replaced", "side_folder"]

TRIED = ("5.24",)

_STATE = "trainer_state.json"
_ARGUMENTS = "training_args.bin"
_OF_RANK = "rng_state_{}.pth"
_OF_ONE = "rng_state.pth"
"""The random states of a job of one process."""
_SMALL = (_STATE, _ARGUMENTS, _OF_ONE, "scheduler.pt", "scaler.pt", "config.json")
_WHOLE = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "optimizer.pt", "optimizer.bin",
)  # fmt: skip
"""What Trainer itself reads without DeepSpeed."""


@contextlib.contextmanager
def replaced(
    *, object_store: Any = None, options: LoadOptions | Mapping[str, Any] | None = None
) -> Iterator[None]:
    """A block in which ``trainer.train(resume_from_checkpoint=...)`` goes on at any number of ranks; it undoes itself.

    In the block, `resume_from_checkpoint` may be a local folder or any URI; True takes the `newest` one in
    ``args.output_dir`` that is whole, and raises `NotFoundError` where there is none. Every rank must enter it.

    Args:
        object_store, options: as `rankload.load` takes them, for what is loaded in the block.
    """
    from transformers import Trainer

    warn_of_version("transformers", TRIED)
    given: dict[str, Any] = {"object_store": object_store, "options": options}
    own = Trainer.train

    @functools.wraps(own)
    def train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        with _resuming(trainer, resume_from_checkpoint, given) as folder:
            return own(trainer, folder, *args, **kwargs)

    with contextlib.ExitStack() as leaving:
        if importlib.util.find_spec("deepspeed") is not None:
            # Trainer's best checkpoint is a local folder, also where the store has the one that it resumes from.
            leaving.enter_context(deepspeed.replaced_by_origins(**given))
        Trainer.train = train
        try:
            yield
        finally:
            Trainer.train = own


@contextlib.contextmanager
def _resuming(trainer: Any, checkpoint: Any, given: Mapping[str, Any]) -> Iterator[str | None]:
    """The folder to resume from, for the length of one call of ``train``, while `trainer` has the callback."""
    if checkpoint is None or checkpoint is False:
        yield None
        return
    if checkpoint is True:
        output = trainer.args.output_dir
        checkpoint = newest(output, options=given["options"])
        if checkpoint is None:
            raise NotFoundError(
                f"{output} has no checkpoint that is whole; rankload find {output} says why. For a cold start pass "
                "resume_from_checkpoint=None",
                path=output,
            )
        given = {**given, "object_store": None}
    path = os.fspath(checkpoint)
    with contextlib.ExitStack() as leaving:
        folder = path
        if is_elsewhere(path, given["object_store"]):
            if trainer.is_fsdp_enabled:
                raise OptionError(
                    "Trainer reads FSDP's files itself, from a local folder: fetch the checkpoint to one, or restore "
                    "model and optimizer with rankload.load"
                )
            engine = bool(trainer.is_deepspeed_enabled)
            folder = leaving.enter_context(side_folder(path, with_model=not engine, **given))
        if not trainer.is_deepspeed_enabled:
            leaving.enter_context(_own_load_watched(trainer, given["options"]))
        callback = random_states_callback(folder, **given)
        trainer.add_callback(callback)
        leaving.callback(trainer.remove_callback, callback)
        yield folder


@contextlib.contextmanager
def _own_load_watched(trainer: Any, options: Any) -> Iterator[None]:
    """A block in which Trainer's own loads end on all ranks, where one fails in them (`native.native_load`)."""
    names = ("_load_from_checkpoint", "_load_optimizer_and_scheduler")

    def watched(own: Any) -> Any:
        @functools.wraps(own)
        def load(*args: Any, **kwargs: Any) -> Any:
            with native_load("Trainer", options):
                return own(*args, **kwargs)

        return load

    for name in names:
        setattr(trainer, name, watched(getattr(trainer, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(trainer, name)


def side_folder(
    url: str,
    *,
    with_model: bool = False,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> contextlib.AbstractContextManager[str]:
    """A local folder, for the length of a block, with what Trainer reads itself of the ``checkpoint-N`` at `url`.

    Inside of `replaced` a URI gets one by itself. The files of DeepSpeed's engine stay where they are, from where
    `replaced` reads them. Every rank must enter; files come once per node.

    Args:
        url: the checkpoint's folder, as `rankload.load` takes it.
        with_model: copy the files of model and optimizer too, which Trainer reads itself without DeepSpeed.
        object_store, options: as `rankload.load` takes them.
    """
    return _side_folder(
        url,
        _SMALL,
        _OF_RANK.format,
        marker=_STATE,
        whole=_WHOLE if with_model else (),
        object_store=object_store,
        options=options,
    )


def random_states_callback(
    checkpoint: str,
    *,
    object_store: Any = None,
    options: LoadOptions | Mapping[str, Any] | None = None,
) -> Any:
    """A ``TrainerCallback`` that restores random states where Trainer does not, and warns of another batch size.

    Trainer restores each rank's own file; between one rank and several, and on ranks beyond the saved ones, it leaves
    all at the seed. There rank 0 gets what it saved, and each other rank states derived from it. `replaced` adds one.

    Args:
        checkpoint: the folder that ``train`` resumes from.
        object_store, options: as `rankload.load` takes them, for the checkpoint that a side folder stands for.
    """
    from transformers import TrainerCallback

    class RandomStates(TrainerCallback):  # type: ignore[misc, unused-ignore]
        """Restores once, when Trainer has restored what it can."""

        pending = True

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.process_index == 0 and getattr(args, "deepspeed_plugin", None) is None:
                _compare_batch(checkpoint, args, object_store, options)

        def on_epoch_begin(
            self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
        ) -> None:
            # At an epoch's first step Trainer restores before it draws a batch, else after it.
            if self.pending and _begins_epoch(args, state, train_dataloader):
                self.restore(args)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.pending:
                self.restore(args)

        def restore(self, args: Any) -> None:
            self.pending = False
            rank, several = args.process_index, args.world_size > 1
            own = _OF_RANK.format(rank) if several else _OF_ONE
            firsts = [_OF_RANK.format(0), _OF_ONE]
            origin, store = origin_of(checkpoint, object_store)
            restore_missing(
                origin,
                next((name for name in firsts if _is_there(checkpoint, name)), None),
                rank=rank,
                has_own=_is_there(checkpoint, own),
                object_store=store,
                options=options,
            )

    return RandomStates()


def _is_there(folder: str, name: str) -> bool:
    return os.path.isfile(os.path.join(folder, name))


def _begins_epoch(args: Any, state: Any, loader: Any) -> bool:
    """Whether the run goes on with an epoch's first batch, as Trainer counts."""
    if args.ignore_data_skip:
        return True
    try:
        steps = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
    except TypeError:  # of a data set without a length, whose epoch is the whole run
        return bool(state.global_step == 0)
    return bool(state.global_step % steps == 0)


def _compare_batch(folder: str, args: Any, object_store: Any, options: Any) -> None:
    """Warns where a step has another number of samples than when the checkpoint was saved, as far as it tells."""
    warn_of_batch(
        _saved_batch(folder, object_store, options),
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        counted_by="Trainer",
        remedy="Keep the product of per_device_train_batch_size, gradient_accumulation_steps and the number of ranks",
    )


def _saved_batch(folder: str, object_store: Any, options: Any) -> int | None:
    """Samples of one step over all ranks; None where the checkpoint does not tell."""
    try:
        with open(os.path.join(folder, _STATE), encoding="utf-8") as opened:
            each = json.load(opened).get("train_batch_size")
        fields = read_index(os.path.join(folder, _ARGUMENTS)).tree.state
        accumulated = fields["gradient_accumulation_steps"]
    except (OSError, ValueError, RankloadError, AttributeError, KeyError, TypeError):
        return None  # not saved, or in another form: nothing to compare with
    if not isinstance(each, int) or not isinstance(accumulated, int):
        return None
    origin, store = origin_of(folder, object_store)
    ranks = count_numbered(origin, _OF_RANK, object_store=store, options=options)
    return each * accumulated * max(ranks, 1)
