"""From a DCP folder into an FSDP2 module with its optimizer: rankload beside ``torch.distributed.checkpoint.load``.

    python -m benchmarks.dcp --write docs/benchmarks.md

A module with AdamW is saved by ``dcp.save`` and restored by as many ranks, by more and by fewer: from local files that
are in the page cache, from local files that were dropped from it, and from S3 (SeaweedFS, with nginx before it that
counts bytes), where ``dcp.load`` reads through its ``FsspecReader``. Each restore is a job of its own; the two ways
take turns within each round, and what is shown are medians. rankload compares checksums, as it does by default;
``dcp.load`` cannot. Every tensor of every restore is compared, bit for bit, with what was saved. Nothing is asserted
about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks are started as scripts of the tests' are.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

from benchmarks.fetch_clients import touched  # noqa: E402
from benchmarks.fetch_restore import BUCKET, SERVERS, Source  # noqa: E402
from benchmarks.gauge import io_bytes  # noqa: E402
from benchmarks.measure import drop_from_page_cache, peak_private_bytes  # noqa: E402
from benchmarks.tables import publish, table  # noqa: E402

OURS, THEIRS = "**rankload**", "`dcp.load`"
WAYS = (OURS, THEIRS)
CASES = ((2, 2), (4, 4), (2, 4), (4, 2))
"""Ranks that save, and ranks that restore."""
LOCAL = {"local": False, "local-cold": True}
"""Whether the files are dropped from the page cache before each restore."""
PLACES = (*LOCAL, "s3", "s3-capped")
WIDTH = 1024
BYTES_OF_A_LAYER = 3 * 4 * (WIDTH * WIDTH + WIDTH)
"""Weights and both moments, in fp32."""
LR = 0.003
DEADLINE_S = 900.0
HEADER = (
    "from",
    "saved by, restored by",
    "way",
    "seconds",
    "x time of rankload",
    "CPU s",
    "read, MB",
    "read / kept",
    "memory, MB",
)


@dataclass(frozen=True)
class Run:
    seconds: float
    """Of the slowest rank."""
    cpu_seconds: float
    """Of all ranks, as what follows."""
    read_bytes: int
    kept_bytes: int
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dcp", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights and moments")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument(
        "--cases", default=",".join(f"{n}-{m}" for n, m in CASES), help="ranks that save-restore"
    )
    parser.add_argument("--write", help="the page to write the table to")
    arguments = parser.parse_args()
    cases = [tuple(map(int, case.split("-"))) for case in arguments.cases.split(",")]
    places = arguments.places.split(",")
    n_layers = max(1, arguments.megabytes * 1_000_000 // BYTES_OF_A_LAYER)
    runs: dict[tuple[str, int, int], dict[str, list[Run]]] = {}
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rankload-bench-")))
        cache = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="rankload-bench-", dir="/dev/shm"))
        )
        for n in sorted({n for n, _ in cases}):
            # The whole state lies where no server finds it.
            served, whole = work / f"of-{n}", work / f"of-{n}.pt"
            job(n, "save", served / BUCKET, whole, n_layers)
            for place in places:
                with opened(place, served, work / "servers") as source:
                    for m in [m for by, m in cases if by == n]:
                        found = compare(
                            place, source, served / BUCKET, m, n_layers, whole, cache, arguments.rounds
                        )
                        title = source.name if source else place
                        runs[title, n, m] = found
                        print(table(HEADER, summary(title, n, m, found)), flush=True)
            shutil.rmtree(served)
            whole.unlink()
    order = sorted(
        runs, key=lambda one: (list(dict.fromkeys(title for title, _, _ in runs)).index(one[0]), one[1:])
    )
    rows = [row for one in order for row in summary(*one, runs[one])]
    rounds = "one round" if arguments.rounds == 1 else f"medians of {arguments.rounds} rounds"
    text = (
        f"{os.cpu_count()} CPUs, {torch_version()}, Python {platform.python_version()}, gloo; {n_layers} layers of "
        f"{WIDTH} x {WIDTH}, {n_layers * BYTES_OF_A_LAYER / 1e6:,.0f} MB of fp32 weights and moments; {rounds}.\n\n"
        f"{table(HEADER, rows)}"
    )
    print(f"\n{text}")
    if arguments.write:
        publish(arguments.write, "bench-dcp", text)


@contextlib.contextmanager
def opened(place: str, served: Path, work: Path) -> Iterator[Source | None]:
    """The server of `place`; None where the files are local."""
    if place in LOCAL:
        yield None
        return
    with SERVERS[place](served, work) as source:
        yield source


def compare(
    place: str,
    source: Source | None,
    folder: Path,
    m: int,
    n_layers: int,
    whole: Path,
    cache: Path,
    rounds: int,
) -> dict[str, list[Run]]:
    """One restore by `m` ranks in each way and round; the way that begins takes turns."""
    found: dict[str, list[Run]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            for path in folder.iterdir():
                if LOCAL.get(place):
                    drop_from_page_cache(str(path))
                elif source is None:
                    path.read_bytes()
            sent = source.sent() if source else 0
            base, options = (source.base, source.options) if source else (folder, {})
            told = job(m, "restore", way, base, json.dumps(options), n_layers, whole, cache / "fetched")
            found[way].append(
                Run(
                    max(rank["seconds"] for rank in told),
                    sum(rank["cpu_seconds"] for rank in told),
                    source.sent() - sent if source else sum(rank["read"] for rank in told),
                    sum(rank["kept"] for rank in told),
                    sum(rank["peak"] for rank in told),
                )
            )
            shutil.rmtree(cache / "fetched", ignore_errors=True)
    return found


def summary(place: str, n: int, m: int, runs: Mapping[str, list[Run]]) -> list[list[object]]:
    return [
        [
            place,
            f"{n}, {m}",
            way,
            f"{median(run.seconds for run in found):.2f}",
            f"{median(run.seconds / ours.seconds for run, ours in zip(found, runs[OURS], strict=True)):.2f}",
            f"{median(run.cpu_seconds for run in found):.2f}",
            f"{median(run.read_bytes for run in found) / 1e6:,.0f}",
            f"{median(run.read_bytes / run.kept_bytes for run in found):.2f}",
            f"{median(run.peak_bytes for run in found) / 1e6:,.0f}",
        ]
        for way, found in runs.items()
    ]


def torch_version() -> str:
    import torch

    return f"torch {torch.__version__}"


def job(n: int, *arguments: object) -> list[dict[str, Any]]:
    """Runs a function of this file on `n` ranks; what each printed last."""
    from processes import run_ranks

    finished = run_ranks(__file__, n, args=arguments, deadline_s=DEADLINE_S, fork=False)
    if any(rank.returncode != 0 for rank in finished):
        raise SystemExit(repr(finished))
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


def make(n_layers: int, seed: int) -> tuple[Any, Any]:
    """Every rank: a module of so many sharded layers, and an optimizer that has no state yet."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(n_layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=LR * seed)


