"""How a load grows with the time that a store takes to answer: one file, a DCP folder, and ZeRO stage 3 of 8 ranks.

    python -m benchmarks.latency --write docs/benchmarks.md

The checkpoints lie on an HTTP server, and on an S3 server (hadro), both on loopback, that answer each request so much
later (``tests/support/paced_server.py``); a connection costs nothing more. One process restores the weights of each
into a module, from every server in turns; beside it the plain way to bring the same files here: over HTTP a GET for
each, one after another, from S3 s3fs's ``get`` of all. Seconds are medians of the rounds, the requests and the answers
in a row those of the slowest server, where they show. What was restored is compared. No speed is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "tests" / "support")]

import torch  # noqa: E402
from dcp_folders import save  # noqa: E402
from many_files import write_zero  # noqa: E402
from paced_server import PacedServer, paced_front, paced_server  # noqa: E402
from rankload.launch.children import rank_environment  # noqa: E402
from rankload.loader import State, load  # noqa: E402
from real_servers import hadro  # noqa: E402
from server_process import ServerMissing  # noqa: E402

from .tables import publish, table  # noqa: E402

DELAYS_S = (0.0, 0.01, 0.05, 0.2)
BUCKET = "bucket"
ONE_FILE, DCP, ZERO = "one file", "a DCP folder", "ZeRO stage 3 of 8 ranks"
FORMS = {ONE_FILE: "whole.pt", DCP: "dcp", ZERO: "zero"}
"""Each with its name in the bucket."""
LAYERS, RANKS = 64, 8
ELEMENTS = 1 << 18
"""Of each layer's weight: 1 MiB, a multiple of `RANKS` elements."""
OURS, PLAINLY = "**rankload**", "the files alone"
DEADLINE_S = 240.0


class OneWeight(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(ELEMENTS))


def a_model() -> torch.nn.Module:
    """It has ones; zeros are saved."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(OneWeight() for _ in range(LAYERS))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", metavar="PAGE", help="replaces the page's table of them")
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as folder:
        served, work = Path(folder) / "served", Path(folder) / "work"
        write_all(served / BUCKET)
        megabytes = {form: _bytes_of(served / BUCKET / name) / 1e6 for form, name in FORMS.items()}
        for store in ("HTTP", "S3"):
            try:
                with servers_of(store, served, work) as (fronts, options):
                    for form, name in FORMS.items():
                        urls = [_url(store, front, name) for front in fronts]
                        rows += rows_of(
                            f"{store}, {form}", urls, options, fronts, megabytes[form], arguments.rounds
                        )
                        print("\n".join(map(str, rows[-2:])), flush=True)
            except ServerMissing as missing:
                print(f"{store} is left out: {missing}")
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}"
    header = (
        "from",
        "way",
        *(f"seconds at {delay_s * 1e3:.0f} ms" for delay_s in DELAYS_S),
        "later at 50 ms by",
        "answers in a row before the bulk",
        "requests",
    )
    text = (
        f"{machine}; {LAYERS} weights of {4 * ELEMENTS / 2**20:.0f} MiB, in files of "
        f"{', '.join(f'{size:,.0f} MB ({form})' for form, size in megabytes.items())}; medians of {arguments.rounds} "
        f"rounds.\n\n{table(header, rows)}"
    )
    print(text)
    if arguments.write:
        publish(arguments.write, "bench-latency", text)


def write_all(bucket: Path) -> None:
    """A checkpoint of each form, whose weights are zeros."""
    saved = {name: torch.zeros_like(value) for name, value in a_model().state_dict().items()}
    zero = write_zero(bucket / "zero" / "step3", ranks=RANKS, parameters=LAYERS, share=ELEMENTS // RANKS)
    (bucket / "zero" / "latest").write_text(zero.name)
    torch.save({"state": {"model": saved}}, bucket / "whole.pt")
    save(bucket / "dcp", {"model": saved})


@contextlib.contextmanager
def servers_of(
    store: str, served: Path, work: Path
) -> Iterator[tuple[list[PacedServer], dict[str, Any] | None]]:
    """A server for each delay, and for S3 the options of a client, without an endpoint."""
    with contextlib.ExitStack() as stack:
        if store == "HTTP":
            yield [stack.enter_context(paced_server(served, delay_s)) for delay_s in DELAYS_S], None
            return
        real = stack.enter_context(hadro(served, work))
        fronts = [stack.enter_context(paced_front(real.endpoint, delay_s)) for delay_s in DELAYS_S]
        yield fronts, dataclasses.replace(real, endpoint="").options


def _url(store: str, front: PacedServer, name: str) -> str:
    """Of S3: the endpoint, and the object's URI."""
    return front.url(f"{BUCKET}/{name}") if store == "HTTP" else f"{front.url('')} s3://{BUCKET}/{name}"


