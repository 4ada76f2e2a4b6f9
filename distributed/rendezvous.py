"""Brings the ranks together where there is no process group yet: an address for all, a store there, and all joined.

`meeting_point`, `open_meeting_store`, `own_keys`, `await_all`, in this order. Joining waits in short steps of its own:
torch's way blocks in native code until the time-out, deaf to Ctrl-C, and does not say which ranks are missing. Here the
end of a rank is noticed by its process, where that is on this machine (`RollCall`); else those that are missing are
named after some seconds.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .errors import PeerError, RankloadError, StalledError, TopologyError, from_record, to_record
from .liveness import ProcessIdentity, how_ended, this_process
from .printable import package_logger
from .siblings import Siblings
from .sockets import Sockets, listens, shut_down
from .topology import Topology

FIRST_PORT, PORTS = 20000, 12000
"""Ports that a job's id is hashed into, where no MASTER_PORT is set."""
MPI_LAUNCHERS = frozenset({"openmpi", "mvapich", "hydra"})
MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "MPIRUN_ID")
"""Variables that hold the id of an MPI job."""
POLL_S = 0.02
GRACE_S = 5.0
"""Added to the wait for torch's own time-out, which says more."""
LISTEN_POLL_S = 0.1
LOOK_S = 1.0
"""Seconds between two looks at who is missing."""
_NAMELESS = "none"
_NAME_POLL_S = 0.005
_FAILED_S = 0.2
"""Seconds between two questions whether another rank has failed: rank 0 may host the store, and ends soon then."""
WARN_AFTER_S = 10.0
"""After how long those that are missing are named by a warning; and again each time that it has doubled."""
NAMED_AT_MOST = 16
"""Ranks that a message names; the others are counted."""
_ANSWER_POLL_S = 0.1
T = TypeVar("T")
_asked: dict[int, float] = {}
"""By thread: since when it waits for an answer of the store."""

_logger = package_logger()


@dataclass(frozen=True)
class MeetingPoint:
    """Address of the store. ``hosted``: torchrun's agent runs its server, so no rank does; it then has the keys of
    ranks that the agents have started before, too."""

    host: str
    port: int
    hosted: bool = False


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
        return MeetingPoint(host, number, hosted=True)
    return MeetingPoint(host, number)


def first_of_nodes(node_list: str) -> str:
    """The first host of a Slurm node list: ``gpu[003-010,12],login1`` gives ``gpu003``."""
    head = re.split(r",(?![^\[]*\])", node_list.strip(), maxsplit=1)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def _on_one_node(topology: Topology) -> bool:
    known = "local_world_size" not in topology.assumed
    return known and topology.local_world_size == topology.world_size


def open_meeting_store(point: MeetingPoint, topology: Topology, timeout_s: float, call: int = 1) -> Any:
    """A TCPStore at the meeting point, hosted by rank 0 unless the point is ``hosted``. Every rank must call.

    `call` counts the calls of this process that came here, for messages.

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
            if not hosts:
                # Its own retries last longer than it is told, and nothing ends them.
                _await_listener((point.host, point.port), timeout_s)
            made.append(TCPStore(point.host, point.port, None, hosts, timeout, wait_for_workers=False))
        except Exception as error:
            made.append(error)

    # In a thread, so that Ctrl-C and SIGTERM are heard meanwhile.
    thread = threading.Thread(target=connect, name="rankload-rendezvous", daemon=True)
    begin = time.monotonic()
    thread.start()
    roll_call = RollCall(topology, f"to listen at {where}{_same_calls(call)}")
    while not made:
        if time.monotonic() - begin > timeout_s + GRACE_S:
            raise _stalled(topology, begin, timeout_s, f"rank 0 to listen at {where}{_same_calls(call)}")
        roll_call.look([] if hosts else [0], tells=topology.local_rank == 0)
        time.sleep(POLL_S)
    thread.join()
    if not isinstance(made[0], Exception):
        return made[0]
    if hosts:
        raise TopologyError(
            f"rank 0 can't listen at {where}: {made[0]}; set MASTER_ADDR to an address of rank 0 and MASTER_PORT "
            "to a free port, the same on all ranks"
        ) from made[0]
    what = f"rank 0 to listen at {where} (MASTER_ADDR, MASTER_PORT)"
    raise _stalled(topology, begin, timeout_s, f"{what}{_same_calls(call)}: {made[0]}") from made[0]


def _await_listener(address: tuple[str, int], timeout_s: float) -> None:
    """Returns once a server listens there. Raises TimeoutError after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not listens(address):
        if time.monotonic() > until:
            raise TimeoutError(f"nobody listened there for {timeout_s:g} s")
        time.sleep(LISTEN_POLL_S)


