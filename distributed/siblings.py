"""Finds the ranks of this job that run on this machine by their launcher's variables, before they have said anything.

A rank that was killed before it joined the others has told nobody its pid. But its process had the launcher's variables
in its environment from the start, which processes of the same user may read (Linux: ``/proc/PID/environ``). So a rank
that waits looks for such processes once in a while, and notices when one that it has seen is gone.

Not guaranteed: that a rank is found that got its variables later (as ``multiprocessing`` and forks do), that runs as
another user, or that ended before it was looked for. Nothing is concluded from a rank that was never found.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping

from .errors import TopologyError
from .launchers import read_claim
from .liveness import ProcessIdentity, how_ended, identity_of, this_process

LOOK_S = 2.0
"""Seconds between two looks: each reads something of every process of this machine."""
GONE_S = 3.0
"""For how long no process of a rank may be found until it counts as ended: scripts start one process after another."""
_JOB = (
    "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID",
    "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "MPIRUN_ID",
)  # fmt: skip
"""Variables that are the same for all ranks of a job, and differ between jobs; of these a job has some."""
_ADDRESSES = frozenset({"MASTER_PORT", *_JOB[3:]})
"""Those of which a job must have one: without, two jobs could be taken for one."""


class Siblings:
    """The other ranks' processes on this machine, as far as they can be found."""

    def __init__(self) -> None:
        own = this_process()
        environ = _environ(own.pid)
        self._rank = None if environ is None else _rank_in(environ)
        self._job = {} if environ is None else {name: environ.get(name) for name in _JOB}
        if not any(self._job.get(name) for name in _ADDRESSES):
            self._rank = None  # this process itself does not tell which job it is of
        self._next = time.monotonic()
        self._seen: dict[int, ProcessIdentity] = {}
        self._gone_since: dict[int, float] = {}

    def ended(self) -> dict[int, ProcessIdentity]:
        """The ranks of which there was a process, and is none any more. May be called often: it looks now and then."""
        now = time.monotonic()
        if self._rank is None or now < self._next:
            return {}
        self._next = now + LOOK_S
        found = self._found()
        self._seen.update(found)
        for rank in self._seen:
            if rank in found or how_ended(self._seen[rank]) is None:
                self._gone_since.pop(rank, None)  # it may have become another program
            else:
                self._gone_since.setdefault(rank, now)
        return {rank: self._seen[rank] for rank, since in self._gone_since.items() if now - since >= GONE_S}

    def running(self, rank: int) -> ProcessIdentity | None:
        """The process of `rank`, as it was found at the last look; None where none was."""
        return None if rank in self._gone_since else self._seen.get(rank)

    def _found(self) -> dict[int, ProcessIdentity]:
        found: dict[int, ProcessIdentity] = {}
        with contextlib.suppress(OSError):
            for name in os.listdir("/proc"):
                if not name.isdigit() or int(name) == os.getpid():
                    continue
                environ = _environ(int(name))
                if environ is None or any(environ.get(key) != value for key, value in self._job.items()):
                    continue
                rank, process = _rank_in(environ), identity_of(int(name))
                # A rank's own children have its variables, too: the oldest is the rank.
                if rank is None or rank == self._rank or process is None:
                    continue
                if rank not in found or process.started < found[rank].started:
                    found[rank] = process
        return found


def _rank_in(environ: Mapping[str, str]) -> int | None:
    try:
        claim = read_claim(environ, ())
    except TopologyError:
        return None
    return None if claim is None else claim.rank


def _environ(pid: int) -> dict[str, str] | None:
    """The variables that a process was started with; None where they cannot be read, or it has ended."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            parts = file.read().split(b"\0")
    except OSError:
        return None
    pairs = (os.fsdecode(part).partition("=") for part in parts if b"=" in part)
    return {name: value for name, _, value in pairs} or None
