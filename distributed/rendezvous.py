"""Brings the ranks together where there is no process group yet: an address for all, a store there, and all joined.

`meeting_point`, `open_meeting_store`, `await_all`, in this order. Joining waits in short steps of its own: torch's way
blocks in native code until the time-out, deaf to Ctrl-C, and does not say which ranks are missing.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .errors import PeerError, RankloadError, StalledError, TopologyError
from .topology import Topology

FIRST_PORT, PORTS = 20000, 12000
"""Ports that a job's id is hashed into, where no MASTER_PORT is set."""
MPI_LAUNCHERS = frozenset({"openmpi", "mvapich", "hydra"})
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "MPIRUN_ID")
"""Variables that hold the id of an MPI job."""
POLL_S = 0.02
GRACE_S = 5.0
"""Added to the wait for torch's own time-out, which says more."""
T = TypeVar("T")


@dataclass(frozen=True)
class MeetingPoint:
    """Address of the store. ``hosted``: torchrun's agent runs its server, so no rank does; the keys of this attempt
    then stand under ``prefix``."""

    host: str
    port: int
    hosted: bool = False
    prefix: str = ""


def meeting_point(topology: Topology, environ: Mapping[str, str] | None = None) -> MeetingPoint:
    """Where the ranks of this job meet, the same on each.

    MASTER_ADDR and MASTER_PORT where they are set. Otherwise, under srun, the first node of the step and a
    port from the job's and step's ids; under MPI on one node, 127.0.0.1 and a port from the job's id.

    Raises:
        TopologyError: neither is known; says what to set.
    """
    given = os.environ if environ is None else environ
    slurm = given.get("SLURM_STEP_ID") is not None and given.get("SLURM_PROCID") == str(topology.rank)
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or given.get("SLURM_NODELIST")
    host, port = given.get("MASTER_ADDR"), given.get("MASTER_PORT")
    job = None
    if slurm and nodes:
        host = host or first_of_nodes(nodes)
        job = f"{given.get('SLURM_JOB_ID', given.get('SLURM_JOBID', ''))}.{given['SLURM_STEP_ID']}"
    elif topology.launcher in MPI_LAUNCHERS and _on_one_node(topology):
        host = host or "127.0.0.1"
        # The ranks of one mpirun have one parent, where the launcher names no job.
        job = next((given[name] for name in MPI_JOBS if name in given), f"parent {os.getppid()}")
    if host is None or (port is None and job is None):
        raise TopologyError(
            f"{topology.world_size} ranks ({topology.launcher}), but no address to meet at: set "
            f"{'MASTER_ADDR and ' if host is None else ''}MASTER_PORT to a host and port of rank 0 that all "
            "ranks can reach, or call torch.distributed.init_process_group first"
        )
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise TopologyError(f"MASTER_PORT={port!r} is no port (1 to 65535)")
    number = int(port) if port is not None else FIRST_PORT + zlib.crc32(str(job).encode()) % PORTS
    if given.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port is not None:
        attempt = given.get("TORCHELASTIC_RESTART_COUNT", "0")
        return MeetingPoint(host, number, hosted=True, prefix=f"rankload/attempt_{attempt}")
    return MeetingPoint(host, number)


def first_of_nodes(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-010,12],login1`` gives ``gpu003``."""
    head = re.split(r",(?![^\[]*\])", node_list.strip(), maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def _on_one_node(topology: Topology) -> bool:
    known = "local_world_size" not in topology.assumed
    return known and topology.local_world_size == topology.world_size


def open_meeting_store(point: MeetingPoint, topology: Topology, timeout_s: float) -> Any:
    """A TCPStore at the meeting point, hosted by rank 0 unless the point is ``hosted``. Every rank must call.

    Raises:
        TopologyError: rank 0 can't listen there.
        StalledError: no server listened there for ``timeout_s``.
    """
    from torch._C._distributed_c10d import TCPStore

    hosts = topology.rank == 0 and not point.hosted
    where = f"{point.host}:{point.port}"
    made: list[Any] = []

    def connect() -> None:
        # Native code retries until the time-out, and looks up host names, which a silent name server makes
        # slow.
        timeout = timedelta(seconds=max(timeout_s, 1.0))
        try:
            made.append(TCPStore(point.host, point.port, None, hosts, timeout, wait_for_workers=False))
        except Exception as error:
            made.append(error)

    # In a thread, so that Ctrl-C and SIGTERM are heard meanwhile.
    thread = threading.Thread(target=connect, name="rankload-rendezvous", daemon=True)
    thread.start()
    _wait(lambda: bool(made), timeout_s + GRACE_S, lambda: f"rank 0 to listen at {where}")
    thread.join()
    if not isinstance(made[0], Exception):
        return made[0]
    if hosts:
        raise TopologyError(
            f"rank 0 can't listen at {where}: {made[0]}; set MASTER_ADDR to an address of rank 0 and MASTER_PORT "
            "to a free port, the same on all ranks"
        ) from made[0]
    raise StalledError(
        f"rank {topology.rank} waited {timeout_s:g} s (stall_timeout_s) for rank 0 to listen at {where} "
        f"(MASTER_ADDR, MASTER_PORT): {made[0]}",
        rank=topology.rank,
    ) from made[0]


def await_all(store: Any, topology: Topology, number: int, timeout_s: float) -> None:
    """Returns when every rank has joined group ``number``. Every rank must call.

    Raises:
        StalledError: for ``timeout_s`` no further rank joined; names those that are missing.
        PeerError: the store was lost meanwhile.
    """
    keys = [f"joined/{number}/{rank}" for rank in range(topology.world_size)]
    _reaching(lambda: store.set(keys[topology.rank], socket.gethostname()))

    def missing() -> list[int]:
        return _reaching(lambda: [rank for rank, key in enumerate(keys) if not store.check([key])])

    while not _reaching(lambda: store.check(keys)):
        before = missing()
        try:
            _wait(lambda: _reaching(lambda: store.check(keys)), timeout_s, lambda: _ranks(missing()))
        except StalledError:
            if len(missing()) == len(before):
                raise


def _wait(done: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    until = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > until:
            raise StalledError(f"waited {timeout_s:g} s (stall_timeout_s) for {what()}")
        time.sleep(POLL_S)


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {named} to join: every rank must make the same calls"


def _reaching(work: Callable[[], T]) -> T:
    """What `work` returns; PeerError where the store can't be reached."""
    try:
        return work()
    except RankloadError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"the store that the ranks join at was lost: {error}; rank 0 may have ended"
        ) from error