@dataclass(frozen=True)
class OwnKeys:
    """The keys of one group, in a ``store`` that may have those of others. ``keep`` is to be called often until all
    ranks have joined."""

    store: Any
    keep: Callable[[], None] = lambda: None


def own_keys(
    server: Any, point: MeetingPoint, topology: Topology, timeout_s: float, call: int = 1
) -> OwnKeys:
    """The keys that the ranks of this group alone use at the meeting point. Every rank must call.

    The store of an agent outlives the ranks, and has the keys of those that the agents have started before. Nothing
    that a rank is told by its agent is the same on all nodes in one attempt and another in the next: an agent counts
    only those restarts that a failure of its own ranks has caused. So rank 0 draws a name for the keys and leaves it
    at a known one. What stands there may be of an earlier rank 0; so each other rank first empties that key, which
    rank 0 fills again (`OwnKeys.keep`): agents start ranks only once those before have ended, so whoever fills it then
    is the rank 0 of this attempt.

    Raises as `await_all` does, where rank 0 does not come.
    """
    from torch._C._distributed_c10d import PrefixStore

    if not point.hosted:
        return OwnKeys(PrefixStore("rankload/group", server))
    key = f"rankload/name/{call}"
    if topology.rank == 0:
        name = uuid.uuid4().hex
        reaching(lambda: server.set(key, name))
        return OwnKeys(
            PrefixStore(f"rankload/{name}", server),
            lambda: reaching(lambda: server.compare_set(key, _NAMELESS, name)),
        )
    reaching(lambda: server.set(key, _NAMELESS))
    what = f"to join{_same_calls(call)}"
    roll_call, begin = RollCall(topology, what), time.monotonic()
    while (name := reaching(lambda: server.get(key)).decode()) == _NAMELESS:
        if time.monotonic() - begin > timeout_s:
            raise _stalled(topology, begin, timeout_s, f"rank 0 {what}")
        roll_call.look([0], tells=topology.local_rank == 0)
        time.sleep(_NAME_POLL_S)
    return OwnKeys(PrefixStore(f"rankload/{name}", server))


def await_all(keys_of: OwnKeys, topology: Topology, timeout_s: float, call: int = 1) -> RollCall:
    """Returns when every rank has joined the group of these keys. Every rank must call.

    `call` is as `open_meeting_store` takes it. Returns the `RollCall` that knows the ranks' processes by then.

    Raises:
        StalledError: for `timeout_s` no further rank joined; names those that are missing.
        PeerError: the store was lost meanwhile, or the process of a rank has ended.
    """
    store = keys_of.store
    keys = [f"joined/{rank}" for rank in range(topology.world_size)]
    failed = "failed"
    reaching(lambda: store.set(keys[topology.rank], json.dumps(this_process().as_dict())))
    roll_call = RollCall(topology, f"to join{_same_calls(call)}")
    begin = since = time.monotonic()
    missing = [rank for rank in range(topology.world_size) if rank != topology.rank]
    looked = asked = begin
    while not reaching(lambda: store.check(keys)):
        keys_of.keep()
        now = time.monotonic()
        if now - looked >= LOOK_S or now - since > timeout_s:
            looked, before = now, missing
            missing = reaching(lambda: [rank for rank, key in enumerate(keys) if not store.check([key])])
            if len(missing) < len(before):
                since = now
            # Each node's first rank knows the processes of those that came: few ranks ask for all.
            if topology.local_rank == 0:
                for rank in set(before) - set(missing):
                    record = reaching(lambda rank=rank: store.get(keys[rank]))  # type: ignore[misc]
                    roll_call.came(rank, ProcessIdentity(**json.loads(record)))
        if now - asked >= _FAILED_S:
            asked = now
            if reaching(lambda: store.check([failed])):
                raise from_record(reaching(lambda: store.get(failed)).decode())
        if now - since > timeout_s:
            raise _stalled(topology, begin, timeout_s, roll_call.described(missing))
        first = min(set(range(topology.world_size)) - set(missing), default=topology.rank)
        try:
            roll_call.look(missing, tells=topology.rank == first)
        except PeerError as error:
            # The others may not see that process, and rank 0 may take the store with it: they get the first cause.
            raise _settled(store, failed, error.located(topology.rank)) from None
        time.sleep(POLL_S)
    return roll_call