def tensors(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights and the optimizer's state by name; most of them are sharded."""
    found = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found.update({f"{key}/{name}": value for key, value in optimizer.state[parameter].items()})
    return found


def save(folder: str, whole: str, n_layers: str) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = make(int(n_layers), seed=1)
    model(torch.randn(8, WIDTH)).square().sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder)
    full = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in tensors(model, optimizer).items()
    }
    if dist.get_rank() == 0:
        torch.save(full, whole)
    print("{}")
    dist.barrier()
    dist.destroy_process_group()


def restore(way: str, base: str, options: str, n_layers: str, whole: str, cache: str) -> None:
    import torch
    import torch.distributed as dist

    model, optimizer = make(int(n_layers), seed=2)
    load_all = prepare(way, model, optimizer, base, json.loads(options), cache)
    if dist.get_rank() == 0:
        # Memory that a virtual machine gave back to its host costs several times as much, whatever is measured.
        touched(3 * int(n_layers) * BYTES_OF_A_LAYER).close()
    dist.barrier()
    with peak_private_bytes([os.getpid()]) as peak:
        begin, cpu, read = time.perf_counter(), time.process_time(), io_bytes()["rchar"]
        load_all()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
        read = io_bytes()["rchar"] - read
    found = tensors(model, optimizer)
    check(way, found, torch.load(whole, mmap=True))
    if optimizer.param_groups[0]["lr"] != LR:
        raise SystemExit(f"{way} did not restore the rate")
    kept = sum(local(value).nbytes for value in found.values())
    told = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "read": read,
        "kept": kept,
        "peak": peak.above_start,
    }
    print(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def prepare(
    way: str, model: Any, optimizer: Any, base: str, options: dict[str, Any], cache: str
) -> Callable[[], object]:
    """The restore, whose imports are there before the clock starts. Each way makes its own client of the store."""
    if options:
        import s3fs  # noqa: F401
    if way == OURS:
        from rankload.loader import State, load

        given = {"storage_options": options, "cache_dir": cache} if options else {}
        return lambda: load(base, State(model, optimizer), progress_bar=False, options=given)

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def load_all() -> None:
        weights, moments = get_state_dict(model, optimizer)
        reader = FsspecReader(base, **options) if options else dcp.FileSystemReader(base)
        dcp.load({"model": weights, "optim": moments}, storage_reader=reader)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    return load_all


def check(way: str, found: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises `SystemExit` unless every tensor is, bit for bit, this rank's part of the one that was saved."""
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if found.keys() != saved.keys():
        raise SystemExit(f"{way}: restored are {sorted(found)}, saved were {sorted(saved)}")
    for name, value in found.items():
        part = saved[name]
        if isinstance(value, DTensor):
            sizes, starts = compute_local_shape_and_global_offset(
                value.shape, value.device_mesh, value.placements
            )
            for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
                part = part.narrow(dim, start, size)
        one, other = (each.contiguous().flatten().view(torch.uint8) for each in (local(value), part))
        if value.dtype != part.dtype or not torch.equal(one, other):
            raise SystemExit(f"{way}: {name} is not what was saved")


def local(value: Any) -> Any:
    """What this rank has of a tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("save", "restore"):
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
