"""From a server into DeepSpeed engines, end to end: rankload beside the usual ways.

    python -m benchmarks.fetch_restore --params 143 --write docs/benchmarks.md

A model is saved by DeepSpeed, in bf16 with AdamW, at stages 1 and 3 by 1, 2 and 4 ranks, and restored by as many from
nginx and from SeaweedFS, with nginx before it that counts bytes. Ways take turns within each round; what is shown are
medians. Every rank's fp32 weights are compared with those that were saved. With the most ranks also over connections of
90 MB/s each, which is about what object stores give. Beside them stands how long the server alone takes: a few threads
that read the same bytes into memory, and no ranks. Nothing is asserted about speed.

    python -m benchmarks.fetch_restore --ratios --params 60 --rounds 7 --write docs/benchmarks.md

compares only two ways, rankload with default options and each rank fetching for itself: the same processes take turns,
so that the ratio of each round is of two runs right after each other, and show the median ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks are started as scripts of the tests' are.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

from benchmarks.fetch import CAP  # noqa: E402
from benchmarks.fetch_clients import Place, raw_ranges, s5cmd_copying, touched  # noqa: E402
from benchmarks.measure import peak_private_bytes  # noqa: E402
from benchmarks.tables import publish, table  # noqa: E402

OURS: Mapping[str, Mapping[str, Any]] = {
    "**rankload**": {},
    "**rankload**, node": {"mode": "node"},
    "**rankload**, direct": {"mode": "direct"},
}
"""rankload's ways by name, each as options of its own, the default first; with one node, ``job`` is ``node``."""
NAIVE = "each rank fetches its files, DeepSpeed loads"
ONCE = "as Composer does: local rank 0 fetches, DeepSpeed loads"
COPIED = "s5cmd copies the folder, DeepSpeed loads"
"""From S3 alone."""
LIMIT = "the server's limit: the same bytes into memory, no ranks"
LIMIT_CONNECTIONS = 4
CAPPED_LIMIT_CONNECTIONS = 32
WAYS = (NAIVE, ONCE, *OURS)
BUCKET = "bench"
WIDTH = 1024
DEADLINE_S = 900.0


@dataclass(frozen=True)
class Source:
    """A server that counts the bytes that it sends."""

    name: str
    base: str
    options: Mapping[str, Any]
    sent: Callable[[], int]
    limit_connections: int = LIMIT_CONNECTIONS


@dataclass(frozen=True)
class Run:
    seconds: float
    moved_bytes: int
    peak_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch_restore", description=__doc__)
    parser.add_argument("--params", type=int, default=20, help="of the model, in millions (143: 2 GB)")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--stages", default="1,3")
    parser.add_argument("--servers", default=",".join(SERVERS), help="capped ones with the most ranks alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ratios", action="store_true", help="compare two ways, in the same processes")
    parser.add_argument("--write", help="the page to write the table to")
    arguments = parser.parse_args()
    if arguments.ratios:
        ratios(arguments)
        return
    rows: list[list[object]] = []
    header = (
        "server",
        "stage",
        "ranks",
        "way",
        "seconds",
        "x time of ours",
        "off the server, MB",
        "memory, MB",
    )
    saved_mb: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="rankload-bench-", dir="/dev/shm") as targets:
        for source, folder, stage, n, masters in cases(arguments, saved_mb):
            runs = compare(source, folder, stage, n, Path(targets), arguments.rounds, masters)
            rows += summary(source.name, stage, n, runs)
            print(table(header, rows[-len(runs) :]), flush=True)
    rounds = "one round" if arguments.rounds == 1 else f"medians of {arguments.rounds} rounds"
    text = (
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}; {arguments.params} million parameters, "
        f"{min(saved_mb):,} to {max(saved_mb):,} MB of files; {rounds}. Memory is the sum "
        f"over the ranks of each one's peak of private memory above where it began. All memory had been touched "
        f"before.\n\n{table(header, rows)}"
    )
    print(f"\n{text}")
    if arguments.write:
        publish(arguments.write, "bench-restore", text)