def _settled(store: Any, key: str, error: RankloadError) -> RankloadError:
    """The first error that a rank left at `key`, which is `error` where it is this one."""
    return from_record(reaching(lambda: store.compare_set(key, "", to_record(error))).decode())


class RollCall:
    """What a rank knows of those that it waits for: names them early, and notices the end of their processes."""

    def __init__(self, topology: Topology, what: str) -> None:
        """`what` says what they are waited for to do, as ``to join``."""
        self._topology, self._what = topology, what
        self._begin = time.monotonic()
        self._told_after_s = WARN_AFTER_S
        self._looked = 0.0
        self._siblings = Siblings()
        self._came = {topology.rank: this_process()}

    def came(self, rank: int, process: ProcessIdentity) -> None:
        """Notes that `rank` has come, and is `process`."""
        self._came[rank] = process

    def look(self, missing: Sequence[int], *, tells: bool) -> None:
        """To be called often. With `tells`, warns of those `missing` after `WARN_AFTER_S`, and whenever that doubled.

        Raises `PeerError` where the process of another rank has ended, whether that had come or not.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for rank, process in self._came.items():
            ended = how_ended(process)
            if ended is not None and rank != self._topology.rank:
                raise self._died(rank, process, ended)
        for rank, process in self._siblings.ended().items():
            raise self._died(rank, process, how_ended(process) or "its process is gone")
        waited = now - self._begin
        if tells and missing and waited > self._told_after_s:
            self._told_after_s *= 2
            _logger.warning(
                "rank %d has waited for %.0f s for %s", self._topology.rank, waited, self.described(missing)
            )

    def described(self, missing: Sequence[int]) -> str:
        """Those `missing`, what is known of them, and who has come."""
        shown = [self._one(rank) for rank in missing[:NAMED_AT_MOST]]
        more = f" and {len(missing) - NAMED_AT_MOST} more" if len(missing) > NAMED_AT_MOST else ""
        hosts = sorted({process.host for process in self._came.values()})
        at = f", on {', '.join(hosts[:NAMED_AT_MOST])}" if hosts else ""
        there = self._topology.world_size - len(missing)
        return (
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(shown)}{more} {self._what} ({there} of "
            f"{self._topology.world_size} are there{at})"
        )

    def _one(self, rank: int) -> str:
        process = self._siblings.running(rank)
        return str(rank) if process is None else f"{rank} (which runs on this host, pid {process.pid})"

    def _died(self, rank: int, process: ProcessIdentity, ended: str) -> PeerError:
        return PeerError(
            f"rank {rank} (host {process.host}, pid {process.pid}) ended before all ranks had joined: {ended}",
            rank=rank,
            host=process.host,
        )


def _same_calls(call: int) -> str:
    told = f"; this rank makes its call number {call}" if call > 1 else ""
    return f": every rank must make the same calls{told}"


def _stalled(topology: Topology, begin: float, timeout_s: float, what: str) -> StalledError:
    waited = time.monotonic() - begin
    return StalledError(
        f"rank {topology.rank} waited {waited:.0f} s (stall_timeout_s={timeout_s:g}) for {what}",
        rank=topology.rank,
    )


@contextmanager
def answered(connection: Sockets, timeout_s: float) -> Iterator[None]:
    """A block whose calls of the store (`reaching`) end, where there is no answer for `timeout_s`: one whose machine is
    cut off, or whose process is stopped, never gives one, and native code waits for it without an end.

    `connection` is this process's to the store; it is shut down then.
    """
    caller, done = threading.get_ident(), threading.Event()

    def watch() -> None:
        while not done.wait(_ANSWER_POLL_S):
            since = _asked.get(caller)
            if since is not None and time.monotonic() - since > timeout_s:
                shut_down(connection)

    thread = threading.Thread(target=watch, name="rankload-answers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def reaching(work: Callable[[], T]) -> T:
    """What `work` returns, which calls the store; PeerError where that can't be reached."""
    caller, begin = threading.get_ident(), time.monotonic()
    _asked[caller] = begin
    try:
        return work()
    except RankloadError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"the store that the ranks join at was lost, {time.monotonic() - begin:.0f} s after it was asked: {error}; "
            "rank 0 may have ended, or its machine cannot be reached"
        ) from error
    finally:
        del _asked[caller]
