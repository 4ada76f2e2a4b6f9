"""Checks a load before its first change: types, names, shapes, dtypes and random states.

It hands on `Checked`: the plan of the restore, and as real values what the user gets back. Checksums are not compared
here; `verify.checks` does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint
from .materialize.objects import materialize
from .materialize.safe_types import require_safe
from .materialize.tensors import TensorReader
from .request import LoadRequest
from .rng import RngState, check_state
from .saved.contents import Contents
from .saved.ignore import Ignored
from .stages import Stages
from .targets.restore import Prepared, prepare_restore


@dataclass(frozen=True)
class Checked:
    """A load in which everything fits, before its first change: what the stages after `check` need."""

    contents: Contents
    """Without what ``ignore_keys`` names."""
    prepared: Prepared
    """The plans that `targets.restore.apply_restore` carries out."""
    reader: TensorReader
    """The one reader of this load: it reads and sums every storage."""
    rng: list[RngState | None] | None
    """By saved rank, None at those that were ignored; None as a whole where the checkpoint has none, or with
    ``load_weights_only``."""
    extra: dict[str, Any]
    """Top-level entries that are no part of a `State`, as real values."""
    materialize_options: dict[str, Any]
    """For `materialize`: which types are allowed, and what messages call the checkpoint."""


def check(request: LoadRequest, checkpoint: Checkpoint, ignored: Ignored, stages: Stages) -> Checked:
    """Compares what will be restored with where it goes, and plans the restore; changes nothing that the user owns.

    Every rank must call. Raises, on all ranks alike, `UnsafeError` for a type that is neither known nor in
    ``safe_types``, `MismatchError` with every name, shape and dtype that does not fit, `FormatError` for a random state
    that no generator takes, and `LayoutError`, `CorruptError` or `OptionError` where planning or reading raises them.
    """
    with stages.stage("check"):
        contents = checkpoint.contents.with_tree(ignored.tree)
        options: dict[str, Any] = {"safe_types": request.options.safe_types, "file": checkpoint.name}
        verify = request.options.verify or "during"
        reader = TensorReader(
            verify=verify,
            on_bytes=stages.count,
            comes_in_parts=checkpoint.opening.remote.known.__contains__,
        )
        wanted = _wanted_parts(contents, weights_only=request.weights_only)
        for part, tree in wanted.items():
            require_safe(
                tree, path=part, safe_types=request.options.safe_types, file=checkpoint.file_of(tree)
            )
        prepared = prepare_restore(request, checkpoint, contents, checkpoint.contents)
        prepared.mismatch.raise_if_any(checkpoint.name, strict=request.strict)
        rng: list[RngState | None] | None = None
        extra: dict[str, Any] = {}
        if not request.weights_only:
            if contents.rng is not None:
                real = materialize(contents.rng, reader=reader, path="rng", **options)
                for rank in _ignored_ranks(ignored):
                    real.insert(rank, None)
                rng = [
                    None if state is None else check_state(state, f"{checkpoint.name}: rng/{rank}")
                    for rank, state in enumerate(real)
                ]
            extra = materialize(contents.extra, reader=reader, **options)
    return Checked(contents, prepared, reader, rng, extra, options)


def _ignored_ranks(ignored: Ignored) -> list[int]:
    """The ranks whose random states were taken out of the list, which shifted those that follow."""
    found = (path.removeprefix("rng/") for path in ignored.paths if path.startswith("rng/"))
    return sorted(int(position) for position in found if position.isdigit())


def _wanted_parts(contents: Contents, *, weights_only: bool) -> dict[str, Any]:
    """The parts of the checkpoint whose types must be safe, since they will be made real, by key."""
    if weights_only:
        return {"state/model": contents.state.get("model")}
    return {"state": contents.state, "rng": contents.rng, **contents.extra}
