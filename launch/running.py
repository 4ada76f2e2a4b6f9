"""Runs a job under its launcher, ``rankload run``: starts it, passes signals, waits, and says which rank failed first.

1. `command_lines` makes the launcher's command; each rank's process is `ranked`, which records its start and its end.
2. What the job resumes from is fetched meanwhile (`prefetch`): here where ``rankload run`` is started on each node, by
   each node's first rank where the launcher reaches the nodes itself.
3. SIGINT and SIGTERM go to the launcher and what it started in its process group, SIGUSR1 and SIGUSR2 to the ranks.
   What does not end within the grace period is killed.
4. `first_failure` makes the report.

Not guaranteed: that processes on other nodes end where their launcher is killed; that anything ends when
``rankload run`` itself is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ..distributed.liveness import ProcessIdentity, how_ended, is_watchable
from ..loader.errors import AccessError, NotFoundError
from ..loader.options import RESUME
from .children import descendants
from .command_lines import Job, Place, agents_everywhere, command_line
from .elastic import FAILURES
from .first_failure import Death, Failure, Report, failures_of, rounds
from .prefetch import fetching
from .rank_records import read_record, read_records, record_paths

GRACE_S = 60.0
"""How long a job may take to end after SIGINT or SIGTERM: longer than torchrun's own 30 seconds."""
_SETTLE_S = 5.0
"""How long what a launcher started may outlive it."""
_POLL_S = 0.05
_STOPPING_S = 0.5
"""A process that is seen alive so shortly before a signal is passed on was ended by it."""
_ENDS = (signal.SIGINT, signal.SIGTERM)
_TELLS = (signal.SIGUSR1, signal.SIGUSR2)


