"""Starts the ranks of a job as real processes, with a deadline, and leaves none behind.

    finished = run_ranks("tests/scenario.py:succeed", 2, args=("x",), deadline_s=30)
    assert [rank.returncode for rank in finished] == [0, 0], finished

Each rank gets the environment that torchrun would give it, in a session of its own. It is a fork of a Python that has
imported torch and rankload, and DeepSpeed where the job's own environment names the accelerator; with TEST_ALL set, a
Python of its own from the start. ``nodes=(2, 2)`` plays two nodes of two ranks each on this machine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from places import REPOSITORY, SUPPORT, TESTS
from warm_ranks import WarmRank, end_at_once

Process = subprocess.Popen[bytes] | WarmRank
_OWN_PORTS = (20_000, 32_000)
"""Below those that Linux gives to connections, and to servers that ask for any port."""
INHERITED_LAUNCHERS = (
    "OMPI_", "PMIX_", "PMI_", "MV2_", "MPI_", "PALS_", "SLURM_", "TORCHELASTIC_", "CROSS_", "RANKLOAD_",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """How one rank ended. ``returncode`` is None where it had to be killed at the deadline."""

    rank: int
    returncode: int | None
    stdout: str
    stderr: str
    seconds: float

    def __repr__(self) -> str:
        return (
            f"\n--- rank {self.rank}: returncode {self.returncode} after {self.seconds:.1f} s"
            f"\n[stdout]\n{self.stdout[-4000:]}\n[stderr]\n{self.stderr[-6000:]}"
        )


def run_ranks(
    target: str | Path,
    world_size: int,
    *,
    args: Sequence[object] = (),
    deadline_s: float,
    env: Mapping[str, str | None] | Callable[[int], Mapping[str, str | None]] | None = None,
    nodes: Sequence[int] | None = None,
    kill_once_others_end: Collection[int] = (),
    python: str = sys.executable,
    fork: bool | None = None,
) -> list[Finished]:
    """Runs ``world_size`` processes and returns how each ended, by rank.

    Args:
        target: a script (``job.py``), or a function of a script or module (``job.py:main``,
            ``package.job:main``), which is called with ``args`` as strings.
        args: command line of each rank.
        deadline_s: seconds after which what still runs is killed (``returncode`` None).
        env: variables to add, or, where the value is None, to remove; or a function of the rank that gives
            them. Where they say DS_ACCELERATOR=cpu, forks begin with DeepSpeed imported.
        nodes: sizes of the nodes; one node of all ranks by default.
        kill_once_others_end: ranks that are not expected to end (stopped ones): killed when all others have
            ended.
        python: the interpreter, and with it the packages, that the ranks have.
        fork: whether ranks are forks, as this module says. By default they are, unless TEST_ALL is set; what `fork`
            cannot do, as another interpreter, starts as a Python of its own.
    """
    sizes = tuple(nodes) if nodes is not None else (world_size,)
    if sum(sizes) != world_size:
        raise ValueError(f"nodes={sizes} do not add up to world_size={world_size}")
    port = free_port()
    places = [(node, local) for node, size in enumerate(sizes) for local in range(size)]
    started: list[Process] = []
    seconds: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        begin = time.monotonic()
        try:
            for rank, (node, local) in enumerate(places):
                variables = rank_environment(
                    rank, world_size, local_rank=local, local_world_size=sizes[node], node=node,
                    n_nodes=len(sizes), port=port,
                )  # fmt: skip
                extra = env(rank) if callable(env) else env
                _override(variables, extra or {})
                command = [*_command(target), *map(str, args)]
                streams = os.path.join(folder, str(rank))
                imports = ("deepspeed",) if (extra or {}).get("DS_ACCELERATOR") == "cpu" else ()
                started.append(_start(python, command, variables, streams, fork, imports))
            _wait(started, begin, deadline_s, frozenset(kill_once_others_end), seconds)
        finally:
            for process in started:
                kill_session(process)
        return [
            Finished(
                rank,
                started[rank].returncode if rank in seconds else None,
                Path(folder, f"{rank}.out").read_text(errors="replace"),
                Path(folder, f"{rank}.err").read_text(errors="replace"),
                seconds.get(rank, time.monotonic() - begin),
            )
            for rank in range(world_size)
        ]


def rank_environment(
    rank: int, world_size: int, *, local_rank: int, local_world_size: int, node: int, n_nodes: int, port: int
) -> dict[str, str]:
    """This process's environment without any launcher's variables, plus torchrun's for one rank."""
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(INHERITED_LAUNCHERS)
    }
    for name in ("NODE_RANK", "LOCAL_SIZE"):
        variables.pop(name, None)
    variables.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(local_world_size),
        GROUP_RANK=str(node),
        GROUP_WORLD_SIZE=str(n_nodes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        PYTHONUNBUFFERED="1",
        PYTHONFAULTHANDLER="1",
        RANKLOAD_CACHE_HOME="disk",
        # torch looks up the name of every address it connects to; no name server needs to answer in a test.
        RES_OPTIONS="timeout:1 attempts:1",
    )
    return variables


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on at the moment.

    It is none that the kernel gives by itself to connections and servers of other tests meanwhile, before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(*_OWN_PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def kill_session(process: Process) -> None:
    """Kills a process that was started in a session of its own, and what it started; reaps it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(
    python: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    streams: str,
    fork: bool | None,
    imports: tuple[str, ...],
) -> Process:
    out, err, folder = f"{streams}.out", f"{streams}.err", os.path.dirname(streams)
    if fork is None:
        fork = not os.environ.get("TEST_ALL")
    fork &= python == sys.executable and command[0].endswith(".py") and variables["OMP_NUM_THREADS"] == "1"
    with open(out, "wb") as out_file, open(err, "wb") as err_file:
        if fork:
            return WarmRank(command, env=variables, cwd=folder, out=out, err=err, imports=imports)
        return subprocess.Popen(
            [python, *command],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            env=variables,
            cwd=folder,
            start_new_session=True,
        )


def _wait(
    started: Sequence[Process],
    begin: float,
    deadline_s: float,
    unending: frozenset[int],
    seconds: dict[int, float],
) -> None:
    while time.monotonic() - begin < deadline_s:
        for rank, process in enumerate(started):
            if rank not in seconds and process.poll() is not None:
                seconds[rank] = time.monotonic() - begin
        if len(seconds.keys() | unending) == len(started):
            return
        time.sleep(0.02)


def _override(variables: dict[str, str], extra: Mapping[str, str | None]) -> None:
    for name, value in extra.items():
        if value is None:
            variables.pop(name, None)
        elif name == "PYTHONPATH" and variables.get(name):
            # What the tests themselves run may be found by it.
            variables[name] = os.pathsep.join((value, variables[name]))
        else:
            variables[name] = value


def _command(target: str | Path) -> list[str]:
    text = str(target)
    script, _, function = text.rpartition(":")
    if not function or not script:
        return [str(_path(text))]
    return [str(Path(__file__).resolve()), str(_path(script)), function]


def _path(script: str) -> str:
    """A script as an absolute path (relative: to here, or to the repository); a module's name as it is."""
    if not script.endswith(".py"):
        return script
    for base in (Path.cwd(), REPOSITORY):
        if (base / script).exists():
            return str((base / script).resolve())
    raise FileNotFoundError(script)


def _load(script: str) -> ModuleType:
    if not script.endswith(".py"):
        return importlib.import_module(script)
    folder = Path(script).parent
    if folder != SUPPORT and folder.is_relative_to(TESTS):
        # What tests share, which pytest finds for them.
        sys.path.insert(0, str(SUPPORT))
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    if spec is None or spec.loader is None:
        raise ImportError(script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(script).stem] = module
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str]) -> None:
    """Calls one function of a script or module: ``processes.py SCRIPT FUNCTION ARG ...``."""
    script, function, *arguments = argv
    # The folder of this file was put first by Python; it is no part of what the rank should import from.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != SUPPORT]
    target: Any = getattr(_load(script), function)
    target(*arguments)
    end_together()


def end_together() -> None:
    """Ends this process well, once all ranks have come as far, or have ended.

    Gloo's threads may crash a rank while its interpreter is taken down, or its peers are gone: DeepSpeed's and FSDP's
    groups outlive every ``destroy_process_group``. So exit handlers run, and then the process ends at once. A
    DistributedDataParallel module that is freed after its group may wait for ever for the group's thread, which waits
    for the interpreter: modules go first.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available():
        return
    if distributed.is_initialized():
        # Without the others it ends all the same: it is for them to say why they did not come.
        with contextlib.suppress(Exception):
            distributed.monitored_barrier(timeout=timedelta(seconds=10))
        gc.collect()
        distributed.destroy_process_group()
    end_at_once(0)


if __name__ == "__main__":
    main(sys.argv[1:])
