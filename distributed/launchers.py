"""Reads a rank's place from the environment variables of its launcher. Pure: no torch, nothing but the given mapping.

`READERS` is the order of preference: the first reader that finds its launcher's variables decides. Launchers whose
agent on each node starts the ranks (`AGENTS`) stand first: the variables of an MPI or Slurm beneath them describe those
agents, and are no contradiction. Otherwise two launchers that describe the same rank must agree.

The names are those that the launchers set for the processes they start (torchrun: torch's elastic documentation;
deepspeed: ``launcher/launch.py``; Composer: ``composer/cli/launcher.py``; srun: its manual page; MPI: Open MPI, MVAPICH
and Hydra).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .errors import TopologyError

Environ = Mapping[str, str]
AGENTS = ("torchrun", "deepspeed", "composer")
"""Launchers that start one process for each node, which then starts the ranks."""
_SIZES = frozenset({"world_size", "local_world_size", "n_nodes"})


@dataclass(frozen=True)
class Claim:
    """A rank's place by one launcher's variables; None where no variable gives it. ``names``: field to variable.

    Raises `TopologyError` where a rank is not below its size, or a part exceeds the whole.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None
    node_rank: int | None = None
    n_nodes: int | None = None
    names: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self._below("rank", "world_size")
        self._below("local_rank", "local_world_size")
        self._below("node_rank", "n_nodes")
        self._below("local_rank", "world_size")
        self._not_above("local_world_size", "world_size")
        self._not_above("n_nodes", "world_size")

    def named(self, field: str) -> str:
        """``VARIABLE=value`` for one field, for messages."""
        return f"{(self.names or {}).get(field, field)}={getattr(self, field)}"

    def _below(self, index: str, size: str) -> None:
        value, limit = getattr(self, index), getattr(self, size)
        if value is not None and limit is not None and value >= limit:
            raise TopologyError(f"{self.named(index)} but {self.named(size)} ({self.launcher}'s variables)")

    def _not_above(self, part: str, whole: str) -> None:
        value, limit = getattr(self, part), getattr(self, whole)
        if value is not None and limit is not None and value > limit:
            raise TopologyError(f"{self.named(part)} but {self.named(whole)} ({self.launcher}'s variables)")


@dataclass(frozen=True)
class Variables:
    """One launcher's variables for each field of `Claim`; of several for one field, those that are set must agree."""

    launcher: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()
    node_rank: tuple[str, ...] = ()
    n_nodes: tuple[str, ...] = ()