def run(
    job: Job,
    *,
    grace_s: float = GRACE_S,
    records: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Report:
    """Runs `job` until it ends; nothing of it that was started on this node runs on afterwards.

    Args:
        job: what to run, and how.
        grace_s: seconds that the job gets to end after SIGINT or SIGTERM.
        records: the folder for the ranks' records, which each node should see; a temporary one by default.
        storage_options: for what is fetched here.

    Call it in the main thread.

    Raises:
        OptionError: the launcher's options run something else than Python.
        NotFoundError: the launcher is not installed.
        AccessError: `records` cannot be made.
    """
    check_installed(job)
    with _records_folder(records) as folder, _signals() as received:
        place = Place(folder, int(os.environ.get("MASTER_PORT") or free_port()))
        command = command_line(job, place)
        environ = environment(job)
        with fetching(job.resume if agents_everywhere(job) else None, environ, storage_options):
            # A session of its own: a terminal's Ctrl-C then comes to this process alone, which passes it on once.
            process = subprocess.Popen(command, env=environ, start_new_session=True)  # noqa: S603 - the user's job
            run = _Run(job, process, folder, received)
            try:
                run.wait(grace_s)
            finally:
                run.end()
        return run.report()


def environment(job: Job) -> dict[str, str]:
    """The variables that the launcher of `job` gets."""
    environ = {**os.environ, **job.variables}
    if job.resume is not None:
        environ[RESUME] = job.resume
    if job.launcher == "torchrun":
        # The ranks of a restart would else find, in a store that outlives them, addresses of the ranks before them.
        environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return environ


def check_installed(job: Job) -> None:
    """Raises `NotFoundError` where the launcher of `job` is not here."""
    if job.launcher in ("slurm", "mpi") and shutil.which(job.program) is None:
        raise NotFoundError(
            f"the command {job.program} is not on this node's PATH: --launcher {job.launcher} starts it"
        )
    if job.launcher == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise NotFoundError("deepspeed is not installed here: pip install 'rankload[deepspeed]'")


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


class _Run:
    """A launcher that was started, and the ranks that it started on this node."""

    def __init__(
        self, job: Job, process: subprocess.Popen[bytes], folder: Path, received: list[signal.Signals]
    ) -> None:
        self._job = job
        self._process = process
        self._folder = folder
        self._received = received
        self._stopped_by: tuple[signal.Signals, float] | None = None
        self._met: set[Path] = set()
        """Records whose process is known."""
        self._alive_s: dict[ProcessIdentity, float] = {}
        """When each rank's process on this machine was last seen alive."""
        self._deaths: dict[ProcessIdentity, Death] = {}
        self._ends = _Ends()

    def wait(self, grace_s: float) -> None:
        """Returns when the launcher and all that it started here have ended, or must be ended."""
        until: float | None = None
        while True:
            self._look()
            for number in self._taken():
                self._pass_on(number)
                if number in _ENDS and until is None:
                    until = time.monotonic() + grace_s
            if self._process.poll() is not None:
                if not self._anything_left():
                    return
                until = until or time.monotonic() + _SETTLE_S
            if until is not None and time.monotonic() > until:
                return
            self._ends.wait(_POLL_S)

    def end(self) -> None:
        """Ends what still runs: SIGTERM, where it did not get one, then SIGKILL."""
        family = descendants(self._process.pid) if self._process.poll() is None else []
        if self._process.poll() is None or self._anything_left():
            if self._stopped_by is None:
                self._signal(signal.SIGTERM, family)
                until = time.monotonic() + _SETTLE_S
                while time.monotonic() < until and (self._process.poll() is None or self._anything_left()):
                    time.sleep(_POLL_S)
            self._signal(signal.SIGKILL, family)
        self._process.wait()
        self._look()
        self._ends.close()

    def report(self) -> Report:
        """How the job ended."""
        code = self._process.returncode
        code = 128 - code if code < 0 else code
        records = read_records(self._folder)
        each = rounds(records) if self._job.launcher == "torchrun" else [records]
        exit_codes = self._exit_codes()
        failed = [failures_of(one, self._deaths, exit_codes) for one in each]
        last: list[Failure] = failed[-1] if failed and code else []
        stopped_by = None
        if self._stopped_by is not None:
            number, at_s = self._stopped_by
            stopped_by = number.name
            # What ranks say while they are ended is of no interest.
            last = [one for one in last if one.at_s < at_s - _STOPPING_S]
        return Report(
            launcher=self._job.program,
            exit_code=code,
            stopped_by=stopped_by,
            ranks=len(each[-1]) if each else 0,
            failures=tuple(last),
            restarts=tuple(one[0] for one in failed[:-1] if one),
        )

    def _taken(self) -> list[signal.Signals]:
        taken = self._received[:]
        del self._received[: len(taken)]
        return taken

    def _pass_on(self, number: signal.Signals) -> None:
        if number in _TELLS and self._job.launcher in ("torchrun", "deepspeed"):
            # These launchers would end by it; srun and mpirun pass it on.
            for process in self._living():
                _send(process.pid, number)
            return
        if number in _ENDS and self._stopped_by is None:
            self._stopped_by = (number, time.time())
        if number in _TELLS:
            _send(self._process.pid, number)
            return
        self._signal_group(number)
        if number == signal.SIGINT and self._job.launcher == "slurm":
            # The first one only makes srun say what its tasks do.
            time.sleep(_POLL_S)
            self._signal_group(number)

    def _signal(self, number: signal.Signals, family: list[int]) -> None:
        self._signal_group(number)
        for pid in {*family, *(one.pid for one in self._living())}:
            _send(pid, number)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _anything_left(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return bool(self._living())
        except PermissionError:
            pass
        return True

    def _living(self) -> list[ProcessIdentity]:
        """The ranks' processes on this machine that run."""
        return [one for one in self._alive_s if one not in self._deaths and how_ended(one) is None]

    def _look(self) -> None:
        """Sees which ranks run."""
        with contextlib.suppress(OSError):
            for path in record_paths(self._folder):
                if path not in self._met and (record := read_record(path)) is not None:
                    self._met.add(path)
                    if is_watchable(record.process):
                        self._alive_s[record.process] = record.began_s
                        self._ends.watch(record.process)
        now = time.time()
        for process, alive_s in self._alive_s.items():
            if process not in self._deaths:
                how = how_ended(process)
                if how is None:
                    self._alive_s[process] = now
                else:
                    self._deaths[process] = Death(alive_s, now, how)
                    self._ends.leave(process)

    def _exit_codes(self) -> dict[int, int]:
        """By process id, of the ranks that torchrun says have failed."""
        try:
            failures = json.loads((self._folder / FAILURES).read_text())
        except (OSError, ValueError):
            return {}
        return {one["pid"]: one["exit_code"] for one in failures}


class _Ends:
    """Wakes its caller when a rank's process ends: how it ended can be seen until its launcher has asked, no longer.

    Where the system has no descriptors of processes (pidfd_open(2)), it only sleeps.
    """

    def __init__(self) -> None:
        self._descriptors: dict[ProcessIdentity, int] = {}

    def watch(self, process: ProcessIdentity) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._descriptors[process] = os.pidfd_open(process.pid)

    def leave(self, process: ProcessIdentity) -> None:
        descriptor = self._descriptors.pop(process, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        for process in list(self._descriptors):
            self.leave(process)

    def wait(self, seconds: float) -> None:
        """Returns when a process that is watched has ended, at the latest after `seconds`."""
        if not self._descriptors:
            time.sleep(seconds)
            return
        poll = select.poll()
        for descriptor in self._descriptors.values():
            poll.register(descriptor, select.POLLIN)
        poll.poll(seconds * 1000)


@contextlib.contextmanager
def _records_folder(given: str | None) -> Iterator[Path]:
    """A folder for records, new and this user's alone, inside `given` or the system's temporary folder."""
    try:
        if given is not None:
            os.makedirs(given, exist_ok=True)
        made = tempfile.TemporaryDirectory(
            prefix="rankload-run-", dir=given and os.path.abspath(given), ignore_cleanup_errors=True
        )
    except OSError as error:
        raise AccessError(f"the folder for the ranks' records cannot be made: {error}", path=given) from error
    with made as folder:
        yield Path(folder)


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects the signals that this process gets in a list, in the place of what they do."""
    received: list[signal.Signals] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, take) for number in (*_ENDS, *_TELLS)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
