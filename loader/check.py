"""The last stage before the first change: everything that can be compared is compared."""

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
    """A load in which everything fits, one step before its first change."""

    contents: Contents
    prepared: Prepared
    reader: TensorReader
    rng: list[RngState | None] | None
    """By rank; None at those that were ignored."""
    extra: dict[str, Any]
    materialize_options: dict[str, Any]


def check(request: LoadRequest, checkpoint: Checkpoint, ignored: Ignored, stages: Stages) -> Checked:
    """Compares names, shapes, dtypes and types with what they are to be restored into; changes nothing."""
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
    """Positions that were taken out of the list of random states: the others are still the same ranks'."""
    found = (path.removeprefix("rng/") for path in ignored.paths if path.startswith("rng/"))
    return sorted(int(position) for position in found if position.isdigit())


def _wanted_parts(contents: Contents, *, weights_only: bool) -> dict[str, Any]:
    """The parts of a checkpoint that will be read, by key."""
    if weights_only:
        return {"state/model": contents.state.get("model")}
    return {"state": contents.state, "rng": contents.rng, **contents.extra}
