"""Runs the processes that a command starts: with a deadline, and ended together with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INHERITED = (
    "OMPI_",
    "PMIX_",
    "PMI_",
    "MV2_",
    "MPI_",
    "PALS_",
    "SLURM_",
    "TORCHELASTIC_",
    "CROSS_",
    "RANKLOAD_",
)
"""Prefixes of variables that describe another job, or another load, than the one that is started."""
ENDING_S = 5.0
"""How long a process may take to end after SIGTERM; then it and its descendants are killed."""


class ChildError(Exception):
    """A process failed, or took too long; the message says which and shows its last lines."""


def rank_environment() -> dict[str, str]:
    """This process's environment for CPU ranks on this machine, without any launcher's variables."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        variables.pop(name, None)
    variables.update(
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", NO_PROXY="127.0.0.1,localhost"
    )
    return variables


def run_torchrun(ranks: int, module: str, arguments: Sequence[str], *, log: Path, deadline_s: float) -> None:
    """Runs `module` under torchrun on `ranks` ranks, its output going to `log`.

    Raises `ChildError` where it fails, or still runs after `deadline_s` seconds. Whatever happens, nothing
    that was started here runs on.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", str(ranks), "-m", module, *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=rank_environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise ChildError(
                f"the {ranks} ranks still ran after {deadline_s:.0f} s\n{last_lines(log)}"
            ) from None
        finally:
            end(process)
    if code != 0:
        raise ChildError(f"the {ranks} ranks ended with exit code {code}\n{last_lines(log)}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends `process` and its descendants: SIGTERM first, SIGKILL after `ENDING_S` seconds."""
    if process.poll() is not None:
        return
    family = descendants(process.pid)
    # torchrun's workers are leaders of sessions of their own, so no signal to a group reaches them all.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_S)
    for pid in (*family, process.pid) if process.poll() is None else family:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """The ids of the processes that `pid` started, directly or not; [] where ``/proc`` lists no children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def last_lines(log: Path, count: int = 12) -> str:
    """The last `count` lines of a log that are not blank, indented."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(f"    | {line[:200]}" for line in lines[-count:])
