"""Ranks that begin as forks of a Python which has imported torch: by itself each would spend seconds on that.

    rank = WarmRank(["job.py", "argument"], env=..., cwd=..., out=..., err=...)
    while rank.poll() is None: ...

A job that says it uses other modules too, such as DeepSpeed, has forks of a fork that has imported them. Otherwise
ranks are as fresh as a Python of their own: environment, arguments, import path, streams, session, random generators,
and how they end.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any
from unittest import mock

PRELOADED = (
    "numpy", "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo",
    "torch._inductor.compile_fx", "torch.distributed.checkpoint", "torch.distributed.checkpoint.state_dict",
    "rankload.loader.journey", "rankload.loader.reading", "rankload.loader.saving", "rankload.loader.resuming",
)  # fmt: skip
"""What ranks import; torch.compile, of which DeepSpeed's optimizers make use, brings torch._inductor. None of them
starts a thread while it is imported with one OpenMP thread, and none reads what a job may set."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_context = multiprocessing.get_context("forkserver")
_starting = threading.Lock()
"""Held while one rank is started: the way to its server stands where multiprocessing looks for the only one."""


class WarmRank:
    """What `subprocess.Popen` is for a rank that starts cold; the first one starts the Python that all are forks of."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str,
        out: str,
        err: str,
        imports: tuple[str, ...] = (),
    ) -> None:
        warm_up()
        path = [os.path.dirname(argv[0]), *env.get("PYTHONPATH", "").split(os.pathsep), *installed_path()]
        self._process = _context.Process(
            target=become, args=(list(argv), dict(env), list(filter(None, path)), cwd, out, err)
        )
        with _starting:
            connect = _connect_to(imports) if imports else forkserver.connect_to_new_process
            with mock.patch.object(forkserver, "connect_to_new_process", connect):
                self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.kill()  # where it had not got as far as a session of its own
        self._process.join()


def warm_up(*more: str) -> None:
    """Starts the Python that all ranks are forks of, unless it runs: it imports `more` modules besides."""
    # Read while libraries are imported.
    with mock.patch.dict(os.environ, dict.fromkeys(THREADS, "1")):
        _context.set_forkserver_preload([*PRELOADED, *more])
        forkserver.ensure_running()


@cache
def _connect_to(imports: tuple[str, ...]) -> Callable[[list[int]], tuple[int, int]]:
    """Asks a fork that has imported these modules, too, for forks of it; it ends with this process."""
    address = connection.arbitrary_address("AF_UNIX")
    alive_read, alive = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        serving = _context.Process(
            target=_serve,
            args=(listener, connection.Connection(alive_read, writable=False), imports),
            daemon=True,
        )
        serving.start()
    server = _Further(address, alive)
    return server.connect_to_new_process


class _Further(forkserver.ForkServer):
    """A server that runs already."""

    def __init__(self, address: str, alive: int) -> None:
        super().__init__()
        self._forkserver_address, self._forkserver_alive_fd = address, alive

    def ensure_running(self) -> None:
        resource_tracker.ensure_running()


def _serve(listener: socket.socket, alive: connection.Connection, imports: tuple[str, ...]) -> None:
    with mock.patch.dict(os.environ, {**dict.fromkeys(THREADS, "1"), "DS_ACCELERATOR": "cpu"}):
        forkserver.main(listener.detach(), os.dup(alive.fileno()), list(imports))


@cache
def installed_path() -> tuple[str, ...]:
    """The import path of a Python that nobody added anything to, as pytest does."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.check_output(
        [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"], env=env, timeout=60
    )
    return tuple(json.loads(told))


def become(argv: list[str], env: dict[str, str], path: list[str], cwd: str, out: str, err: str) -> None:
    """Is the process that `argv`, a script with its arguments, would be in a Python of its own; never returns."""
    os.setsid()
    # What is shared with the Python that this is a fork of is not looked through for garbage: it would be copied.
    gc.freeze()
    for fd, file, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        opened = os.open(file, flags)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), _stream(1), _stream(2)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:] = path
    sys.argv[:] = argv
    faulthandler.enable(sys.stderr)
    random.seed()
    sys.modules["numpy"].random.seed()
    # What brought this about is no part of the job.
    sys.modules.pop("__mp_main__", None)
    code = 1
    try:
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if code and not isinstance(ending.code, int):
            print(ending.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    end_at_once(code)


def end_at_once(code: int) -> None:
    """Does what an interpreter does at its end, but for taking itself down: waits for threads, runs exit handlers.

    A negative `code` is the signal that ends the process.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _stream(fd: int) -> Any:
    return open(fd, "w", buffering=1, encoding="utf-8", closefd=False)
