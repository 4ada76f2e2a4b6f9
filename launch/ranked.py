"""Runs a rank's script under ``rankload run``, as ``python script`` does, and records how it ends (`rank_records`).

    python -m rankload.launch.ranked [OPTIONS] -- SCRIPT ARGUMENT ...
    python -m rankload.launch.ranked [OPTIONS] -- -m MODULE ARGUMENT ...

A launcher starts it once a rank. Under Slurm and MPI it sets what torch reads: RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT, each unless it is set. It imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from types import TracebackType

from ..distributed.launchers import Claim, read_claim
from ..loader.options import RESUME
from .prefetch import fetching
from .rank_records import write_end, write_start

LOOPBACK = "127.0.0.1"


def main(words: Sequence[str]) -> None:
    """Runs the script that `words` name, and ends as it ends."""
    split = words.index("--")
    options = parse(words[:split])
    script = list(words[split + 1 :])
    is_module = script[0] == "-m"
    if is_module:
        del script[0]
    if options.local_rank is not None:
        # DeepSpeed's launcher puts it before all that its script is given; so does the script get it.
        script.insert(1, f"--local_rank={options.local_rank}")
    for variable in options.variable:
        name, _, value = variable.partition("=")
        os.environ[name] = value
    claim = read_claim(os.environ, script[1:])
    name_variables(os.environ, claim, address=options.master_addr, port=options.master_port)
    if options.resume is not None:
        os.environ[RESUME] = options.resume
    sys.argv = script
    if claim is None:
        _run(script[0], is_module)
        return
    local_rank = claim.local_rank or 0
    record = write_start(options.records, rank=claim.rank, local_rank=local_rank)
    try:
        with fetching(options.resume if local_rank == 0 else None, os.environ):
            _run(script[0], is_module)
    except SystemExit as error:
        write_end(options.records, record, None if error.code in (None, 0) else error)
        raise
    except KeyboardInterrupt as error:
        write_end(options.records, record, error)
        raise
    except BaseException as error:
        write_end(options.records, record, error)
        trace = own_frames(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)
    write_end(options.records, record)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What ``rankload run`` says to each rank, and DeepSpeed's launcher."""
    parser = argparse.ArgumentParser(prog="rankload.launch.ranked", allow_abbrev=False)
    parser.add_argument("--records", required=True, metavar="FOLDER", help="where the rank's record goes")
    parser.add_argument(
        "--variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one of the environment, on nodes that the launcher's own does not reach",
    )
    parser.add_argument(
        "--resume", help="what autoresume takes; this node's first rank fetches it while the script runs"
    )
    parser.add_argument("--master-addr", help="rank 0's host, where several nodes do not show it")
    parser.add_argument("--master-port")
    parser.add_argument("--local_rank", help="set by the deepspeed launcher")
    return parser.parse_args(words)


def name_variables(
    environ: MutableMapping[str, str], claim: Claim | None, *, address: str | None, port: str | None
) -> None:
    """Sets torch's variables in `environ` by `claim`, the launcher's; none that is set is changed."""
    if claim is None:
        return
    for name, value in (
        ("RANK", claim.rank),
        ("WORLD_SIZE", claim.world_size),
        ("LOCAL_RANK", claim.local_rank),
    ):
        if value is not None:
            environ.setdefault(name, str(value))
    address = master_address(environ, claim) or address
    if address is not None:
        environ.setdefault("MASTER_ADDR", address)
    if port is not None:
        environ.setdefault("MASTER_PORT", port)


def master_address(environ: Mapping[str, str], claim: Claim) -> str | None:
    """The host of rank 0, as far as the launcher's variables show it."""
    if claim.n_nodes == 1 or claim.local_world_size == claim.world_size:
        return LOOPBACK
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    return first_host(nodes) if nodes else None


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: ``a[003-005,9],b`` is ``a003``."""
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\]([^\[,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """`trace` from the script's first frame on."""
    one = trace
    while one is not None:
        name = one.tb_frame.f_code.co_filename
        if name not in (__file__, contextlib.__file__, runpy.run_path.__code__.co_filename):
            return one
        one = one.tb_next
    return trace


def _run(script: str, is_module: bool) -> None:
    """Runs `script` as the main module, with the folder that Python itself would put first on its path."""
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