_RANK, _WORLD = ("RANK",), ("WORLD_SIZE",)
TORCHRUN = Variables(
    "torchrun", _RANK, _WORLD, ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), ("GROUP_RANK",), ("GROUP_WORLD_SIZE",)
)
DEEPSPEED = Variables(
    "deepspeed",
    _RANK,
    _WORLD,
    ("LOCAL_RANK", "--local_rank"),
    ("LOCAL_SIZE",),
    ("CROSS_RANK",),
    ("CROSS_SIZE",),
)
COMPOSER = Variables("composer", _RANK, _WORLD, ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), ("NODE_RANK",))
GENERIC = Variables(
    "environment", _RANK, _WORLD, ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ("NODE_RANK",)
)
# Open MPI's own NODE_RANK is a rank within the node, so its nodes are taken from the hosts.
OPEN_MPI = Variables(
    "openmpi",
    ("OMPI_COMM_WORLD_RANK",),
    ("OMPI_COMM_WORLD_SIZE",),
    ("OMPI_COMM_WORLD_LOCAL_RANK",),
    ("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
MVAPICH = Variables(
    "mvapich",
    ("MV2_COMM_WORLD_RANK",),
    ("MV2_COMM_WORLD_SIZE",),
    ("MV2_COMM_WORLD_LOCAL_RANK",),
    ("MV2_COMM_WORLD_LOCAL_SIZE",),
)
HYDRA = Variables(
    "hydra",
    ("PMI_RANK", "PMIX_RANK"),
    ("PMI_SIZE", "WORLD_SIZE"),
    ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
    ("MPI_LOCALNRANKS", "LOCAL_SIZE"),
)
SLURM = Variables(
    "slurm",
    ("SLURM_PROCID",),
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    ("SLURM_LOCALID",),
    (),
    ("SLURM_NODEID",),
    ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
)


def read_claim(environ: Environ, argv: Sequence[str]) -> Claim | None:
    """The place by the launcher that comes first in the order of preference; None under plain python.

    Raises:
        TopologyError: a variable is no number, or contradicts another one; both are named with their values.
    """
    claims = [claim for reader in READERS if (claim := reader(environ, argv)) is not None]
    if not claims:
        _check_orphans(environ)
        return None
    first = claims[0]
    for other in claims[1:]:
        _check_agreement(first, other)
    return first


def _read_torchrun(environ: Environ, argv: Sequence[str]) -> Claim | None:
    if "RANK" not in environ or not ({"TORCHELASTIC_RUN_ID", "GROUP_RANK"} & set(environ)):
        return None
    return _claim(TORCHRUN, environ)


def _read_deepspeed(environ: Environ, argv: Sequence[str]) -> Claim | None:
    if "RANK" not in environ or "CROSS_RANK" not in environ:
        return None
    given = dict(environ)
    option = _local_rank_option(argv)
    if option is not None:
        if environ.get("LOCAL_RANK", option) != option:
            raise TopologyError(
                f"LOCAL_RANK={environ['LOCAL_RANK']} but the command line has --local_rank={option}"
            )
        given["--local_rank"] = option
    return _claim(DEEPSPEED, given)


def _read_composer(environ: Environ, argv: Sequence[str]) -> Claim | None:
    if not {"RANK", "NODE_RANK", "LOCAL_WORLD_SIZE"} <= set(environ):
        return None
    return _claim(COMPOSER, environ)


def _read_generic(environ: Environ, argv: Sequence[str]) -> Claim | None:
    return _claim(GENERIC, environ) if "RANK" in environ else None


def _read_open_mpi(environ: Environ, argv: Sequence[str]) -> Claim | None:
    return _claim(OPEN_MPI, environ) if "OMPI_COMM_WORLD_RANK" in environ else None


def _read_mvapich(environ: Environ, argv: Sequence[str]) -> Claim | None:
    return _claim(MVAPICH, environ) if "MV2_COMM_WORLD_RANK" in environ else None


def _read_hydra(environ: Environ, argv: Sequence[str]) -> Claim | None:
    # Open MPI and srun set PMIX_RANK too, but no size with it: their own readers read them.
    sized = "PMI_SIZE" in environ or ("WORLD_SIZE" in environ and "RANK" not in environ)
    if not sized or not ({"PMI_RANK", "PMIX_RANK"} & set(environ)):
        return None
    return _claim(HYDRA, environ)


def _read_slurm(environ: Environ, argv: Sequence[str]) -> Claim | None:
    # A batch shell has a SLURM_PROCID too, but only a step's tasks are ranks.
    step = environ.get("SLURM_STEP_ID")
    if step is None or not step.isdigit() or "SLURM_PROCID" not in environ:
        return None
    # Interactive and batch steps have ids of their own, far above those of srun's.
    if int(step) >= 0xFFFFFFF0 or environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS")) is None:
        return None
    claim = _claim(SLURM, environ)
    sizes = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if claim.node_rank is None or claim.node_rank >= len(sizes):
        return claim
    return Claim(
        **{
            **vars(claim),
            "local_world_size": sizes[claim.node_rank],
            "names": {**(claim.names or {}), "local_world_size": "SLURM_STEP_TASKS_PER_NODE on this node"},
        }
    )


LauncherReader = Callable[[Environ, Sequence[str]], Claim | None]
READERS: tuple[LauncherReader, ...] = (
    _read_torchrun,
    _read_deepspeed,
    _read_composer,
    _read_generic,
    _read_open_mpi,
    _read_mvapich,
    _read_hydra,
    _read_slurm,
)


def _claim(variables: Variables, environ: Environ) -> Claim:
    names: dict[str, str] = {}
    values: dict[str, int | None] = {}
    for field in ("rank", "world_size", "local_rank", "local_world_size", "node_rank", "n_nodes"):
        values[field] = None
        for name in getattr(variables, field):
            if name not in environ:
                continue
            number = _number(name, environ[name], least=1 if field in _SIZES else 0)
            if values[field] is None:
                values[field], names[field] = number, name
            elif values[field] != number:
                raise TopologyError(f"{names[field]}={values[field]} but {name}={number}")
    rank, world_size = values.pop("rank"), values.pop("world_size")
    if rank is None or world_size is None:
        there = names.get("rank") or names.get("world_size")
        missing = variables.rank[0] if rank is None else variables.world_size[0]
        raise TopologyError(f"{there} is set, but {missing} is not: set both, or neither")
    return Claim(variables.launcher, rank, world_size, **values, names=names)


def _number(name: str, text: str, *, least: int) -> int:
    # int() takes more than a number's digits (underscores, other scripts); a launcher writes none of that.
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,12}\s*", text):
        raise TopologyError(f"{name}={text!r} is no integer")
    number = int(text)
    if number < least:
        raise TopologyError(f"{name}={number}: expected {least} or more")
    return number


def _check_agreement(first: Claim, other: Claim) -> None:
    # One agent per node starts the ranks; or MPI's daemons were themselves started by srun.
    under_srun = other.launcher == "slurm" and first.launcher != "environment"
    if first.launcher in AGENTS or under_srun:
        return
    for field in ("world_size", "rank", "local_rank"):
        mine, theirs = getattr(first, field), getattr(other, field)
        if mine is not None and theirs is not None and mine != theirs:
            raise TopologyError(
                f"{first.named(field)} ({first.launcher}) but {other.named(field)} ({other.launcher}): two "
                "launchers describe this process differently; unset the variables of one"
            )


def _check_orphans(environ: Environ) -> None:
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if name in environ and _number(name, environ[name], least=1) > 1:
            raise TopologyError(
                f"{name}={environ[name]}, but no variable tells this process's rank; set RANK, or start the "
                "job with a launcher (torchrun, deepspeed, mpirun, srun)"
            )


def _local_rank_option(argv: Sequence[str]) -> str | None:
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            return value if equals else next(iter(argv[position + 1 :]), None)
    return None


def _tasks_per_node(text: str) -> list[int]:
    """``4(x2),3`` as [4, 4, 3]; [] where it can't be read."""
    sizes: list[int] = []
    for item in text.split(",") if text else []:
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", item.strip())
        if match is None:
            return []
        sizes += [int(match[1])] * int(match[2] or 1)
    return sizes