def rows_of(
    what: str,
    urls: Sequence[str],
    options: dict[str, Any] | None,
    fronts: Sequence[PacedServer],
    megabytes: float,
    rounds: int,
) -> list[tuple[str, ...]]:
    """A row for each way: `rounds` rounds, in each of which every server is asked by both ways."""
    command = [sys.executable, "-m", "benchmarks.latency", "--child", json.dumps(options)]
    seconds: dict[tuple[str, int], list[float]] = {}
    in_a_row: list[int] = []
    requests: dict[str, list[int]] = {}
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=rank_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            for number in range(-1, rounds):
                for at, (url, front) in enumerate(zip(urls, fronts, strict=True)):
                    for way in (OURS, PLAINLY):
                        front.forget()
                        took_s = _ask(child, way, url)
                        if number < 0:
                            continue  # The first load of a process imports what it needs.
                        seconds.setdefault((way, at), []).append(took_s)
                        if front is fronts[-1]:
                            requests.setdefault(way, []).append(len(front.asked))
                            if way == OURS:
                                in_a_row.append(front.answers_in_a_row())
        finally:
            if child.stdin is not None:
                child.stdin.close()
            child.wait(DEADLINE_S)
    rows = []
    for way in (OURS, PLAINLY):
        later = [
            late - soon
            for late, soon in zip(
                seconds[way, DELAYS_S.index(0.05)], seconds[way, DELAYS_S.index(0.0)], strict=True
            )
        ]
        rows.append(
            (
                what,
                way,
                *(f"{median(seconds[way, at]):.2f}" for at in range(len(urls))),
                f"{median(later):.2f} s",
                f"{median(in_a_row):.0f}" if way == OURS else "",
                f"{median(requests[way]):.0f}",
            )
        )
    return rows


def _ask(child: subprocess.Popen[str], way: str, url: str) -> float:
    """The seconds that the child takes for one restore or download."""
    if child.stdin is None or child.stdout is None:
        raise SystemExit("the child has no pipes")
    child.stdin.write(f"{way}\t{url}\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        raise SystemExit(f"{way} of {url} failed")
    return float(line)


def child(options: dict[str, Any] | None) -> None:
    """Answers each line, a way and a URL, by the seconds that it took."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="rankload-bench-") as folder:
        os.environ["RANKLOAD_CACHE_DIR"] = f"{folder}/cache"
        for line in sys.stdin:
            way, url = line.rstrip("\n").split("\t")
            endpoint, _, path = url.rpartition(" ")
            storage = None
            if options is not None:
                client = {**options["client_kwargs"], "endpoint_url": endpoint}
                storage = {**options, "client_kwargs": client}
            target = Path(folder) / "plain"
            model = a_model() if way == OURS else None
            begin = time.perf_counter()
            if model is not None:
                chosen = {} if storage is None else {"storage_options": storage}
                load(path, State(model), load_weights_only=True, progress_bar=False, options=chosen)
            else:
                plainly(path, storage, target)
            print(time.perf_counter() - begin, flush=True)
            if model is not None and any(value.any() for value in model.state_dict().values()):
                raise SystemExit("what was saved was not restored")
            for each in (Path(folder) / "cache", target):
                shutil.rmtree(each, ignore_errors=True)


def plainly(path: str, storage: dict[str, Any] | None, target: Path) -> None:
    """Brings the files at `path` to `target`."""
    target.mkdir()
    if storage is not None:
        import s3fs

        files = s3fs.S3FileSystem(**storage, skip_instance_cache=True)
        files.get(path, str(target / "all"), recursive=not path.endswith(".pt"))
        return
    server, _, name = path.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(server)
    for one in files_of(name):
        connection.request("GET", f"/{one}")
        answer = connection.getresponse()
        with open(target / one.replace("/", "-"), "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    connection.close()


def files_of(name: str) -> list[str]:
    """The files that a restore of the weights reads, as whoever knows the checkpoint would name them."""
    if name.endswith("dcp"):
        return [f"{name}/.metadata", f"{name}/__0_0.distcp"]
    if not name.endswith("zero"):
        return [name]
    ends = ("zero_pp_rank_{}_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    return [f"{name}/latest", *(f"{name}/step3/{end.format(rank)}" for rank in range(RANKS) for end in ends)]


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