def ratios(arguments: argparse.Namespace) -> None:
    """The command with ``--ratios``."""
    rows: list[list[object]] = []
    header = ("server", "stage", "ranks", "naive, s", "rankload, s", "median ratio", "lowest", "highest")
    sizes: set[int] = set()
    began, load = time.time(), os.getloadavg()[0]
    for source, folder, stage, n, masters in cases(arguments, sizes):
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        with tempfile.TemporaryDirectory(prefix="rankload-bench-", dir="/dev/shm") as target:
            told = job(
                n, "take_turns", source.base, json.dumps(source.options), stage, target, json.dumps(files),
                arguments.rounds, json.dumps(masters),
            )  # fmt: skip
        naive, ours = ([max(each[way][at] for each in told) for at in range(arguments.rounds)]
                       for way in (NAIVE, next(iter(OURS))))  # fmt: skip
        found = sorted(mine / other for mine, other in zip(ours, naive, strict=True))
        seconds = (f"{median(one):.2f}" for one in (naive, ours))
        edges = (f"{found[0]:.2f}", f"{found[-1]:.2f}")
        rows.append([source.name, stage, n, *seconds, f"**{median(found):.2f}**", *edges])
        print(table(header, rows[-1:]), flush=True)
    text = (
        f"{os.cpu_count()} CPUs, Python {platform.python_version()}; {arguments.params} million parameters, "
        f"{min(sizes):,} to {max(sizes):,} MB of files; {arguments.rounds} rounds, in {time.time() - began:,.0f} s in "
        f"all, on a machine whose load was {load:.1f} before. Seconds are medians; a ratio is of the two runs of one "
        f"round, rankload's time to the naive way's.\n\n{table(header, rows)}"
    )
    print(f"\n{text}")
    if arguments.write:
        publish(arguments.write, "bench-restore-ratios", text)


