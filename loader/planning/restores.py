"""Says what one rank's restore would read of a checkpoint and keep of it: the copies that the job's target plans. Pure.

The rules are those of ``targets.module`` and ``targets.optimizer`` for jobs without an engine, and those of
``targets.deepspeed.plan`` and ``targets.deepspeed.states`` for an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..saved.contents import Saved
from ..saved.copies import Copy, Memory, copies_into, copies_of_tree
from ..saved.dtypes import ITEMSIZE
from ..saved.regions import Laid, Region, Run, row_major_stride, whole_box
from ..saved.tensor import SavedTensor
from ..targets.deepspeed.parameter_sources import choose_sources
from ..targets.deepspeed.weight_regions import WholeWeight
from .jobs import STEP, Job

MASTER_DTYPE = "float32"
_PARTS = frozenset({"model", "optimizers"})

Part = Literal["weights", "masters", "optimizer"]


@dataclass(frozen=True, slots=True)
class Slice:
    """A region of a saved tensor that a rank keeps."""

    part: Part
    name: str
    """The parameter's; of the optimizer's state ``NAME/KEY``."""
    dtype: str
    """That the rank keeps."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    region: Region

    @property
    def nbytes(self) -> int:
        return self.region.numel * ITEMSIZE[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {self.shape}: {region_text(self.region, self.shape)}"


def region_text(region: Region, shape: tuple[int, ...]) -> str:
    """``[0:512, 0:1024]`` of a box, ``elements 0 to 99 of 1,000`` of a run, ``all`` of either."""
    whole = region.numel == whole_box(shape).numel
    if whole:
        return "all"
    if not region.numel:
        return "nothing"
    if isinstance(region, Run):
        return f"elements {region.start:,} to {region.stop - 1:,} of {whole_box(shape).numel:,}"
    sides = zip(region.starts, region.sizes, strict=True)
    return f"[{', '.join(f'{start}:{start + size}' for start, size in sides)}]"


@dataclass
class Restore:
    """What one rank reads, and keeps."""

    copies: list[Copy] = field(default_factory=list)
    shareable: dict[str, list[Copy]] = field(default_factory=dict)
    """By parameter, those that fill weights which the ranks of a node may bring there once."""
    whole_weights: list[WholeWeight] = field(default_factory=list)
    """Those weights."""
    slices: list[Slice] = field(default_factory=list)

    def kept_bytes(self, *parts: Part) -> int:
        return sum(one.nbytes for one in self.slices if one.part in parts)


def restore_of(job: Job, rank: int, saved: Saved) -> Restore:
    """What `rank` of `job` reads of `saved`, which was opened by its demand.

    Raises `LayoutError` where elements are wanted that lie in files that were not read.
    """
    found = Restore()
    model = saved.state.get("model")
    weights: Mapping[Any, Any] = model if isinstance(model, Mapping) else {}
    if job.by_engine:
        for name in job.parameters:
            if isinstance(weights.get(name), SavedTensor):
                _engine_parameter(found, job, rank, name, weights[name], saved)
    for name, value in weights.items():
        if job.by_engine and name in job.parameters:
            continue
        if isinstance(value, SavedTensor):
            if name not in job.aliases:
                kept = job.shard(value.shape, rank) if job.is_sharded(name) else whole_box(value.shape)
                _take(found.copies, value, kept, f"model/{name}", value.dtype)
                found.slices.append(Slice("weights", name, value.dtype, value.shape, kept))
        else:
            found.copies += copies_of_tree(value, path=f"model/{name}")
    for name, key, value in _optimizer_tensors(job, saved):
        regions = _along(job, rank, name, key, value)
        label = f"{name}/{key}"
        if regions is None:
            found.copies += copies_of_tree(value, path=label)
            regions = [whole_box(value.shape)]
        else:
            for region in regions:
                _take(found.copies, value, region, label, value.dtype)
        found.slices += [Slice("optimizer", label, value.dtype, value.shape, one) for one in regions]
    rest = {part: value for part, value in saved.state.items() if part not in _PARTS}
    found.copies += copies_of_tree(rest, path="state")
    return found


def _engine_parameter(
    found: Restore, job: Job, rank: int, name: str, value: SavedTensor, saved: Saved
) -> None:
    """Adds what the weights and the masters of an engine's parameter are filled from."""
    master = saved.masters.get(name)
    trained, dtype = name in job.trained, job.parameters[name].dtype
    updated, computed = job.updated(name, rank), job.computed(name, rank)
    apart = job.target in ("stage1", "stage2") or dtype != MASTER_DTYPE
    in_shares = trained and job.target == "stage3"
    chosen = choose_sources(value, master, dtype, apart=apart, trained_in_shares=in_shares)
    if chosen.masters is not None:
        for run in updated:
            _take(found.copies, chosen.masters, run, f"fp32/{name}", MASTER_DTYPE)
    if apart:
        found.slices += [Slice("masters", name, MASTER_DTYPE, value.shape, run) for run in updated]
    found.slices += [Slice("weights", name, dtype, value.shape, run) for run in computed]
    if chosen.low is None:
        return
    low: list[Copy] = []
    for run in computed:
        _take(low, chosen.low, run, f"model/{name}", dtype)
    if job.target == "stage3" or not apart or saved.data_parallel_size is None:
        found.copies += low
        return
    found.shareable[name] = low
    cast = updated if master is not None and trained else ()
    found.whole_weights.append(WholeWeight(name, chosen.low, dtype, chosen.low is master, cast))


def _optimizer_tensors(job: Job, saved: Saved) -> Iterator[tuple[str, str, SavedTensor]]:
    """The tensors of the optimizers' state: the parameter's name, the entry's key, the tensor."""
    optimizers = saved.state.get("optimizers")
    for optimizer, one in optimizers.items() if isinstance(optimizers, Mapping) else ():
        state = one.get("state") if isinstance(one, Mapping) else None
        for key, entries in state.items() if isinstance(state, Mapping) else ():
            name = str(job.keys.get((optimizer, key), job.aliases.get(key, key)))
            for entry, value in entries.items() if isinstance(entries, Mapping) else ():
                if isinstance(value, SavedTensor):
                    yield name, str(entry), value


def _along(job: Job, rank: int, name: str, key: str, value: SavedTensor) -> Sequence[Region] | None:
    """The regions of an entry of the optimizer's state that `rank` keeps; None where it is made as it was saved."""
    if key == STEP:
        return None
    parameter = job.parameters.get(name)
    fits = parameter is not None and value.shape == parameter.shape
    if job.by_engine:
        return job.updated(name, rank) if fits or (parameter is not None and value.whole is None) else None
    if fits and job.is_sharded(name):
        return [job.shard(value.shape, rank)]
    return [whole_box(value.shape)] if value.whole is None and value.numel else None


def _take(copies: list[Copy], value: SavedTensor, region: Region, name: str, dtype: str) -> None:
    """Adds the copies that fill `region` of `value`, kept in memory of its own as `dtype`."""
    if not region.numel:
        return
    shape = (region.length,) if isinstance(region, Run) else region.sizes
    memory = Memory(name, dtype, shape, row_major_stride(shape), plain=True)
    copies += copies_into(value, Laid(region, 0, memory.stride), memory, name=name)
