"""The commands of the launchers that ``rankload run`` starts. Pure, but for the question which MPI is here.

Each launcher starts ``python -m rankload.launch.ranked`` once a rank, which runs the script. Torchrun is started by
`elastic`, through its own API.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..loader.errors import OptionError

Launcher = Literal["torchrun", "deepspeed", "slurm", "mpi"]
RANKED = "rankload.launch.ranked"
LOOPBACK = "127.0.0.1"
_PLACED = ("--nnodes", "--node-rank", "--rdzv-", "--master-", "--standalone", "--local-addr")
"""Options by which torchrun is told where its nodes meet."""
_HOSTS = ("-H", "--host", "-host", "--hosts", "-hosts")
_HOST_FILES = ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be run, and how."""

    launcher: Launcher
    script: Sequence[str]
    """A script or ``-m MODULE``, and its arguments."""
    options: Sequence[str] = ()
    """The launcher's own, as they were given."""
    nproc_per_node: str | None = None
    resume: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further ones of the environment."""

    @property
    def program(self) -> str:
        """What people call the launcher."""
        return {"slurm": "srun", "mpi": "mpirun"}.get(self.launcher, self.launcher)


@dataclass(frozen=True)
class Words:
    """A command line of ``rankload run``, taken apart."""

    own: Sequence[str]
    """Its own options."""
    launcher: Sequence[str]
    script: Sequence[str]
    """Empty where none is named."""


def split_words(words: Sequence[str], takes_value: Mapping[str, bool]) -> Words:
    """`words` taken apart; `takes_value` are the options of ``rankload run`` itself.

    The script is the first word that ends in ``.py``, or ``-m`` and what follows, or what follows ``--``. Before it,
    what is no option of ``rankload run`` is the launcher's; from it on, all is the script's.
    """
    own: list[str] = []
    launcher: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        name, equals, _ = word.partition("=")
        if word == "--":
            return Words(own, launcher, words[position + 1 :])
        if word == "--module":
            return Words(own, launcher, ["-m", *words[position + 1 :]])
        if word == "-m" or (word.endswith(".py") and not word.startswith("-")):
            return Words(own, launcher, words[position:])
        if name in takes_value:
            length = 2 if takes_value[name] and not equals else 1
            own += words[position : position + length]
            position += length
        else:
            launcher.append(word)
            position += 1
    return Words(own, launcher, ())


@dataclass(frozen=True)
class Place:
    """What each rank is told: the folder of records, and the port at which ranks find rank 0."""

    records: Path
    port: int


def agents_everywhere(job: Job) -> bool:
    """Whether ``rankload run`` itself is started on each node, once a node."""
    if job.launcher == "deepspeed":
        return "--no_ssh" in job.options or not _has(job.options, ("-H", "--hostfile"))
    return job.launcher == "torchrun"


def command_line(job: Job, place: Place) -> list[str]:
    """The command that starts `job`. Raises `OptionError` for options that run something else than Python."""
    for option in ("--no-python", "--no_python", "--run-path", "--run_path"):
        if option in job.options:
            raise OptionError(f"{option}: rankload run starts a Python script, or a module with -m")
    return {"torchrun": _torchrun, "deepspeed": _deepspeed, "slurm": _slurm, "mpi": _mpi}[job.launcher](
        job, place
    )


def _torchrun(job: Job, place: Place) -> list[str]:
    words = [*job.options]
    if not _has(words, _PLACED):
        # One node, a port of its own, and no look-up of this host's name.
        words = ["--standalone", "--local-addr", LOOPBACK, *words]
    if job.nproc_per_node is not None:
        words += ["--nproc-per-node", job.nproc_per_node]
    start = [sys.executable, "-m", "rankload.launch.elastic", str(place.records)]
    return [*start, *words, "-m", RANKED, *_told(job, place)]


def _deepspeed(job: Job, place: Place) -> list[str]:
    words = [*job.options]
    alone = not _has(words, ("-H", "--hostfile"))
    if alone and not _has(words, ("--master_port",)):
        words += ["--master_port", str(place.port)]
    if job.nproc_per_node is not None:
        words += ["--num_gpus", job.nproc_per_node]
    start = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*start, *words, "--module", RANKED, *_told(job, place)]


def _slurm(job: Job, place: Place) -> list[str]:
    words = [*job.options]
    if not _has(words, ("--kill-on-bad-exit",)) and not any(word.startswith("-K") for word in words):
        # Else the other tasks of a rank that failed wait for it until the job's time is over.
        words += ["--kill-on-bad-exit=1"]
    if job.nproc_per_node is not None:
        words += [f"--ntasks-per-node={job.nproc_per_node}"]
    return ["srun", *words, *_python(job, place)]


def _mpi(job: Job, place: Place) -> list[str]:
    words = [*job.options]
    ours: list[str] = []
    several = _has(words, (*_HOSTS, *_HOST_FILES))
    if job.nproc_per_node is not None:
        if not several:
            ours = ["-n", job.nproc_per_node]
        elif is_open_mpi():
            ours = ["--map-by", f"ppr:{job.nproc_per_node}:node"]
        else:
            ours = ["-ppn", job.nproc_per_node]
    return ["mpirun", *ours, *words, *_python(job, place, address=first_of_hosts(words))]


def _python(job: Job, place: Place, address: str | None = None) -> list[str]:
    told = ["--master-port", str(place.port)]
    if address is not None:
        told += ["--master-addr", address]
    return [sys.executable, "-u", "-m", RANKED, *told, *_told(job, place)]


def _told(job: Job, place: Place) -> list[str]:
    words = ["--records", str(place.records)]
    if not agents_everywhere(job):
        # Not every launcher takes the environment to other nodes.
        for name, value in job.variables.items():
            words += ["--variable", f"{name}={value}"]
        if job.resume is not None:
            words += ["--resume", job.resume]
    return [*words, "--", *job.script]


def first_of_hosts(words: Sequence[str]) -> str | None:
    """The first host that mpirun's options name; None where they name none."""
    for position, word in enumerate(words):
        name, equals, value = word.partition("=")
        value = value if equals else next(iter(words[position + 1 :]), "")
        if name in _HOSTS:
            return value.split(",")[0].split(":")[0] or None
        if name in _HOST_FILES:
            try:
                lines = [line.split("#")[0].split() for line in Path(value).read_text().splitlines()]
            except OSError:
                return None
            return next((line[0].split(":")[0] for line in lines if line), None)
    return None


def is_open_mpi() -> bool:
    """Whether the ``mpirun`` that is found is Open MPI's."""
    try:
        asked = subprocess.run(
            ["mpirun", "--version"],  # noqa: S607 - the user's own
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "Open MPI" in asked.stdout or "OpenRTE" in asked.stdout


def _has(words: Sequence[str], names: Sequence[str]) -> bool:
    """Whether one of `words` is one of the options `names`, or begins with one that ends with a dash."""
    for word in words:
        name = word.partition("=")[0]
        dashed = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        for wanted in names:
            if name == wanted or dashed == wanted or (wanted.endswith("-") and dashed.startswith(wanted)):
                return True
    return False
