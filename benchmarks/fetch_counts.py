"""How many bytes leave the server: after a kill, and for a job of several nodes.

    python -m benchmarks.fetch_counts --params 143 --write docs/benchmarks.md

A model is saved by DeepSpeed at stage 1 by 4 ranks and restored by 4 from nginx, which counts. Every rank of a job is
killed (SIGKILL) when so much of it has landed, and the job started again; two nodes of two ranks restore in each mode.
Weights are compared with those that were saved.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks are started as scripts of the tests' are.
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

from benchmarks.fetch_restore import BUCKET, DEADLINE_S, Source, job, layers, make, masters_of, over_http  # noqa: E402
from benchmarks.tables import publish, table  # noqa: E402

SHARES = (0.3, 0.6, 0.9)
N_RANKS = 4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch_counts", description=__doc__)
    parser.add_argument("--params", type=int, default=20, help="of the model, in millions (143: 2 GB)")
    parser.add_argument("--write", help="the page to write the tables to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as work:
        served = Path(work) / "served"
        folder = served / BUCKET
        told = job(N_RANKS, "save", folder, "1", arguments.params)
        masters = [one["masters"] for one in told]
        with over_http(served, Path(work) / "servers") as source:
            need = restore(source, Path(work) / "cache", masters, arguments.params, "node", (N_RANKS,))
            # Where no node holds all masters, the module's weights are read too: everything is needed.
            saved = sum(path.stat().st_size for path in folder.rglob("*.pt"))
            texts = [
                f"{arguments.params} million parameters, ZeRO stage 1, {N_RANKS} ranks. On one node they need "
                f"{need / 1e6:,.1f} MB, on two {saved / 1e6:,.1f} MB.",
                killed(source, Path(work), masters, arguments.params, need),
                nodes(source, Path(work), masters, arguments.params, saved),
            ]
    text = "\n\n".join(texts)
    print(text)
    if arguments.write:
        publish(arguments.write, "bench-counts", text)


def killed(source: Source, work: Path, masters: list[int], params: int, need: int) -> str:
    rows: list[list[object]] = []
    for share in SHARES:
        cache = work / f"killed-{share}"
        before = source.sent()
        ended = run(source, cache, params, "node", (N_RANKS,), kill_at=int(share * need))
        if ended != [-signal.SIGKILL] * N_RANKS:
            raise SystemExit(f"the ranks ended with {ended}: expected all to be killed at {share:.0%}")
        first = source.sent() - before
        landed = recorded_bytes(cache)
        second = restore(source, cache, masters, params, "node", (N_RANKS,))
        shutil.rmtree(cache, ignore_errors=True)
        rows.append(
            [
                f"{share:.0%}",
                *(f"{one / 1e6:,.1f}" for one in (first, landed, second)),
                f"{second / (need - landed):.3f}",
            ]
        )
    header = (
        "killed when so much had landed", "off the server before, MB", "landed, MB", "off the server afterwards, MB",
        "afterwards / what was missing",
    )  # fmt: skip
    return table(header, rows)


def nodes(source: Source, work: Path, masters: list[int], params: int, need: int) -> str:
    rows: list[list[object]] = []
    for mode in ("node", "auto", "job"):
        sent = restore(source, work / mode, masters, params, mode, (2, 2))
        rows.append([f"`{mode}`", f"{sent / 1e6:,.1f}", f"{sent / need:.3f}"])
    return table(("two nodes of two ranks", "off the server, MB", "/ what the job needs"), rows)


def restore(
    source: Source, cache: Path, masters: list[int], params: int, mode: str, sizes: tuple[int, ...]
) -> int:
    """Restores on nodes of these `sizes`; the bytes that left the server."""
    before = source.sent()
    found = run(source, cache, params, mode, sizes)
    if found != masters:
        raise SystemExit(f"{mode}: the weights are not those that were saved")
    return source.sent() - before


def run(
    source: Source, cache: Path, params: int, mode: str, sizes: tuple[int, ...], kill_at: int = 0
) -> list[int]:
    """What each rank holds afterwards, or how it ended where it is killed."""
    from processes import run_ranks

    node_of = [node for node, size in enumerate(sizes) for _ in range(size)]
    finished = run_ranks(
        __file__, len(node_of), args=("restore", source.base, params, mode, kill_at), deadline_s=DEADLINE_S,
        nodes=sizes, fork=False,
        env=lambda rank: {"DS_ACCELERATOR": "cpu", "RANKLOAD_CACHE_DIR": str(cache / str(node_of[rank]))},
    )  # fmt: skip
    if kill_at:
        return [rank.returncode or 0 for rank in finished]
    if any(rank.returncode != 0 for rank in finished):
        raise SystemExit(repr(finished))
    return [json.loads(rank.stdout.splitlines()[-1])["masters"] for rank in finished]


def recorded_bytes(cache: Path) -> int:
    """What the records say has landed; a chunk of 8 MiB that had not all come is not among it."""
    from rankload.loader.byte_ranges import total_bytes
    from rankload.loader.cache.holes import Landed

    found = 0
    for record in cache.rglob("*.landed"):
        path = record.with_suffix("")
        missing = Landed(str(path)).missing([(0, path.stat().st_size)])
        found += path.stat().st_size - total_bytes(missing)
    return found


def landed_bytes(cache: Path) -> int:
    """What is in the cache's files; sparse where nothing has landed."""
    found = 0
    for path in cache.rglob("*.pt"):
        try:
            found += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return found


def rank_restores(base: str, params: str, mode: str, kill_at: str) -> None:
    from rankload.loader import State, load

    engine = make("1", layers(params), seed=1)
    if int(kill_at):
        threading.Thread(target=die, args=(int(kill_at),), daemon=True).start()
    load(base, State(engine), progress_bar=False, options={"mode": mode})
    print(json.dumps({"masters": masters_of(engine)}))


def die(at: int) -> None:
    """Kills this process when so many bytes have landed on its node."""
    cache = Path(os.environ["RANKLOAD_CACHE_DIR"])
    while landed_bytes(cache) < at:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "restore":
        rank_restores(*sys.argv[2:])
    else:
        main()