def cases(
    arguments: argparse.Namespace, sizes: set[int]
) -> Iterator[tuple[Source, Path, str, int, list[int]]]:
    """Each server with each checkpoint in it: also its folder, its stage, its ranks, and their weights' checksums.

    Adds the sizes of the checkpoints, in MB, to `sizes`. With the most ranks alone, connections are capped too.
    """
    n_ranks = [int(n) for n in arguments.ranks.split(",")]
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as folder_name:
        work = Path(folder_name)
        for n in n_ranks:
            for stage in arguments.stages.split(","):
                served = work / f"stage{stage}-of-{n}"
                folder = served / BUCKET
                masters = [told["masters"] for told in job(n, "save", folder, stage, arguments.params)]
                sizes.add(sum(path.stat().st_size for path in folder.rglob("*.pt")) // 1_000_000)
                for name in arguments.servers.split(","):
                    if name.endswith("-capped") and n != max(n_ranks):
                        continue
                    with SERVERS[name](served, work / "servers") as source:
                        yield source, folder, stage, n, masters
                shutil.rmtree(served)


def compare(
    source: Source, folder: Path, stage: str, n: int, targets: Path, rounds: int, masters: list[int]
) -> dict[str, list[Run]]:
    ways = (*WAYS, COPIED) if source.base.startswith("s3:") else WAYS
    runs: dict[str, list[Run]] = {way: [] for way in (*ways, LIMIT)}
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for _ in range(rounds):
        for way in ways:
            found = runs[way]
            target = targets / "fetched"
            before = source.sent()
            told = job(
                n, "restore", way, source.base, json.dumps(source.options), stage, target, json.dumps(files),
                3 * sum((folder / name).stat().st_size for name in files),
            )  # fmt: skip
            if [rank["masters"] for rank in told] != masters:
                raise SystemExit(f"{way}: stage {stage} of {n}: the weights are not those that were saved")
            found.append(
                Run(
                    max(rank["seconds"] for rank in told),
                    source.sent() - before,
                    sum(rank["peak"] for rank in told),
                )
            )
            shutil.rmtree(target, ignore_errors=True)
        needed = runs[next(iter(OURS))][-1].moved_bytes
        runs[LIMIT].append(Run(needed * seconds_per_byte(source, files, folder), needed, 0))
    return runs


def seconds_per_byte(source: Source, files: list[str], folder: Path) -> float:
    """Of the largest of the files, read in ranges into memory that is there already."""
    from fsspec.core import url_to_fs

    name = max(files, key=lambda one: (folder / one).stat().st_size)
    size = (folder / name).stat().st_size
    url = f"{source.base}/{name}"
    filesystem, path = url_to_fs(url, **source.options)
    plain_url = url if url.startswith("http:") else filesystem.sign(path, expiration=600)
    with touched(size) as buffer:
        begin = time.perf_counter()
        raw_ranges(Place(url, plain_url, size, {}, source.limit_connections, False), memoryview(buffer))
        return (time.perf_counter() - begin) / size


def summary(server: str, stage: str, n: int, runs: Mapping[str, list[Run]]) -> list[list[object]]:
    ours = runs[next(iter(OURS))]
    return [
        [
            server,
            stage,
            n,
            way,
            f"{median(run.seconds for run in found):.1f}",
            f"{median(run.seconds / other.seconds for run, other in zip(found, ours, strict=True)):.1f}",
            f"{median(run.moved_bytes for run in found) / 1e6:,.0f}",
            f"{median(run.peak_bytes for run in found) / 1e6:,.0f}" if way != LIMIT else "",
        ]
        for way, found in runs.items()
    ]


def job(n: int, *arguments: object) -> list[dict[str, Any]]:
    """Runs a function of this file on `n` ranks; what each printed last."""
    from processes import run_ranks

    finished = run_ranks(
        __file__, n, args=arguments, deadline_s=DEADLINE_S, env={"DS_ACCELERATOR": "cpu"}, fork=False
    )
    if any(rank.returncode != 0 for rank in finished):
        raise SystemExit(repr(finished))
    return [json.loads(rank.stdout.splitlines()[-1]) for rank in finished]


@contextlib.contextmanager
def over_http(served: Path, work: Path, cap: int = 0) -> Iterator[Source]:
    from real_servers import nginx

    with nginx(served, work, limit_rate=cap) as server:
        base = f"{server.url}/capped/{BUCKET}" if cap else f"{server.url}/{BUCKET}"
        sent = functools.partial(body_bytes, server)
        yield Source(titled("HTTP", cap), base, {}, sent, connections(cap))


@contextlib.contextmanager
def over_s3(served: Path, work: Path, cap: int = 0) -> Iterator[Source]:
    import fsspec
    from real_servers import counted, seaweedfs

    with seaweedfs(work) as server, counted(server.endpoint, work, limit_rate=cap) as front:
        store = fsspec.filesystem("s3", **server.options)
        store.mkdir(BUCKET)
        for path in sorted(path for path in served.rglob("*") if path.is_file()):
            store.put_file(str(path), str(path.relative_to(served)))
        options = replace(server, endpoint=front.url).options
        sent = functools.partial(body_bytes, front)
        yield Source(titled("S3", cap), f"s3://{BUCKET}", options, sent, connections(cap))


SERVERS = {
    "http": over_http,
    "s3": over_s3,
    "http-capped": functools.partial(over_http, cap=CAP),
    "s3-capped": functools.partial(over_s3, cap=CAP),
}


def titled(server: str, cap: int) -> str:
    return f"{server}, {cap // 1_000_000} MB/s a connection" if cap else server


def connections(cap: int) -> int:
    return CAPPED_LIMIT_CONNECTIONS if cap else LIMIT_CONNECTIONS


def body_bytes(server: Any) -> int:
    """What the server has sent so far; a line is written when an answer has ended."""
    time.sleep(0.3)
    return sum(size for method, _, _, size in server.sent() if method == "GET")


def make(stage: str, n_layers: int, seed: int) -> Any:
    """Every rank: an engine of so many layers of a million parameters."""
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(n_layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 100_000,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": int(stage), "sub_group_size": 50_000_000},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def layers(params: str) -> int:
    return max(1, int(params) * 1_000_000 // (WIDTH * WIDTH + WIDTH))


def masters_of(engine: Any) -> int:
    """A checksum of this rank's fp32 weights."""
    outer, found = engine.optimizer, 0
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for flat in getattr(outer, name, None) or []:
            found = zlib.crc32(flat.detach().numpy(), found)
    return found


def save(folder: str, stage: str, params: str) -> None:
    import torch

    engine = make(stage, layers(params), seed=0)
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum())
    engine.step()
    engine.save_checkpoint(folder, tag=f"step-{layers(params)}")
    print(json.dumps({"masters": masters_of(engine)}))


def restore(way: str, base: str, options: str, stage: str, target: str, files: str, warm_bytes: str) -> None:
    import torch

    names: list[str] = json.loads(files)
    n_layers = next(int(Path(name).parent.name.removeprefix("step-")) for name in names if "/" in name)
    engine = make(stage, n_layers, seed=1)
    before = masters_of(engine)
    fetch_and_load = prepare(way, engine, base, json.loads(options), Path(target), names)
    if int(os.environ["LOCAL_RANK"]) == 0:
        # A virtual machine may have given free memory back to its host, and whoever touches it first then pays for it:
        # several times what the memory itself costs, and not the same for every way.
        touched(int(warm_bytes)).close()
    torch.distributed.barrier()
    with peak_private_bytes([os.getpid()]) as peak:
        begin = time.perf_counter()
        fetch_and_load()
        torch.distributed.barrier()
        seconds = time.perf_counter() - begin
    after = masters_of(engine)
    if before == after:
        raise SystemExit(f"{way} restored nothing")
    print(json.dumps({"seconds": seconds, "peak": peak.above_start, "masters": after}))


def take_turns(
    base: str, options: str, stage: str, target: str, files: str, rounds: str, masters: str
) -> None:
    """Every rank: restores one engine by both ways in turns, and prints how long each took, by way."""
    import torch

    names: list[str] = json.loads(files)
    rank, wanted = int(os.environ["RANK"]), json.loads(masters)
    n_layers = next(int(Path(name).parent.name.removeprefix("step-")) for name in names if "/" in name)
    engine = make(stage, n_layers, seed=1)
    ways = [NAIVE, next(iter(OURS))]
    given = json.loads(options)
    into = Path(target, "fetched")
    run = {way: prepare(way, engine, base, given, into, names, with_target=False) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    # The first round is not counted: memory that nobody has touched costs whoever is first more.
    for at in range(-1, int(rounds)):
        for way in ways if at % 2 else reversed(ways):
            spoil(engine)
            torch.distributed.barrier()
            begin = time.perf_counter()
            run[way]()
            torch.distributed.barrier()
            if at >= 0:
                seconds[way].append(time.perf_counter() - begin)
            if masters_of(engine) != wanted[rank]:
                raise SystemExit(f"{way}: the weights are not those that were saved")
            torch.distributed.barrier()
            if int(os.environ["LOCAL_RANK"]) == 0:
                shutil.rmtree(Path(target, "fetched"), ignore_errors=True)
    print(json.dumps(seconds))


def spoil(engine: Any) -> None:
    """Overwrites this rank's fp32 weights."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for flat in getattr(engine.optimizer, name, None) or []:
            flat.detach().fill_(0.5)


def prepare(
    way: str,
    engine: Any,
    base: str,
    options: dict[str, Any],
    target: Path,
    names: list[str],
    *,
    with_target: bool = True,
) -> Callable[[], object]:
    """What fetches and loads by `way`; what files it needs go into `target`, or `with_target` False where rankload
    puts them by itself."""
    from fsspec.core import url_to_fs

    # Whoever fetches, its client is imported and set up before the clock starts.
    filesystem, root = url_to_fs(base, **options)
    if way in OURS:
        from rankload.loader import State, load

        given = {"storage_options": options, **OURS[way]}
        if with_target:
            given["cache_dir"] = str(target)
        return lambda: load(base, State(engine), progress_bar=False, options=given)
    rank = int(os.environ["RANK"])
    own = [name for name in names if way == ONCE or is_of(rank, name)]
    copy = s5cmd_copying(options, f"{base}/*", f"{target}/") if way == COPIED else None

    def fetch_and_load() -> None:
        import torch

        if copy is not None:
            if int(os.environ["LOCAL_RANK"]) == 0:
                copy()
        elif way == NAIVE or int(os.environ["LOCAL_RANK"]) == 0:
            for name in own:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                # Ranks that fetch the same file each fetch it whole.
                filesystem.get_file(f"{root}/{name}", f"{path}.{rank}")
                os.replace(f"{path}.{rank}", path)
        torch.distributed.barrier()
        loaded, _ = engine.load_checkpoint(str(target))
        if loaded is None:
            raise SystemExit("DeepSpeed loaded nothing")

    return fetch_and_load


def is_of(rank: int, name: str) -> bool:
    """Whether this rank reads the file: what is not another rank's is everybody's."""
    return "zero_pp_rank_" not in name or f"zero_pp_rank_{rank}_" in name


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("save", "restore", "take_turns"):
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
